"""Baselines of a task and backbone, as its runs recorded them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from peft_lab.comparison.stats.statistics import ALL_TASKS, CellResult
from peft_lab.metrics import greater_is_better
from peft_lab.metrics.baselines import baselines_of


@dataclass(frozen=True)
class CellBaseline:
    """Baseline of one metric on the test rows: mean over the runs that recorded it."""

    predictor: str
    score: float


def cell_baselines(cell: CellResult, metric: str = "") -> list[CellBaseline]:
    """Baselines of a cell by its main metric, or by the named one, the best one first.

    Empty for a mean over tasks, which has none of its own, and where no run recorded any.
    """
    if cell.task == ALL_TASKS:
        return []
    name = metric or cell.metric
    scores: dict[str, list[float]] = {}
    for arm in cell.arms:
        for record in arm.records:
            for predictor, score in baselines_of(record.metrics, "test", name):
                scores.setdefault(predictor, []).append(score)
    found = [CellBaseline(predictor, float(np.mean(values))) for predictor, values in scores.items()]
    return sorted(found, key=lambda each: each.score, reverse=greater_is_better(name))
