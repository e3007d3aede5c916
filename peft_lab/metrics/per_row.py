"""Jackknife values of metrics, one for each test row.

Their variance is that of the metric over test rows.

The jackknife computes the metric anew without each row in turn. It gives the spread that a bootstrap over the rows
gives (a test compares them), without a second source of chance, and one number for each run and row, so that a
difference between two methods can be taken row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from peft_lab.metrics import bleu
from peft_lab.metrics.calibration import BINS, bins_of
from peft_lab.metrics.entities import ENTITY_SCORES
from peft_lab.metrics.predictions import Predictions

Array = np.ndarray

#: Least and greatest value of the metrics that have one; an interval is cut there.
BOUNDS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("accuracy", "exact_match", "rouge_l", "coverage", "token_accuracy", "f1", "ece"), (0.0, 1.0)),
    **dict.fromkeys(("f1_micro", "f1_macro", "map"), (0.0, 1.0)),
    **dict.fromkeys(("matthews_correlation", "pearsonr", "spearmanr"), (-1.0, 1.0)),
    **dict.fromkeys(ENTITY_SCORES, (0.0, 1.0)),
    **dict.fromkeys(("mean_iou", "pixel_accuracy"), (0.0, 1.0)),
    "perplexity": (1.0, np.inf),
    **dict.fromkeys(("mae", "rmse"), (0.0, np.inf)),
    "r2": (-np.inf, 1.0),
    "bleu": (0.0, 100.0),
}

#: Metrics that are the share of correct rows.
SHARES = frozenset({"accuracy", "exact_match"})

#: Rows held at once while ranks are taken anew.
_CHUNK = 256


def jackknife_values(metric: str, predictions: Predictions, labels: int | None = None) -> tuple[float, Array] | None:
    """Metric over all rows, and its jackknife values, (n,).

    Their mean is the metric up to a bias of order 1/n.

    Args:
        metric: name of one of our metrics.
        predictions: predictions for each row.
        labels: number of classes, which decides between binary and macro F1.

    Returns:
        None if the metric cannot be computed from such predictions.
    """
    count = len(predictions)
    # the mean of a value for each row is its own jackknife
    values = predictions.correct if metric in SHARES else predictions.columns.get(metric)
    if values is not None:
        return (float(values.mean()), values) if count else None
    if metric in SHARES:
        return None
    try:
        all_rows, without_each = _leave_one_out(metric, predictions.columns, labels)
    except KeyError:  # another metric, or predictions of another type
        return None
    # pseudo-values: for a mean they would be the values of the rows themselves
    return all_rows, count * all_rows - (count - 1) * without_each


def written_metrics(columns: Mapping[str, Sequence[float] | Array]) -> dict[str, float]:
    """Metrics of what a model writes, from their columns with a number for each row.

    A column is a metric of its own, whose mean over the rows counts, except for the counts of BLEU.
    """
    found = {name: float(np.mean(values)) for name, values in columns.items() if name not in bleu.COLUMNS}
    if bleu.COLUMNS[0] in columns:
        counts = np.stack([np.asarray(columns[name]) for name in bleu.COLUMNS], axis=1)
        found["bleu"] = float(bleu.bleu_of_counts(counts.sum(0, keepdims=True))[0])
    return found


def _leave_one_out(metric: str, columns: dict[str, Array], labels: int | None) -> tuple[float, Array]:
    """Metric over all rows, and without each row in turn, (n,)."""
    if metric == "spearmanr":
        return _spearman_without_each(columns["reference"], columns["prediction"])
    without = columns.get(f"{metric}_without_row")
    if without is not None:
        # computed when there were scores of each label, which are not kept
        return float(columns[f"{metric}_all_rows"][0]), without
    # functions of sums over rows: the sums without a row are the total less that row
    moments, function = _MOMENTS[metric](columns, labels)
    total = moments.sum(0, keepdims=True)
    return float(function(total)[0]), function(total - moments)


def _f1(columns: dict[str, Array], labels: int | None) -> tuple[Array, Callable[[Array], Array]]:
    reference, prediction, classes = _one_hot(columns, labels)
    if classes == 2:  # F1 of class 1, as `compute_metrics` of the kinds of classification takes it
        reference, prediction = reference[:, 1:], prediction[:, 1:]

    def f1(sums: Array) -> Array:
        hits, found, true = np.split(sums, 3, axis=1)
        # a class that occurs nowhere counts as 0, as in our metric
        return _ratio(2 * hits, found + true).mean(1)

    return np.concatenate([reference * prediction, prediction, reference], axis=1), f1


def _f1_micro(columns: dict[str, Array], labels: int | None) -> tuple[Array, Callable[[Array], Array]]:
    moments = np.stack([columns["hits"], columns["found"], columns["true"]], axis=1)
    return moments, lambda sums: _ratio(2 * sums[:, 0], sums[:, 1] + sums[:, 2])


def _matthews(columns: dict[str, Array], labels: int | None) -> tuple[Array, Callable[[Array], Array]]:
    reference, prediction, _ = _one_hot(columns, labels)
    hits = (reference * prediction).sum(1, keepdims=True)

    def matthews(sums: Array) -> Array:
        right, (found, true) = sums[:, 0], np.split(sums[:, 1:], 2, axis=1)
        count = true.sum(1)
        # the form for many classes (Gorodkin 2004), which scikit-learn computes too
        squares = (count**2 - (found**2).sum(1)) * (count**2 - (true**2).sum(1))
        return _ratio(right * count - (found * true).sum(1), np.sqrt(squares))

    return np.concatenate([hits, prediction, reference], axis=1), matthews


def _one_hot(columns: dict[str, Array], labels: int | None) -> tuple[Array, Array, int]:
    reference, prediction = columns["reference"].astype(int), columns["prediction"].astype(int)
    classes = max(labels or 0, int(reference.max()) + 1, int(prediction.max()) + 1)
    eye = np.eye(classes)
    return eye[reference], eye[prediction], classes


def _pearson(columns: dict[str, Array], labels: int | None) -> tuple[Array, Callable[[Array], Array]]:
    # centred, because sums of squares of large values would cancel in the variance
    x, y = (columns[name] - columns[name].mean() for name in ("reference", "prediction"))
    return np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1), _correlation


def _mae(columns: dict[str, Array], labels: int | None) -> tuple[Array, Callable[[Array], Array]]:
    errors = np.abs(columns["prediction"] - columns["reference"])
    return np.stack([np.ones_like(errors), errors], axis=1), lambda sums: _ratio(sums[:, 1], sums[:, 0])


def _rmse(columns: dict[str, Array], labels: int | None) -> tuple[Array, Callable[[Array], Array]]:
    squares = (columns["prediction"] - columns["reference"]) ** 2
    return np.stack([np.ones_like(squares), squares], axis=1), lambda sums: np.sqrt(_ratio(sums[:, 1], sums[:, 0]))


def _r2(columns: dict[str, Array], labels: int | None) -> tuple[Array, Callable[[Array], Array]]:
    # centred, because sums of squares of large values would cancel in the variance
    y = columns["reference"] - columns["reference"].mean()
    squares = (columns["prediction"] - columns["reference"]) ** 2

    def r2(sums: Array) -> Array:
        count, total, squared, errors = sums.T
        # rounding may leave a tiny negative number
        spread = np.maximum(squared - _ratio(total * total, count), 0)
        # constant references, as in our metric
        return np.where(spread > 0, 1 - _ratio(errors, spread), (errors == 0).astype(float))

    return np.stack([np.ones_like(y), y, y * y, squares], axis=1), r2


def _correlation(sums: Array) -> Array:
    """Correlations (m,) from sums (m, 6): 1, x, y, xx, yy, xy.

    0 where one side is constant, as in our metrics.
    """
    count, x, y, xx, yy, xy = sums.T
    # rounding may leave a tiny negative number, which has no root
    spread = np.maximum(count * xx - x * x, 0) * np.maximum(count * yy - y * y, 0)
    return _ratio(count * xy - x * y, np.sqrt(spread))


def _spearman_without_each(x: Array, y: Array) -> tuple[float, Array]:
    from scipy.stats import rankdata

    rank_x, rank_y, count = rankdata(x), rankdata(y), len(x)

    def correlation(rx: Array, ry: Array, left_out: Array | None) -> Array:
        keep = np.ones_like(rx)
        if left_out is not None:
            keep[np.arange(len(left_out)), left_out] = 0
        moments = [keep, rx * keep, ry * keep, rx * rx * keep, ry * ry * keep, rx * ry * keep]
        return _correlation(np.stack([moment.sum(1) for moment in moments], axis=1))

    found = []
    # by chunks, because the ranks without each row are a matrix (n, n)
    for start in range(0, count, _CHUNK):
        rows = np.arange(start, min(start + _CHUNK, count))
        # without a row, the ranks above it fall by 1 and those that tie with it by 1/2
        rx = rank_x - (x[rows, None] < x) - 0.5 * (x[rows, None] == x) - (count - 1) / 2
        ry = rank_y - (y[rows, None] < y) - 0.5 * (y[rows, None] == y) - (count - 1) / 2
        found.append(correlation(rx, ry, rows))
    return float(correlation(rank_x[None], rank_y[None], None)[0]), np.concatenate(found)


def _perplexity(columns: dict[str, Array], labels: int | None) -> tuple[Array, Callable[[Array], Array]]:
    return np.stack([columns["loss"], columns["tokens"]], axis=1), lambda sums: np.exp(_ratio(sums[:, 0], sums[:, 1]))


def _token_accuracy(columns: dict[str, Array], labels: int | None) -> tuple[Array, Callable[[Array], Array]]:
    return np.stack([columns["hits"], columns["tokens"]], axis=1), lambda sums: _ratio(sums[:, 0], sums[:, 1])


def _bleu(columns: dict[str, Array], labels: int | None) -> tuple[Array, Callable[[Array], Array]]:
    return np.stack([columns[name] for name in bleu.COLUMNS], axis=1), bleu.bleu_of_counts


def _pixel_accuracy(columns: dict[str, Array], labels: int | None) -> tuple[Array, Callable[[Array], Array]]:
    return np.stack([columns["hits"], columns["pixels"]], axis=1), lambda sums: _ratio(sums[:, 0], sums[:, 1])


def _ece(columns: dict[str, Array], labels: int | None) -> tuple[Array, Callable[[Array], Array]]:
    gaps = (columns["reference"] == columns["prediction"]) - columns["confidence"]
    moments = np.zeros((len(gaps), 1 + BINS))
    moments[:, 0] = 1
    moments[np.arange(len(gaps)), 1 + bins_of(columns["confidence"])] = gaps
    return moments, lambda sums: _ratio(np.abs(sums[:, 1:]).sum(1), sums[:, 0])


def _entities(columns: dict[str, Array]) -> Array:
    return np.stack([columns[name] for name in ("true_entities", "predicted_entities", "correct_entities")], axis=1)


def _entity_f1(columns: dict[str, Array], labels: int | None) -> tuple[Array, Callable[[Array], Array]]:
    return _entities(columns), lambda sums: _ratio(2 * sums[:, 2], sums[:, 0] + sums[:, 1])


def _entity_precision(columns: dict[str, Array], labels: int | None) -> tuple[Array, Callable[[Array], Array]]:
    return _entities(columns), lambda sums: _ratio(sums[:, 2], sums[:, 1])


def _entity_recall(columns: dict[str, Array], labels: int | None) -> tuple[Array, Callable[[Array], Array]]:
    return _entities(columns), lambda sums: _ratio(sums[:, 2], sums[:, 0])


_MOMENTS = {
    "bleu": _bleu,
    "ece": _ece,
    "f1": _f1,
    "f1_micro": _f1_micro,
    "mae": _mae,
    "matthews_correlation": _matthews,
    "pearsonr": _pearson,
    "perplexity": _perplexity,
    "pixel_accuracy": _pixel_accuracy,
    "r2": _r2,
    "rmse": _rmse,
    "seqeval_f1": _entity_f1,
    "seqeval_precision": _entity_precision,
    "seqeval_recall": _entity_recall,
    "token_accuracy": _token_accuracy,
}


def _ratio(numerator: Array, denominator: Array) -> Array:
    return np.divide(numerator, denominator, out=np.zeros_like(numerator, dtype=float), where=denominator > 0)
