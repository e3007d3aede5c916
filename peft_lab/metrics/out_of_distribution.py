"""Scores that tell rows of a task from others, and how well they do.

A score is high for rows like those of the training. Arrays are float (n, ...) of numpy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = Any

#: Nearest neighbour whose distance counts; 50 in the paper for 5,000 rows of each class, fewer rows being drawn here.
NEIGHBOUR = 10
#: Share of the task's own rows that is accepted where false positives are counted.
ACCEPTED = 0.95

#: Score -> its name in tables.
SCORES = {"knn": "kNN distance", "mahalanobis": "Mahalanobis", "energy": "energy", "msp": "maximum softmax"}


@dataclass(frozen=True)
class HeadOutputs:
    """Features and logits of rows.

    Attributes:
        features: inputs of the task head (n, width).
        logits: (n, classes).
        labels: classes (n,), whole numbers; those of other tasks mean nothing here.
    """

    features: Array
    logits: Array
    labels: Array


def knn_score(train: Array, features: Array, neighbour: int = NEIGHBOUR) -> Array:
    """Negative distance to the k-th nearest training row, features being divided by their norms (n,).

    Source: Sun et al. 2022, arXiv 2204.06507.
    """
    from sklearn.neighbors import NearestNeighbors
    from sklearn.preprocessing import normalize

    nearest = NearestNeighbors(n_neighbors=min(neighbour, len(train))).fit(normalize(train))
    distances, _ = nearest.kneighbors(normalize(features))
    return -distances[:, -1]


def mahalanobis_score(train: Array, labels: Array, features: Array) -> Array:
    """Negative squared Mahalanobis distance to the nearest class mean, with one covariance for all classes (n,).

    Source: Lee et al. 2018, arXiv 1807.03888. The covariance is shrunk by Ledoit and Wolf's rule, because there may be
    fewer rows than features; the paper has many rows and does not.
    """
    from sklearn.covariance import LedoitWolf

    classes, places = np.unique(labels, return_inverse=True)
    means = np.stack([train[labels == label].mean(0) for label in classes])
    covariance = LedoitWolf(assume_centered=True).fit(train - means[places])
    distances = []
    for mean in means:
        distances.append(covariance.mahalanobis(features - mean))
    return -np.min(distances, axis=0)


def energy_score(logits: Array) -> Array:
    """Negative free energy at temperature 1, the logarithm of the sum of exp(logits) (n,).

    Source: Liu et al. 2020, arXiv 2010.03759.
    """
    from scipy.special import logsumexp

    return logsumexp(logits, axis=1)


def maximum_softmax(logits: Array) -> Array:
    """Largest class probability (n,). Source: Hendrycks and Gimpel 2017, arXiv 1610.02136."""
    from scipy.special import softmax

    return softmax(logits, axis=1).max(1)


def all_scores(train: HeadOutputs, rows: HeadOutputs) -> dict[str, Array]:
    """All scores of rows, by name as in `SCORES`, float64 (n,).

    Args:
        train: outputs of training rows, with their classes.
        rows: outputs of the rows that are scored.
    """
    return {
        "knn": knn_score(train.features, rows.features),
        "mahalanobis": mahalanobis_score(train.features, train.labels, rows.features),
        "energy": energy_score(rows.logits),
        "msp": maximum_softmax(rows.logits),
    }


def auroc(own: Array, other: Array) -> float:
    """Area under the ROC curve: share of pairs in which the task's own row has the higher score, ties by half."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(_is_own(own, other), np.concatenate([own, other])))


def false_positive_rate(own: Array, other: Array, accepted: float = ACCEPTED) -> float:
    """Share of other rows that is accepted at the highest threshold that accepts this share of the task's own."""
    from sklearn.metrics import roc_curve

    # the curve keeps every threshold, because the rate is read at one of them
    false, true, _ = roc_curve(_is_own(own, other), np.concatenate([own, other]), drop_intermediate=False)
    return float(false[np.argmax(true >= accepted)])


def _is_own(own: Array, other: Array) -> Array:
    return np.concatenate([np.ones(len(own)), np.zeros(len(other))])
