"""Costs of the arms' searches, and runs that shared the machine."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from peft_lab.comparison.records.run import Record


@dataclass(frozen=True)
class SearchBudget:
    """Cost of the search of one arm on one task and backbone.

    Attributes:
        trials: candidates that were tried.
        beyond: those of them that were tried because the best learning rate was the lowest or highest.
        runs: training runs (a candidate may have several, by rounds and seeds), failed ones included.
        steps: training steps of all these runs; a failed run counts with none.
    """

    arm: str
    task: str
    backbone: str
    trials: int
    beyond: int
    runs: int
    steps: int


def search_budgets(records: Iterable[Record]) -> list[SearchBudget]:
    """Cost of the search of each arm, by task and backbone.

    Without the records that are `beyond`, the budgets are those that all arms share.
    """
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        if record.stage == "search":
            groups.setdefault((record.arm, record.task, record.backbone), []).append(record)
    found = []
    for (arm, task, backbone), runs in groups.items():
        beyond = _count_candidates([run for run in runs if run.beyond])
        steps = sum(run.steps for run in runs)
        found.append(SearchBudget(arm, task, backbone, _count_candidates(runs), beyond, len(runs), steps))
    return found


def _count_candidates(runs: Sequence[Record]) -> int:
    candidates = set()
    for run in runs:
        # tuned values may be lists, which no set takes, so candidates are compared as text
        candidates.add(json.dumps([run.learning_rate, run.tuned], sort_keys=True, default=str))
    return len(candidates)


def overlapping(records: Iterable[Record]) -> bool:
    """Test whether two runs were under way at the same time."""
    # times of one ISO format sort as texts, and if any two runs overlap, two neighbours do
    spans = sorted((record.started, record.finished) for record in records if record.started and record.finished)
    return any(later[0] < earlier[1] for earlier, later in itertools.pairwise(spans))
