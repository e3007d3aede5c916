"""Registration of the methods with peft, at the moment peft is imported.

`import peft_lab` must not import peft or torch. So where peft is not loaded yet, a finder is put before the others in
`sys.meta_path`: it finds the same modules as they do, and registers the methods after the import of peft. Where that
import has begun already, as it has when peft imports torch and torch calls `peft_lab_autoload`, its end is awaited.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

#: Receives the error of a registration instead of the import of peft; None to raise it.
_on_error: Callable[[Exception], None] | None = None


def register_with_peft() -> None:
    """Register the methods now, or right after the import of peft.

    A second call changes nothing.
    """
    spec = getattr(sys.modules.get("peft"), "__spec__", None)
    # the mark by which Python itself knows a module whose import has not ended
    if spec is not None and getattr(spec, "_initializing", False):
        spec.__class__ = _SpecOfPeft
    elif _peft_is_loaded():
        _register_methods()
    elif not any(isinstance(finder, _PeftFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftFinder())


def report_errors(report: Callable[[Exception], None]) -> None:
    """Report errors of the registration from now on instead of raising them out of `import peft`.

    For programs that have not imported this package themselves, and may have no use for it.
    """
    global _on_error
    _on_error = report


def _peft_is_loaded() -> bool:
    # a partly imported peft is in sys.modules too, without its classes
    return getattr(sys.modules.get("peft"), "PeftModel", None) is not None


def _register_methods() -> None:
    try:
        from peft_lab.tuners.registration import load_all, warn_of_old_peft

        load_all()
        warn_of_old_peft()
    except Exception as error:
        if _on_error is None:
            raise
        _on_error(error)


class _SpecOfPeft(ModuleSpec):
    """Spec of a peft whose import has begun, which registers the methods at its end.

    Python then sets `_initializing` to False, and calls nothing by which the end could be noticed otherwise.
    """

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name == "_initializing" and not value:
            object.__setattr__(self, "__class__", ModuleSpec)
            # after a failed import peft is not in sys.modules: then the next one is watched for
            register_with_peft()


class _PeftFinder(MetaPathFinder):
    """Finder of peft and of this package's modules, which registers the methods.

    Modules of this package are watched too, because one of them may be the first to import peft: the methods need that
    module complete, so they are registered after the outermost import. The finder then removes itself.
    """

    def __init__(self) -> None:
        # by thread, because an import in another thread is not nested in this one's
        self._imports = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Spec of the other finders, with a loader that registers afterwards."""
        if fullname != "peft" and not fullname.startswith("peft_lab."):
            return None
        for finder in sys.meta_path:
            # Python itself passes over finders without `find_spec`
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                # a namespace package has no loader, and no code after which to register
                if spec.loader is not None:
                    spec.loader = _RegisteringLoader(spec.loader, self)
                return spec
        return None

    def count_import(self, change: int) -> int:
        """Change the number of watched imports in this thread, and return it."""
        self._imports.count = getattr(self._imports, "count", 0) + change
        return int(self._imports.count)


class _RegisteringLoader(Loader):
    """Loader of a module that registers the methods after the outermost import."""

    def __init__(self, loader: Loader, finder: _PeftFinder) -> None:
        self.loader, self.finder = loader, finder

    def __getattr__(self, name: str) -> object:
        return getattr(self.loader, name)  # such as get_source and get_data, which tools ask for

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Create the module as its own loader does."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module, then register the methods if peft is loaded."""
        # the module keeps its own loader, as if nothing had been put in between
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.finder.count_import(1)
        try:
            self.loader.exec_module(module)
        # after a failed import too, because the count would otherwise never return to 0
        finally:
            under_way = self.finder.count_import(-1)
        # removed first: registration imports modules of this package itself
        if not under_way and _peft_is_loaded() and self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
            _register_methods()
