"""Percentile bootstrap over seeds and test rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

_RESAMPLES = 2000


def bootstrap_interval(values: Sequence[np.ndarray]) -> tuple[float, float] | None:
    """95 % percentile interval of a score.

    Seeds and test rows are resampled independently.

    Args:
        values: for each seed the values per row, float arrays (rows,), whose mean is the score.

    Returns:
        None with fewer than two seeds or rows. With 3 seeds the interval is too narrow, as tests simulate.
    """
    if len(values) < 2 or len(values[0]) < 2:
        return None
    table = np.stack(values)

    def mean(seeds: np.ndarray, rows: np.ndarray) -> float:
        return float(table[seeds][:, rows].mean())

    # equal values would only cost time
    if np.ptp(table) == 0:
        return float(table[0, 0]), float(table[0, 0])
    # scipy resamples each of its samples alone, so these are the indices of seeds and of rows
    samples = tuple(np.arange(size) for size in table.shape)
    found = stats.bootstrap(
        samples, mean, paired=False, vectorized=False, n_resamples=_RESAMPLES, method="percentile", rng=0
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
