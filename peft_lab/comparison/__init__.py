"""Comparing methods: many runs under one budget, their results, statistics and report."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft_lab.comparison.records.results import read_predictions, read_results
    from peft_lab.comparison.records.run import Record
    from peft_lab.comparison.run.recommend import Recommendation, recommend
    from peft_lab.comparison.run.runner import Comparison, compare
    from peft_lab.comparison.study.schema import default_study, load_study
    from peft_lab.comparison.study.study import Study

#: Public names, resolved on first use: checking a study file needs few of them.
_LAZY = {
    **dict.fromkeys(("Recommendation", "recommend"), "run.recommend"),
    **dict.fromkeys(("read_predictions", "read_results"), "records.results"),
    "Record": "records.run",
    **dict.fromkeys(("Comparison", "compare"), "run.runner"),
    "Study": "study.study",
    **dict.fromkeys(("default_study", "load_study"), "study.schema"),
}

__all__ = [
    "Comparison",
    "Recommendation",
    "Record",
    "Study",
    "compare",
    "default_study",
    "load_study",
    "read_predictions",
    "read_results",
    "recommend",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"peft_lab.comparison.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'peft_lab.comparison' has no attribute {name!r}")
