"""The plain bootstrap over seeds and test rows, shown beside the intervals that the findings rest on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

_RESAMPLES = 2000


def bootstrap_interval(values: Sequence[np.ndarray]) -> tuple[float, float] | None:
    """95 % percentile interval of a score, seeds and test rows resampled apart from each other.

    Args:
        values: for each seed the rows' values, arrays (rows,), as `jackknife_values` gives; their mean is the score.

    Returns:
        None with fewer than two seeds or rows. With 3 seeds the interval is too narrow (`tests/test_statistics.py`).
    """
    if len(values) < 2 or len(values[0]) < 2:
        return None
    table = np.stack(values)

    def mean(seeds: np.ndarray, rows: np.ndarray) -> float:
        return float(table[seeds][:, rows].mean())

    if np.ptp(table) == 0:
        return float(table[0, 0]), float(table[0, 0])
    samples = tuple(np.arange(size) for size in table.shape)
    found = stats.bootstrap(
        samples, mean, paired=False, vectorized=False, n_resamples=_RESAMPLES, method="percentile", rng=0
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
