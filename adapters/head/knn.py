"""k nearest neighbours among stored features of the training rows.

The adapter holds features of training rows, so they are capped, counted and warned of.
"""

from __future__ import annotations

import logging

import numpy as np
from sklearn.neighbors import KNeighborsClassifier

from peft_lab.tuners.estimators import Array, ArrayClassifier, unit_rows

logger = logging.getLogger("peft_lab")

#: Least share of votes in a logarithm.
NO_VOTES = 1e-6


class KNN(ArrayClassifier):
    """scikit-learn's KNeighborsClassifier on at most `max_rows` rows.

    The score of a class is the logarithm of its share of the neighbours, at least 1e-6.

    Args:
        n_neighbors: neighbours that vote; all rows if there are fewer.
        metric: "cosine" or "euclidean".
        max_rows: most rows that are stored; of more, as many of each class as there is room for, drawn at random.
        random_state: seed of the draw.

    Raises:
        ValueError: an unknown metric.
    """

    def __init__(
        self, n_neighbors: int = 5, metric: str = "cosine", max_rows: int = 10_000, random_state: int = 0
    ) -> None:
        self.n_neighbors = n_neighbors
        self.metric = metric
        self.max_rows = max_rows
        self.random_state = random_state

    def fit(self, X: Array, y: Array) -> KNN:
        """Store features (rows, width)."""
        return self._store(*self._labelled(X, y))

    def partial_fit(self, X: Array, y: Array, classes: Array | None = None) -> KNN:
        """Store further rows, of known classes or new ones."""
        if not hasattr(self, "rows_"):
            return self.fit(X, y)
        X, y = self._labelled(X, y, reset=False)
        return self._store(np.concatenate([self.rows_, X]), np.concatenate([self.labels_, y]))

    def _store(self, X: Array, y: Array) -> KNN:
        if self.metric not in ("euclidean", "cosine"):
            raise ValueError(f'metric="{self.metric}" must be euclidean or cosine.')
        rows = X
        if self.metric == "cosine":
            rows = unit_rows(X)
        kept = self._kept(y)
        self.rows_, self.labels_ = rows[kept], y[kept]
        votes = KNeighborsClassifier(min(self.n_neighbors, len(kept)), algorithm="brute")
        self.votes_ = votes.fit(self.rows_, self.labels_)
        self.classes_ = self.votes_.classes_
        return self

    def _kept(self, y: Array) -> Array:
        """Indices of the rows to store, in order."""
        if len(y) <= self.max_rows:
            return np.arange(len(y))
        random = np.random.default_rng(self.random_state)
        # One row of each class after the other, as far as there is room, so that no class is lost.
        order = random.permutation(len(y))
        turns = np.empty(len(y), dtype=int)
        for label in np.unique(y):
            own = order[y[order] == label]
            turns[own] = np.arange(len(own))
        kept = order[np.argsort(turns[order], kind="stable")][: self.max_rows]
        logger.warning("%d of %d rows are stored, as many of each class as there is room for.", self.max_rows, len(y))
        return np.sort(kept)

    def class_scores(self, X: Array) -> Array:
        X = self._rows(X)
        shares = self.votes_.predict_proba(unit_rows(X) if self.metric == "cosine" else X)
        return np.log(np.maximum(shares, NO_VOTES))

    def predict_proba(self, X: Array) -> Array:
        """Shares of the neighbours (rows, classes)."""
        X = self._rows(X)
        return self.votes_.predict_proba(unit_rows(X) if self.metric == "cosine" else X)
