"""Register the methods with peft as soon as peft is there, without importing it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _RegisterAfterPeft(MetaPathFinder):
    """Finds peft and the modules of this package as usual, and adds one step behind the outermost import of them.

    The methods need the engine whole, and it is a module of the engine that may bring peft in. Removes itself once they
    are registered.
    """

    def __init__(self) -> None:
        self.imports = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "peft" and not fullname.startswith("peft_lab."):
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(fullname, path, target) for finder in others if hasattr(finder, "find_spec"))
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, self)
        return spec

    def entered(self, change: int) -> int:
        """Number of such imports under way in this thread, after one more or less."""
        self.imports.number = getattr(self.imports, "number", 0) + change
        return int(self.imports.number)


class _Then(Loader):
    """A module's own loader; where it is the outermost one and peft is there, the methods are registered after it."""

    def __init__(self, loader: Loader, finder: _RegisterAfterPeft) -> None:
        self.loader, self.finder = loader, finder

    def __getattr__(self, name: str) -> object:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        if spec is not None:
            spec.loader = self.loader
        self.finder.entered(1)
        try:
            self.loader.exec_module(module)
        finally:
            under_way = self.finder.entered(-1)
        if not under_way and _is_loaded() and self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
            from peft_lab.tuners.registration import load_all

            load_all()


def _is_loaded() -> bool:
    return getattr(sys.modules.get("peft"), "PeftModel", None) is not None


def activate() -> None:
    """Register now if peft is loaded, else arrange for it to happen right after peft is imported. Idempotent."""
    if _is_loaded():
        from peft_lab.tuners.registration import load_all

        load_all()
    elif not any(isinstance(finder, _RegisterAfterPeft) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterAfterPeft())
