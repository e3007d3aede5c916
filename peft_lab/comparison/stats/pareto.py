"""Pareto fronts: which arms no other beats in score and costs at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from peft_lab.comparison.records.measure_table import MEASURES, mean_measure
from peft_lab.comparison.stats.statistics import Cell


def pareto_front(points: Sequence[Sequence[float]], higher_is_better: Sequence[bool]) -> list[bool]:
    """Which points no other point beats: none is at least as good in every coordinate and better in one.

    A point with an unknown (nan) coordinate is not on the front and beats nobody.
    """
    values = np.asarray(points, dtype=float).reshape(-1, len(higher_is_better))
    values = np.where(higher_is_better, values, -values)
    known = np.isfinite(values).all(1)
    candidates = values[known]
    beaten = [((candidates >= one).all(1) & (candidates > one).any(1)).any() for one in values]
    return [bool(there and not worse) for there, worse in zip(known, beaten, strict=True)]


def front_of_all(cell: Cell, costs: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arms that no other beats in score and all costs at once, and the heads of the costs that were measured."""
    names = [name for name in costs if all(mean_measure(arm.records, name) is not None for arm in cell.arms)]
    if not cell.arms or not names:
        return [], []
    points = [(arm.score.value, *(mean_measure(arm.records, name) or 0.0 for name in names)) for arm in cell.arms]
    on = pareto_front(points, (cell.higher_is_better, *[False] * len(names)))
    labels = [arm.label for arm, there in zip(cell.arms, on, strict=True) if there]
    return labels, [MEASURES[name].head for name in names]
