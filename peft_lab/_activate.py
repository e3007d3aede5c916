"""Register the methods with peft as soon as peft is there, without importing it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


class _RegisterAfterPeft(MetaPathFinder):
    """Finds peft as usual and adds one step behind its import. Removes itself once that has happened."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "peft":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, self)
        return spec


class _Then(Loader):
    """peft's own loader, followed by the registration of the methods."""

    def __init__(self, loader: Loader, finder: MetaPathFinder) -> None:
        self.loader, self.finder = loader, finder

    def __getattr__(self, name: str) -> object:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        if spec is not None:
            spec.loader = self.loader
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        from peft_lab.registry import load_all

        load_all()


def activate() -> None:
    """Register now if peft is loaded, else arrange for it to happen right after peft is imported. Idempotent."""
    if "peft" in sys.modules and getattr(sys.modules["peft"], "PeftModel", None) is not None:
        from peft_lab.registry import load_all

        load_all()
    elif not any(isinstance(finder, _RegisterAfterPeft) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterAfterPeft())
