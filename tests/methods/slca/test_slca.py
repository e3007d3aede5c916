"""SLCA: what is drawn, the normalised loss, and that alignment mends a biased head."""

from __future__ import annotations

import numpy as np
import torch

from peft_lab.adapters.head.slca import SLCA

RANDOM = np.random.default_rng(0)
MEANS = 2 * RANDOM.standard_normal((4, 5))
Y = np.arange(400) % 4
X = MEANS[Y] + RANDOM.standard_normal((400, 5))


def two_tasks(**fields):
    first, second = Y < 2, Y >= 2
    return SLCA(**fields).fit(X[first], Y[first]).partial_fit(X[second], Y[second])


def test_rows_are_drawn_around_shrunk_means_with_the_classes_covariances():
    estimator = two_tasks(samples_per_class=20_000, epochs=0)
    rows, classes = estimator.draw(np.random.default_rng(1))
    scaled = (X - estimator.center_) * estimator.scale_
    for label, factor in ((0, 0.95), (1, 0.95), (2, 1.0), (3, 1.0)):
        own, drawn = scaled[label == Y], rows[classes == label].numpy()
        assert np.allclose(drawn.mean(0), factor * own.mean(0), atol=0.05)
        assert np.allclose(np.cov(drawn.T), np.cov(own.T) + 1e-4 * np.eye(5), atol=0.1)


def test_logits_are_divided_by_the_mean_norm_of_the_tasks():
    estimator = two_tasks(epochs=0)
    logits = torch.randn(3, 4)
    norms = (logits[:, :2].norm(dim=1) + logits[:, 2:].norm(dim=1)) / 2
    torch.testing.assert_close(estimator._normalised(logits), logits / norms[:, None] / 0.1)


def test_alignment_raises_the_accuracy_over_tasks():
    assert two_tasks().score(X, Y) > two_tasks(epochs=0).score(X, Y) + 0.05
    assert np.array_equal(two_tasks().coef_, two_tasks().coef_)
