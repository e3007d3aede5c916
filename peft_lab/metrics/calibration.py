"""Expected calibration error."""

from __future__ import annotations

import numpy as np

BINS = 15


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error from bins of equal width.

    It is the sum over bins of the share of rows x |accuracy - mean confidence|.

    Args:
        confidence: probability of the predicted class of each row, (n,).
        correct: 1 where the prediction is right, else 0, (n,).
        bins: number of bins from 0 to 1; a row at an edge belongs to the bin above.
    """
    gaps = np.bincount(bins_of(confidence, bins), weights=correct - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def bins_of(confidence: np.ndarray, bins: int = BINS) -> np.ndarray:
    """Bin of each row, (n,), from 0."""
    # a confidence of exactly 1 would fall into a bin above the last one
    return np.minimum((confidence * bins).astype(int), bins - 1)
