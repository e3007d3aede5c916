"""Naive Bayes: the formula with one variance for all classes, and the incremental update far off zero."""

from __future__ import annotations

import numpy as np

from peft_lab.adapters.head.naive_bayes import NaiveBayes

RANDOM = np.random.default_rng(0)
Y = RANDOM.integers(0, 3, 90)
X = RANDOM.standard_normal((90, 5)) * [0.1, 1, 2, 3, 4] + Y[:, None] + 1e4


def test_score_is_log_prior_less_half_the_squared_distance_over_the_variance():
    estimator = NaiveBayes(var_smoothing=0.0).fit(X, Y)
    means = np.stack([X[label == Y].mean(0) for label in range(3)])
    var = ((X - means[Y]) ** 2).mean(0)
    for label in range(3):
        expected = np.log((label == Y).mean()) - ((X - means[label]) ** 2 / var).sum(1) / 2
        assert np.allclose(estimator.class_scores(X)[:, label], expected)


def test_updates_row_by_row_are_exact():
    once, parts = NaiveBayes().fit(X, Y), NaiveBayes()
    for row in range(len(X)):
        parts.partial_fit(X[row : row + 1], Y[row : row + 1])
    for name in ("means_", "var_", "counts_"):
        assert np.allclose(getattr(parts, name), getattr(once, name), rtol=1e-9)
