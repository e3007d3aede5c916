"""Gaussian anomaly detection: Mahalanobis distance by the formula, its components, and the rate of false alarms."""

from __future__ import annotations

import numpy as np
from scipy.spatial.distance import mahalanobis
from sklearn.covariance import LedoitWolf

from peft_lab.adapters.head.gaussian_anomaly import GaussianAnomaly

RANDOM = np.random.default_rng(0)
MIXING = RANDOM.standard_normal((6, 6))
NORMAL = RANDOM.standard_normal((4000, 6)) @ MIXING + 3


def test_with_all_components_it_is_the_mahalanobis_distance():
    estimator = GaussianAnomaly(components=1.0, holdout=0.0).fit(NORMAL)
    gaussian = LedoitWolf().fit(NORMAL)
    expected = [mahalanobis(x, gaussian.location_, gaussian.precision_) for x in NORMAL[:20]]
    assert np.allclose(-estimator.score_samples(NORMAL[:20]), expected)


def test_components_are_those_of_least_variance():
    variances, axes = np.linalg.eigh(LedoitWolf().fit(NORMAL).covariance_)
    estimator = GaussianAnomaly(components=0.5, holdout=0.0).fit(NORMAL)
    assert estimator.whitening_.shape == (3, 6)
    along_least = NORMAL.mean(0) + 5 * np.sqrt(variances[0]) * axes[:, 0]
    along_most = NORMAL.mean(0) + 5 * np.sqrt(variances[-1]) * axes[:, -1]
    assert list(estimator.predict([along_least, along_most])) == [-1, 1]
    assert np.allclose(estimator.score_samples([along_least]), -5, atol=1e-6)


def test_the_stated_share_of_normal_rows_is_called_anomalous():
    fresh = RANDOM.standard_normal((20_000, 6)) @ MIXING + 3
    for rate in (0.05, 0.2):
        estimator = GaussianAnomaly(false_positive_rate=rate).fit(NORMAL)
        assert abs((estimator.predict(fresh) == -1).mean() - rate) < 0.3 * rate
