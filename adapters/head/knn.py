"""k nearest neighbours among stored features of the training rows.

The adapter holds features of training rows, so they are capped, counted and warned of.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from peft_lab.errors import ConfigError
from peft_lab.tuners import MethodInfo
from peft_lab.tuners.estimators import (
    Array,
    ArrayClassifier,
    EstimatorConfig,
    EstimatorHead,
    register_head,
    unit_rows,
)

METHOD = MethodInfo(
    name="knn",
    title="k nearest neighbours",
    paper="",
    place="head",
    config="KNNConfig",
    roles=("head",),
    capabilities=("mixed_batch",),
    learning_rate=0.0,
    budget=(0.6, 0.1),
)

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


@dataclass
class KNNConfig(EstimatorConfig):
    """Configuration of k nearest neighbours. No gradient steps; saved: a feature and a label of each stored row.

    Who has the adapter has the features of its training rows, from which much of a row may be recovered.
    """

    n_neighbors: int = field(default=5, metadata={"range": (1, 1e6), "help": "Neighbours that vote.", "other": 1})
    metric: Literal["cosine", "euclidean"] = field(
        default="cosine", metadata={"help": "`cosine` or `euclidean`.", "other": "euclidean"}
    )
    max_rows: int = field(
        default=10_000,
        metadata={
            "range": (1, 1e7),
            "most": 10_000_000,
            "help": "Most rows that are stored, as many of each class as there is room for.",
            "other": 4,
        },
    )
    random_state: int = field(
        default=0, metadata={"range": (0, 2**32 - 1), "help": "Seed of the draw.", "other": 1, "with": {"max_rows": 5}}
    )
    stored_rows: int = field(
        default=0,
        metadata={
            "range": (0, 1e7),
            "most": 10_000_000,
            "help": "Filled in: rows whose features the adapter holds.",
            "untried": True,
        },
    )

    estimator_class = KNN


class KNNLayer(EstimatorHead):
    """Head with the stored rows (rows, width), scaled as the metric wants, and their classes, int64 (rows,)."""

    other_param_names = ("knn_rows", "knn_labels", "knn_counts")

    def initial_buffers(self, adapter: str, config: KNNConfig) -> dict[str, Tensor]:
        found = super().initial_buffers(adapter, config)
        found["knn_labels"] = found["knn_labels"].long()
        return found

    def shapes(self, config: KNNConfig) -> dict[str, tuple[int, ...]]:
        return {"rows": (config.stored_rows, self.feature_width(config)), "labels": (config.stored_rows,)}

    def arrays(self, estimator: KNN, config: KNNConfig) -> dict[str, Any]:
        config.stored_rows = len(estimator.rows_)
        return {"rows": estimator.rows_, "labels": estimator.labels_}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        # An adapter that is not fitted has no rows yet, and takes as many as there are.
        for name, config in self.configs.items():
            rows = state_dict.get(f"{prefix}knn_rows.{name}")
            if name in self.knn_rows and rows is not None and len(rows) != config.stored_rows:
                config.stored_rows = len(rows)
                self.knn_rows[name] = self.knn_rows[name].new_zeros(rows.shape)
                self.knn_labels[name] = self.knn_labels[name].new_zeros(len(rows))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def check_values(self, adapter: str, values: Mapping[str, Tensor]) -> None:
        labels = values.get("knn_labels")
        if (
            labels is not None
            and labels.numel()
            and not 0 <= int(labels.min()) <= int(labels.max()) < self.facts.classes
        ):
            raise ConfigError(
                f'The labels of adapter "{adapter}" must be from 0 to {self.facts.classes - 1}; its file is damaged or '
                "belongs to another task."
            )

    def scores(self, adapter: str, features: Tensor) -> Tensor:
        config = self.configs[adapter]
        rows, labels = self.value(adapter, "rows"), self.value(adapter, "labels")
        if config.metric == "cosine":
            features = torch.nn.functional.normalize(features, dim=-1)
        distances = (rows**2).sum(-1) - 2 * features @ rows.T
        nearest = distances.topk(min(config.n_neighbors, len(rows)), largest=False).indices
        votes = torch.nn.functional.one_hot(labels[nearest], self.facts.classes).to(features).mean(1)
        return votes.clamp(min=NO_VOTES).log()


register_head(METHOD, KNNConfig, KNNLayer)
