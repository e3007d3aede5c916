"""Gaussian naive Bayes with one diagonal variance that all classes share.

Source: Hastie, Tibshirani and Friedman 2009, The Elements of Statistical Learning, section 18.2 (diagonal linear
discriminant analysis). scikit-learn's GaussianNB has a variance for each class.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from peft_lab.tuners import MethodInfo
from peft_lab.tuners.estimators import (
    Array,
    ClassSums,
    EstimatorConfig,
    LinearClassifier,
    LinearEstimatorHead,
    linear_arrays,
    register_head,
)

METHOD = MethodInfo(
    name="naive_bayes",
    title="Naive Bayes with a shared variance",
    paper="",
    place="head",
    config="NaiveBayesConfig",
    roles=("head",),
    capabilities=("mixed_batch",),
    learning_rate=0.0,
    budget=(0.6, 0.1),
)


class NaiveBayes(LinearClassifier):
    """Class means, priors and one shared diagonal variance, updated exactly.

    The score of a class is log prior - sum((x - mean)² / var) / 2. The variance is the mean squared distance of all
    rows to the means of their classes.

    Args:
        var_smoothing: share of the largest variance that is added to all, as in GaussianNB.
    """

    squared_distance = True

    def __init__(self, var_smoothing: float = 1e-9) -> None:
        self.var_smoothing = var_smoothing

    def fit(self, X: Array, y: Array) -> NaiveBayes:
        """Estimate means, priors and variance from features (rows, width)."""
        X, y = self._labelled(X, y)
        self.sums_ = ClassSums(X.shape[1])
        return self._add(X, y)

    def partial_fit(self, X: Array, y: Array, classes: Array | None = None) -> NaiveBayes:
        """Add rows, of known classes or new ones; the result is that of `fit` on all rows."""
        if not hasattr(self, "sums_"):
            return self.fit(X, y)
        return self._add(*self._labelled(X, y, reset=False))

    def _add(self, X: Array, y: Array) -> NaiveBayes:
        sums = self.sums_
        sums.add(X, y)
        self.classes_, self.counts_, self.means_ = sums.classes, sums.counts, sums.means
        var = sums.scatter / sums.counts.sum()
        var = var + self.var_smoothing * var.max()
        # Rows that do not vary at all leave the distances as they are.
        self.var_ = np.where(var > 0, var, 1.0)
        center, scale = sums.means.mean(0), self.var_**-0.5
        coef = (sums.means - center) * scale
        self._set_linear(coef, np.log(sums.counts / sums.counts.sum()) - (coef**2).sum(1) / 2, center, scale)
        return self


@dataclass
class NaiveBayesConfig(EstimatorConfig):
    """Configuration of naive Bayes. No gradient steps; saved: K (d + 2) + 2 d numbers."""

    var_smoothing: float = field(
        default=1e-9,
        metadata={"range": (0, 1e6), "help": "Share of the largest variance that is added to all.", "other": 0.5},
    )

    estimator_class = NaiveBayes


class NaiveBayesLayer(LinearEstimatorHead):
    """Head with the arrays of `NaiveBayes`."""

    other_param_names = linear_arrays("naive_bayes")


register_head(METHOD, NaiveBayesConfig, NaiveBayesLayer)
