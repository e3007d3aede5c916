"""Nearest class mean: the formula, and scikit-learn's own."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.neighbors import NearestCentroid

from peft_lab.adapters.head.nearest_mean import NearestMean

X = np.random.default_rng(0).standard_normal((60, 5)) + 10
Y = np.arange(60) % 3


def test_scores_are_half_squared_distances_and_predictions_those_of_scikit_learn():
    estimator = NearestMean().fit(X, Y)
    for label in range(3):
        mean = X[label == Y].mean(0)
        assert np.allclose(estimator.class_scores(X)[:, label], [-((x - mean) ** 2).sum() / 2 for x in X])
    assert np.array_equal(estimator.predict(X), NearestCentroid().fit(X, Y).predict(X))


def test_cosine_compares_directions():
    estimator = NearestMean(metric="cosine", temperature=4.0).fit(X, Y)
    mean = X[Y == 1].mean(0)
    expected = [4 * x @ mean / np.linalg.norm(x) / np.linalg.norm(mean) for x in X]
    assert np.allclose(estimator.class_scores(X)[:, 1], expected)


def test_an_unknown_metric_is_an_error():
    with pytest.raises(ValueError, match="manhattan"):
        NearestMean(metric="manhattan").fit(X, Y)
