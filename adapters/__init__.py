"""Methods grouped by the place where they act.

Each method is one file or one folder. `from peft_lab.adapters import SVFitConfig` imports the file that defines it.
"""

from __future__ import annotations

import importlib
from typing import Any

from peft_lab import registry
from peft_lab.errors import did_you_mean


def _configs() -> dict[str, str]:
    """Modules of the config classes, without those of peft's own methods."""
    found = {}
    for info in registry.list_methods().values():
        if info.config and info.place != "peft":
            found[info.config] = info.module
    return found


def __getattr__(name: str) -> Any:
    # Imported on demand, so that the list of methods needs neither torch nor peft.
    modules = _configs()
    if name in modules:
        return getattr(importlib.import_module(modules[name]), name)
    raise AttributeError(f"module 'peft_lab.adapters' has no attribute {name!r}.{did_you_mean(name, modules)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_configs()])


__all__ = sorted(_configs())
