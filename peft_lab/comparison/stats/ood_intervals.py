"""Bootstrap intervals of out-of-distribution scores over seeds and rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from peft_lab.metrics.out_of_distribution import ACCEPTED

Array = Any
#: Function from scores of own and other rows, and weights of both (resamples, rows), to a value of each resample.
Weighted = Callable[[Array, Array, Array, Array], Array]

_RESAMPLES = 2000


def ood_interval(own: Sequence[Array], other: Sequence[Array], value: Weighted) -> tuple[float, float] | None:
    """95 % percentile interval of a mean over seeds, seeds and rows of both tasks being resampled independently.

    Args:
        own, other: for each seed the scores of the task's own rows and of the others, (rows,) each, of the same rows.
        value: `weighted_auroc` or `weighted_false_positive_rate`.

    Returns:
        None with fewer than two seeds, or seeds with other rows. With 3 seeds the interval is too narrow.
    """
    seeds, sizes = len(own), {(len(a), len(b)) for a, b in zip(own, other, strict=True)}
    if seeds < 2 or len(sizes) != 1:
        return None
    draw = np.random.default_rng(0)
    # a resample of rows is the number of times that each of them is drawn, so all can be taken at once
    weights = [draw.multinomial(n, np.full(n, 1 / n), size=_RESAMPLES) / n for n in sizes.pop()]
    drawn_seeds = draw.integers(seeds, size=(_RESAMPLES, seeds))
    values = np.stack([value(a, b, *weights) for a, b in zip(own, other, strict=True)], axis=1)
    means = np.take_along_axis(values, drawn_seeds, axis=1).mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def weighted_auroc(own: Array, other: Array, own_weights: Array, other_weights: Array) -> Array:
    """Area under the ROC curve of rows with weights that sum up to 1, (resamples,)."""
    higher = (own[:, None] > other).astype(float) + 0.5 * (own[:, None] == other)
    return ((own_weights @ higher) * other_weights).sum(1)


def weighted_false_positive_rate(own: Array, other: Array, own_weights: Array, other_weights: Array) -> Array:
    """False positive rate at 95 % true positives of rows with weights that sum up to 1, (resamples,)."""
    order = np.argsort(-own, kind="stable")
    accepted = own_weights[:, order].cumsum(1)
    # the first row, from the highest score on, with which enough of the weight is accepted
    threshold = own[order][(accepted >= ACCEPTED - 1e-9).argmax(1)]
    rank = np.argsort(-other, kind="stable")
    passed = np.searchsorted(-other[rank], -threshold, side="right")
    total = np.concatenate([np.zeros((len(threshold), 1)), other_weights[:, rank].cumsum(1)], axis=1)
    return total[np.arange(len(threshold)), passed]
