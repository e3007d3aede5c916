"""Pareto fronts of the arms in score and costs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from peft_lab.comparison.records.measure_table import MEASURES, mean_measure
from peft_lab.comparison.stats.statistics import CellResult


def pareto_front(points: Sequence[Sequence[float]], higher_is_better: Sequence[bool]) -> list[bool]:
    """Test for each point whether it is on the Pareto front.

    A point is on it if no other is at least as good in every coordinate and better in one.

    A point with an unknown (nan) coordinate is not on the front and beats nobody.
    """
    values = np.asarray(points, dtype=float).reshape(-1, len(higher_is_better))
    # from here on, more is better in every coordinate
    values = np.where(higher_is_better, values, -values)
    known = np.isfinite(values).all(1)
    candidates = values[known]
    beaten = [((candidates >= one).all(1) & (candidates > one).any(1)).any() for one in values]
    return [bool(there and not worse) for there, worse in zip(known, beaten, strict=True)]


def front_of_all(cell: CellResult, costs: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arms on the front over score and all costs, and these costs.

    Returns labels of arms and heads of measures.
    """
    coordinates = [[arm.score.value for arm in cell.arms]]
    heads = []
    for name in costs:
        means = [mean_measure(arm.records, name) for arm in cell.arms]
        known = [mean for mean in means if mean is not None]
        # a cost that one arm lacks would take that arm off the front, so the cost is left out
        if means and len(known) == len(means):
            coordinates.append(known)
            heads.append(MEASURES[name].head)
    # a front over the score alone would only repeat which arm is the best
    if not heads:
        return [], []
    on = pareto_front(np.transpose(coordinates).tolist(), (cell.higher_is_better, *[False] * len(heads)))
    return [arm.label for arm, there in zip(cell.arms, on, strict=True) if there], heads
