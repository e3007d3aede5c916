"""Scores of each class, confusion matrix, and agreement of predictions, by scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peft_lab.metrics.predictions import Predictions

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class ClassScore:
    """Scores of one class.

    Attributes:
        label: name of the class.
        precision, recall, f1: 0 where a class is never predicted, or has no row.
        support: rows of the class.
    """

    label: str
    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class Agreement:
    """Agreement of two models on the same rows.

    Attributes:
        share: share of rows with the same answer.
        kappa: Cohen's kappa, which is 0 where they agree as often as by chance; None if both give one answer alone.
    """

    share: float
    kappa: float | None


def class_scores(predictions: Predictions, labels: Sequence[str]) -> list[ClassScore] | None:
    """Precision, recall, F1 and support of each class.

    Args:
        predictions: of any kind of task.
        labels: names of the classes, by index.

    Returns:
        None where a row has no single class, or an index has no name.
    """
    from sklearn.metrics import precision_recall_fscore_support

    pair = _named_classes(predictions, labels)
    if pair is None:
        return None
    indices = list(range(len(labels)))
    columns = precision_recall_fscore_support(*pair, labels=indices, zero_division=0)
    found = []
    for label, precision, recall, f1, support in zip(labels, *columns, strict=True):
        found.append(ClassScore(label, float(precision), float(recall), float(f1), int(support)))
    return found


def confusion(predictions: Predictions, labels: Sequence[str]) -> np.ndarray | None:
    """Confusion matrix: rows are references and columns predictions, int64 (classes, classes).

    None as for `class_scores`.
    """
    from sklearn.metrics import confusion_matrix

    pair = _named_classes(predictions, labels)
    return None if pair is None else confusion_matrix(*pair, labels=list(range(len(labels))))


def _named_classes(predictions: Predictions, labels: Sequence[str]) -> tuple[np.ndarray, np.ndarray] | None:
    pair = predictions.classes
    if pair is None or not labels or max(part.max() for part in pair) >= len(labels):
        return None
    return pair


def agreement(first: Predictions, second: Predictions) -> Agreement | None:
    """Agreement of two models: of their classes, else of which rows they get right.

    Returns:
        None if neither is known of both, or the rows are not the same ones.
    """
    from sklearn.metrics import cohen_kappa_score

    a, b = _answers(first), _answers(second)
    if a is None or b is None or len(a) != len(b) or first.output_type != second.output_type:
        return None
    # kappa of one answer alone is 0 / 0
    constant = a.min() == a.max() == b.min() == b.max()
    return Agreement(float((a == b).mean()), None if constant else float(cohen_kappa_score(a, b)))


def _answers(predictions: Predictions) -> np.ndarray | None:
    if predictions.classes is not None:
        return predictions.classes[1]
    return None if predictions.correct is None or not len(predictions) else predictions.correct > 0


def wrong_in_all(predictions: Sequence[Predictions]) -> np.ndarray | None:
    """Numbers of the rows that no model gets right, those that the models are most sure of first.

    Args:
        predictions: of several models on the same rows.

    Returns:
        Row numbers from 0 on, (m,); None if it is not known which rows are right, or the rows differ in number.
    """
    import numpy as np

    correct = [each.correct for each in predictions]
    known = [values for values in correct if values is not None]
    if not known or len(known) < len(correct) or len({len(values) for values in known}) > 1:
        return None
    rows = np.flatnonzero(~np.stack(known).any(0))
    sure = [each.columns["confidence"] for each in predictions if "confidence" in each.columns]
    if len(sure) == len(predictions):
        rows = rows[np.argsort(-np.mean(sure, 0)[rows], kind="stable")]
    return rows
