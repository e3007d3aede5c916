"""What the tests of incremental protocols share: rows in memory, and estimators in scikit-learn's manner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.neighbors import NearestCentroid

from peft_lab.protocols.incremental import Part


class FeatureRows:
    """Stand-in of a data set whose rows are their features."""

    def __init__(self, features: Any, labels: Any) -> None:
        self.values, self.labels = features, labels

    def __getitem__(self, name: str) -> Any:
        return self.labels


class FeatureLearner:
    """Learner of rows that are their own features, by an estimator with `partial_fit`."""

    def __init__(self, estimator: Any) -> None:
        self.estimator = estimator
        self.given: list[tuple[list[int], list[int]]] = []

    def learn(self, rows: Any, places: Any, seen: Sequence[int]) -> None:
        self.given.append((list(places), list(seen)))
        labels = rows.labels[places]
        self.estimator.partial_fit(rows.values[places], labels, classes=np.asarray(sorted(seen)))

    def predict(self, rows: Any, places: Any, seen: Sequence[int]) -> Any:
        return self.estimator.predict(rows.values[places])


class CentroidEstimator(ClassifierMixin, BaseEstimator):
    """Nearest centroid that keeps the means of the classes it has seen."""

    def __init__(self) -> None:
        self.means: dict[int, Any] = {}

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> CentroidEstimator:
        for label in np.unique(y):
            self.means[int(label)] = X[y == label].mean(0)
        return self

    def predict(self, X: Any) -> Any:
        labels = np.asarray(sorted(self.means))
        if len(labels) == 1:
            return np.full(len(X), labels[0])
        return NearestCentroid().fit(np.stack([self.means[label] for label in labels]), labels).predict(X)


def blobs(classes: int, each: int, seed: int = 0, spread: float = 0.5) -> Part:
    """Rows around a centre for each class; their groups are the classes."""
    draw = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), each)
    centres = 3 * np.random.default_rng(99).normal(size=(classes, 4))
    features = centres[labels] + spread * draw.normal(size=(len(labels), 4))
    return Part(FeatureRows(features, labels), labels, labels)
