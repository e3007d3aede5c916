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
    EstimatorConfig,
    IncrementalClassifier,
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


class NaiveBayes(IncrementalClassifier):
    """Class means, priors and one shared diagonal variance, updated exactly.

    The score of a class is log prior - sum((x - mean)² / var) / 2. The variance is the mean squared distance of all
    rows to the means of their classes. Rows in several calls give the scores of one `fit` on all of them.

    Args:
        var_smoothing: share of the largest variance that is added to all, as in GaussianNB.
    """

    squared_distance = True

    def __init__(self, var_smoothing: float = 1e-9) -> None:
        self.var_smoothing = var_smoothing

    def _set_scores(self, X: Array, y: Array) -> None:
        sums = self.sums_
        self.counts_, self.means_ = sums.counts, sums.means
        var = sums.scatter / sums.counts.sum()
        var = var + self.var_smoothing * var.max()
        # Rows that do not vary at all leave the distances as they are.
        self.var_ = np.where(var > 0, var, 1.0)
        center, scale = sums.means.mean(0), self.var_**-0.5
        coef = (sums.means - center) * scale
        self._set_linear(coef, np.log(sums.counts / sums.counts.sum()) - (coef**2).sum(1) / 2, center, scale)


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
