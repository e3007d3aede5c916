"""Comparing methods: many runs under one budget, their results, statistics and report."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft_lab.compare.advice import Recommendation, recommend
    from peft_lab.compare.parts import Study
    from peft_lab.compare.results import Record, read_items, read_results
    from peft_lab.compare.runner import Comparison, compare
    from peft_lab.compare.study import default_study, load_study

#: Public names, resolved on first use: checking a study file needs few of them.
_LAZY = {
    **dict.fromkeys(("Recommendation", "recommend"), "advice"),
    **dict.fromkeys(("Record", "read_items", "read_results"), "results"),
    **dict.fromkeys(("Comparison", "compare"), "runner"),
    "Study": "parts",
    **dict.fromkeys(("default_study", "load_study"), "study"),
}

__all__ = [
    "Comparison",
    "Recommendation",
    "Record",
    "Study",
    "compare",
    "default_study",
    "load_study",
    "read_items",
    "read_results",
    "recommend",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"peft_lab.compare.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'peft_lab.compare' has no attribute {name!r}")
