"""GDA: shrinkage and scores by the formulas, rows without labels, text weights, unequal classes."""

from __future__ import annotations

import numpy as np
import pytest

from peft_lab.adapters.head.gda import GDA

RANDOM = np.random.default_rng(0)
MEANS = RANDOM.standard_normal((3, 8))
Y = np.array([0] * 40 + [1] * 20 + [2] * 8)
X = 3 * MEANS[Y] + RANDOM.standard_normal((68, 8))


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def expected(covariance: np.ndarray, log_prior: np.ndarray) -> np.ndarray:
    f = unit(X)
    means = np.stack([f[label == Y].mean(0) for label in range(3)])
    inverse = 8 * np.linalg.pinv((len(f) - 1) * covariance + np.trace(covariance) * np.eye(8))
    scores = [f @ inverse @ mean - mean @ inverse @ mean / 2 for mean in means]
    return np.stack(scores, 1) + 8 / 67 * log_prior


def test_scores_are_those_of_the_shrunk_pooled_covariance():
    f = unit(X)
    centred = f - np.stack([f[label == Y].mean(0) for label in range(3)])[Y]
    reference = expected(np.cov(centred.T), np.full(3, np.log(1 / 3)))
    assert np.allclose(GDA().fit(X, Y).class_scores(X), reference)


def test_small_classes_weigh_as_much_and_priors_follow_the_rows():
    f = unit(X)
    each = [np.cov(f[label == Y].T) for label in range(3)]
    reference = expected(sum(each) / 3, np.log([40 / 68, 20 / 68, 8 / 68]))
    assert np.allclose(GDA("class_mean", "empirical").fit(X, Y).class_scores(X), reference)


def test_text_weights_are_added():
    text = unit(RANDOM.standard_normal((3, 8)))
    both = GDA(alpha=0.1, text_weights=text).fit(X, Y).class_scores(X)
    assert np.allclose(both, 100 * unit(X) @ text.T + 0.1 * GDA().fit(X, Y).class_scores(X))
    with pytest.raises(ValueError, match="shape"):
        GDA(text_weights=text[:2]).fit(X, Y)


def test_rows_without_labels_help_where_few_have_one():
    noisy = X + 1.5 * np.random.default_rng(1).standard_normal(X.shape)
    few = np.array([0, 40, 60])
    alone = GDA().fit(noisy[few], Y[few]).score(noisy, Y)
    helped = GDA().fit(noisy[few], Y[few], noisy).score(noisy, Y)
    assert helped > alone + 0.05


def test_text_weights_alone_give_the_classes_of_rows_without_labels():
    estimator = GDA(alpha=10.0, text_weights=unit(MEANS + 0.3 * RANDOM.standard_normal((3, 8)))).fit_unlabelled(X)
    assert estimator.score(X, Y) > 0.9
    with pytest.raises(ValueError, match="text_weights"):
        GDA().fit_unlabelled(X)


def test_one_row_for_each_class_is_the_nearest_mean():
    estimator = GDA().fit(X[[0, 40, 60]], Y[[0, 40, 60]])
    assert list(estimator.predict(X[[0, 40, 60]])) == [0, 1, 2]
