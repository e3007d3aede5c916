"""Gaussian anomaly detection: distance of a row's feature from one Gaussian of normal rows.

Source: Rippel, Mertens and Merhof 2021, Modeling the Distribution of Normal Data in Pre-Trained Deep Features for
Anomaly Detection, arXiv:2005.14140. Written from the equations.

Readings: the distance is taken in the principal components of least variance, which the paper calls negated principal
component analysis. The paper draws its threshold from a chi-squared distribution; here it is the quantile of the
distances of held-out normal rows, because features are not Gaussian.
"""

from __future__ import annotations

import numpy as np
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.covariance import LedoitWolf
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from peft_lab.tuners.estimators import Array


class GaussianAnomaly(OutlierMixin, BaseEstimator):
    """Mahalanobis distance in principal components of least variance.

    Args:
        components: share of the principal components that is kept, those of least variance; more than 0 to 1.
        false_positive_rate: share of normal rows that may be called anomalous.
        holdout: share of the rows that the threshold is taken from, and not the Gaussian; 0 takes all for both.
        random_state: seed of the choice of these rows.

    Attributes:
        location_: (width,) mean of the normal rows.
        whitening_: (components, width), so that the distance is |whitening (x - location)|.
        threshold_: distance beyond which a row is anomalous.
    """

    def __init__(
        self,
        components: float = 0.5,
        false_positive_rate: float = 0.05,
        holdout: float = 0.25,
        random_state: int = 0,
    ) -> None:
        self.components = components
        self.false_positive_rate = false_positive_rate
        self.holdout = holdout
        self.random_state = random_state

    def fit(self, X: Array, y: Array | None = None) -> GaussianAnomaly:
        """Fit to features (rows, width) of normal rows; `y` is ignored.

        Raises:
            ValueError: a share is out of range, or there are fewer than two rows.
        """
        X = validate_data(self, X, dtype=np.float64, ensure_min_samples=2)
        if not 0 < self.components <= 1 or not 0 <= self.holdout < 1 or not 0 < self.false_positive_rate < 1:
            raise ValueError("components, holdout and false_positive_rate are shares of one.")
        order = check_random_state(self.random_state).permutation(len(X))
        # The Gaussian needs two rows, whatever is held out.
        held_out = min(int(self.holdout * len(X)), len(X) - 2)
        fitted, judged = X[order[held_out:]], X[order[:held_out] if held_out else order]
        gaussian = LedoitWolf().fit(fitted)
        variances, axes = np.linalg.eigh(gaussian.covariance_)
        kept = max(round(self.components * len(variances)), 1)
        # Shrinkage keeps variances off zero unless all rows are the same.
        deviations = np.sqrt(np.maximum(variances[:kept], np.finfo(float).eps * max(variances[-1], 1.0)))
        self.location_ = gaussian.location_
        self.whitening_ = (axes[:, :kept] / deviations).T
        self.threshold_ = float(np.quantile(self._distances(judged), 1 - self.false_positive_rate, method="higher"))
        self.offset_ = -self.threshold_
        return self

    def _distances(self, X: Array) -> Array:
        return np.linalg.norm((X - self.location_) @ self.whitening_.T, axis=1)

    def score_samples(self, X: Array) -> Array:
        """Negative distances (rows,), as scikit-learn has it: low values are anomalous."""
        check_is_fitted(self)
        return -self._distances(validate_data(self, X, reset=False, dtype=np.float64))

    def decision_function(self, X: Array) -> Array:
        """Threshold less the distance (rows,): negative for anomalies."""
        return self.score_samples(X) - self.offset_

    def predict(self, X: Array) -> Array:
        """1 for normal rows, -1 for anomalies."""
        return np.where(self.decision_function(X) < 0, -1, 1)
