"""TEEN: calibrated prototypes by the formula, and the nearest mean without new classes."""

from __future__ import annotations

import numpy as np
import pytest

from peft_lab.adapters.head.nearest_mean import NearestMean
from peft_lab.adapters.head.teen import TEEN

X = np.random.default_rng(0).standard_normal((80, 6)) + 1
Y = np.arange(80) % 4


def norm(x):
    return x / np.linalg.norm(x)


@pytest.mark.parametrize("one_call", [True, False])
def test_new_prototypes_are_moved_to_similar_base_classes(one_call):
    if one_call:
        estimator = TEEN(alpha=0.3, base_classes=2).fit(X, Y)
    else:
        estimator = TEEN(alpha=0.3).fit(X[Y < 2], Y[Y < 2]).partial_fit(X[Y >= 2], Y[Y >= 2])
    base = [norm(X[label == Y].mean(0)) for label in range(2)]
    for label in (2, 3):
        new = norm(X[label == Y].mean(0))
        weights = np.exp([16 * new @ b for b in base])
        similar = norm(sum(w * b for w, b in zip(weights / weights.sum(), base, strict=True)))
        prototype = norm(0.7 * new + 0.3 * similar)
        assert np.allclose(estimator.class_scores(X)[:, label], [16 * norm(x) @ prototype for x in X])


def test_without_new_classes_it_is_the_nearest_mean():
    assert np.allclose(TEEN().fit(X, Y).class_scores(X), NearestMean(metric="cosine").fit(X, Y).class_scores(X))
