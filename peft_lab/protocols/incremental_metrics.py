"""Metrics of an incremental protocol, and their means over orders with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

Array = Any

#: Metrics of one order -> their names in tables.
SUMMARIES = {
    "average": "average incremental accuracy",
    "last": "last accuracy",
    "forgetting": "forgetting",
    "drop": "drop from first to last",
}


def step_metrics(right: Array, groups: Array, seen: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Metrics after one session.

    Args:
        right: True where the prediction is right, bool (rows,), of all rows of the classes or domains seen.
        groups: class or domain of each row (rows,).
        seen: classes or domains of each session so far.

    Returns:
        accuracy: of all rows; by_session: of the rows of each session; base and new: of the first and of all others,
        harmonic: their harmonic mean, which are None after the first.
    """
    by_session = [float(right[np.isin(groups, part)].mean()) for part in seen]
    found: dict[str, Any] = {"accuracy": float(right.mean()), "by_session": by_session, "base": by_session[0]}
    is_new = ~np.isin(groups, seen[0])
    new = float(right[is_new].mean()) if is_new.any() else None
    harmonic = None
    if new is not None:
        harmonic = 0.0 if new + by_session[0] == 0 else 2 * new * by_session[0] / (new + by_session[0])
    return found | {"new": new, "harmonic": harmonic}


def summary(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Metrics of an order: means over its steps, the first included.

    forgetting is the mean over the sessions before the last of the best accuracy on their rows, after any session
    before the last one, less that after the last one (Chaudhry et al. 2018, arXiv 1801.10112).

    Args:
        steps: `step_metrics` of all sessions in order.
    """
    accuracies = [step["accuracy"] for step in steps]
    falls = []
    for session in range(len(steps) - 1):
        best = max(step["by_session"][session] for step in steps[session:-1])
        falls.append(best - steps[-1]["by_session"][session])
    return {
        "average": float(np.mean(accuracies)),
        "last": accuracies[-1],
        "forgetting": float(np.mean(falls)),
        "drop": accuracies[0] - accuracies[-1],
    }


#: Ranges of the metrics, at which their intervals are cut.
BOUNDS = {"average": (0.0, 1.0), "last": (0.0, 1.0), "forgetting": (-1.0, 1.0), "drop": (-1.0, 1.0)}


def over_orders(
    values: Sequence[float], bounds: tuple[float, float] = (0.0, 1.0)
) -> tuple[float, float | None, float | None]:
    """Mean over orders with its 95 % interval by Student's t, cut at the bounds; no interval of one order."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None, None
    spread = float(np.std(values, ddof=1)) / len(values) ** 0.5
    if spread == 0:
        return mean, mean, mean
    low, high = stats.t.interval(0.95, len(values) - 1, loc=mean, scale=spread)
    return mean, max(float(low), bounds[0]), min(float(high), bounds[1])
