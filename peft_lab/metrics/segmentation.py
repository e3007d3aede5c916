"""Metrics of semantic segmentation, from counts of pixels. Imports numpy alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

Array = np.ndarray

#: Value of the pixels of a mask that do not count.
IGNORED = 255


def pixel_counts(predictions: ArrayLike, references: ArrayLike, classes: int) -> Array:
    """Pixels of each class in one mask: right, predicted and labelled ones, int64 (3, classes).

    Args:
        predictions: predicted classes, any shape.
        references: true ones of the same shape; `IGNORED` does not count.
        classes: their number.
    """
    found, wanted = np.asarray(predictions).reshape(-1), np.asarray(references).reshape(-1)
    counted = wanted != IGNORED
    found, wanted = found[counted].astype(np.int64), wanted[counted].astype(np.int64)
    parts = (found[found == wanted], found, wanted)
    return np.stack([np.bincount(part, minlength=classes) for part in parts])


def class_iou(counts: Array) -> Array:
    """Intersection over union of each class, (classes,), from counts of all pixels (3, classes).

    It is NaN for a class that is neither predicted nor labelled.
    """
    right, found, wanted = counts.astype(np.float64)
    union = found + wanted - right
    return np.divide(right, union, out=np.full(len(union), np.nan), where=union > 0)


def mean_iou(predictions: Sequence[ArrayLike], references: Sequence[ArrayLike]) -> float:
    """Mean intersection over union of the classes, over the pixels of all masks.

    Classes that occur nowhere are left out. Masks hold class indices, and `IGNORED` where a pixel does not count.
    """
    return mean_iou_of(_counts(predictions, references))


def pixel_accuracy(predictions: Sequence[ArrayLike], references: Sequence[ArrayLike]) -> float:
    """Share of right pixels in all masks; those that are `IGNORED` in the reference do not count."""
    return pixel_accuracy_of(_counts(predictions, references))


def mean_iou_of(counts: Array) -> float:
    """Mean intersection over union from counts of all pixels, (3, classes)."""
    return float(np.nanmean(class_iou(counts)))


def pixel_accuracy_of(counts: Array) -> float:
    """Share of right pixels from counts of all pixels, (3, classes)."""
    return float(counts[0].sum() / counts[2].sum())


def mean_iou_by_row(counts: Array) -> Array:
    """Value of the mean intersection over union for each mask, (n,), from counts (n, 3, classes).

    Their mean is the metric over all masks, and their spread that of the infinitesimal jackknife (Efron and
    Stein 1981): the metric is a function of sums over masks, and a mask counts by its derivative there. The values of
    many classes need one column so.
    """
    total = counts.sum(0)
    iou, (right, found, wanted) = class_iou(total), total.astype(np.float64)
    union = found + wanted - right
    there = union > 0
    own_union = counts[:, 1] + counts[:, 2] - counts[:, 0]
    # derivative of right / union, along the mask's own counts
    change = (counts[:, 0, there] - iou[there] * own_union[:, there]) / union[there]
    return iou[there].mean() + len(counts) * change.mean(1)


def _counts(predictions: Sequence[ArrayLike], references: Sequence[ArrayLike]) -> Array:
    pairs = [(np.asarray(found), np.asarray(wanted)) for found, wanted in zip(predictions, references, strict=True)]
    classes = 1
    for found, wanted in pairs:
        labelled = wanted[wanted != IGNORED]
        classes = max(classes, int(found.max()) + 1, int(labelled.max(initial=0)) + 1)
    return np.sum([pixel_counts(found, wanted, classes) for found, wanted in pairs], axis=0)
