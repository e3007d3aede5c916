"""Comparing methods: many runs under one budget, their results, statistics and report."""

from __future__ import annotations

from peft_lab.compare.results import Record, read_items, read_results
from peft_lab.compare.runner import Comparison, compare
from peft_lab.compare.study import Study, default_study, load_study

__all__ = ["Comparison", "Record", "Study", "compare", "default_study", "load_study", "read_items", "read_results"]
