"""Metrics of any number of labels a row, over all rows and without each row in turn.

Arrays have the shape (n, labels): scores are floats, references and predictions 0 or 1. A label counts once, however
frequent it is, in `f1_macro` and in the mean average precision.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def f1_macro(reference: Array, prediction: Array) -> tuple[float, Array]:
    """Mean F1 of the labels over all rows, and without each row, (n,).

    A label that occurs neither in references nor in predictions counts as 0, as in scikit-learn with `zero_division=0`.
    """
    hits, found = (reference * prediction).astype(float), (reference + prediction).astype(float)
    all_hits, all_found = hits.sum(0), found.sum(0)
    whole = _ratio(2 * all_hits, all_found).mean()
    return float(whole), _ratio(2 * (all_hits - hits), all_found - found).mean(1)


def mean_average_precision(reference: Array, scores: Array) -> tuple[float, Array]:
    """Mean average precision over all rows, and without each row, (n,).

    The average precision of a label is that of scikit-learn; labels that no row has are left out of the mean, which is
    0 without any label.
    """
    count, labels = reference.shape
    totals, without_totals = 0.0, np.zeros(count)
    known, without_known = 0, np.zeros(count)
    for label in range(labels):
        true = reference[:, label].astype(bool)
        if not true.any():
            continue
        whole, without = _average_precision(true, scores[:, label])
        totals, known = totals + whole, known + 1
        # without its only row, a label has no average precision
        stays = true.sum() - true > 0
        without_totals += np.where(stays, without, 0.0)
        without_known += stays
    if not known:
        return 0.0, without_totals
    return totals / known, _ratio(without_totals, without_known)


def _average_precision(true: Array, scores: Array) -> tuple[float, Array]:
    """Average precision of one label that some row has, and without each row, (n,)."""
    order = np.argsort(-scores, kind="stable")
    # rows of one score are one step of the curve
    steps = np.concatenate([[0], np.cumsum(np.diff(scores[order]) != 0)])
    positives = np.bincount(steps, weights=true[order]).astype(float)
    sizes = np.bincount(steps).astype(float)
    hits, seen, total = positives.cumsum(), sizes.cumsum(), positives.sum()
    terms = positives * hits / seen
    # a row above a step counts in it; without it, both hits and rows are one less if it is a positive
    fewer_rows = _ratio(positives * hits, seen - 1)
    fewer_hits = _ratio(positives * (hits - 1), seen - 1)
    before, step = terms.cumsum() - terms, np.empty(len(order), dtype=int)
    step[order] = steps
    negative = (before + fewer_rows[::-1].cumsum()[::-1])[step] / total
    after = fewer_hits[::-1].cumsum()[::-1] - fewer_hits
    own = _ratio((positives - 1) * (hits - 1), seen - 1)
    positive = _ratio((before + own + after)[step], np.full(len(order), total - 1))
    return float(terms.sum() / total), np.where(true, positive, negative)


def best_thresholds(reference: Array, scores: Array, default: float) -> Array:
    """Threshold of each label with the best F1 on some rows, (labels,).

    Thresholds lie in the middle between two neighbouring scores; of equally good ones the nearest to `default` is
    taken. A label that no row has keeps the default, because nothing can be said of it.
    """
    found = np.full(scores.shape[1], default)
    for label in range(scores.shape[1]):
        true = reference[:, label].astype(bool)
        if not true.any():
            continue
        values, place = np.unique(scores[:, label], return_inverse=True)
        # everything at or above the k-th value is predicted
        hits = np.bincount(place, weights=true)[::-1].cumsum()[::-1]
        rows = np.bincount(place)[::-1].cumsum()[::-1]
        scored = 2 * hits / (rows + true.sum())
        middles = (np.concatenate([[0.0], values[:-1]]) + values) / 2
        best = np.flatnonzero(scored >= scored.max() - 1e-12)
        found[label] = middles[best[np.abs(middles[best] - default).argmin()]]
    return found


def _ratio(numerator: Array, denominator: Array) -> Array:
    return np.divide(numerator, denominator, out=np.zeros(np.shape(numerator)), where=denominator > 0)
