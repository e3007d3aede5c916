"""Gaussian discriminant analysis with a shrunk covariance, and with text weights where there are some.

Source: Wang et al. 2024, A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation, arXiv:2402.04087. Written
from the equations.

Readings: covariance="class_mean" is the paper's mean of the classes' covariances, of classes with two rows or more;
rows without labels enter by expectation maximisation from the labelled rows, or from the text weights where no row has
a label. Where no class has two different rows the covariance is that of the identity. With more rows than features the
shrunk inverse is about width / rows times the inverse covariance: unequal priors are scaled alike, and the expectation
step divides by that factor.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from scipy.special import softmax

from peft_lab.tuners import MethodInfo
from peft_lab.tuners.estimators import (
    Array,
    EstimatorConfig,
    LinearClassifier,
    LinearEstimatorHead,
    linear_arrays,
    register_head,
    unit_rows,
)

METHOD = MethodInfo(
    name="gda",
    title="GDA",
    paper="2402.04087",
    place="head",
    config="GDAConfig",
    roles=("head",),
    capabilities=("mixed_batch",),
    learning_rate=0.0,
    budget=(0.6, 0.1),
)

#: CLIP's factor of the cosines of images and texts.
_TEXT_SCALE = 100.0


class GDA(LinearClassifier):
    """Gaussian discriminant analysis of unit features with Kubokawa-Srivastava shrinkage.

    The scores are alpha (f Wg + b) with Wg = S⁻¹ mean and b = log prior - mean S⁻¹ mean / 2, plus 100 f W of text
    weights. S⁻¹ = width pinv((rows - 1) S + tr(S) I).

    Args:
        covariance: "pooled", or "class_mean", in which a small class weighs as much as a large one.
        priors: "uniform", or "empirical", the shares of the rows.
        alpha: factor of the Gaussian scores beside the text weights.
        text_weights: (classes, width) unit vectors, in the order of the sorted labels.
        em_steps: steps of expectation maximisation over rows without labels.

    Raises:
        ValueError: an unknown covariance or prior, or text weights of another shape.
    """

    unit_norm = True

    def __init__(
        self,
        covariance: str = "pooled",
        priors: str = "uniform",
        alpha: float = 1.0,
        text_weights: Array | None = None,
        em_steps: int = 10,
    ) -> None:
        self.covariance = covariance
        self.priors = priors
        self.alpha = alpha
        self.text_weights = text_weights
        self.em_steps = em_steps

    def fit(self, X: Array, y: Array, X_unlabelled: Array | None = None) -> GDA:
        """Fit to features (rows, width), and to further rows without labels."""
        X, y = self._labelled(X, y)
        self.classes_ = np.unique(y)
        known = (y[:, None] == self.classes_).astype(np.float64)
        self._set_gaussians(unit_rows(X), known)
        if X_unlabelled is not None:
            self._maximise(X, known, X_unlabelled)
        return self

    def fit_unlabelled(self, X: Array) -> GDA:
        """Fit to features (rows, width) without labels; the text weights give the first classes of the rows."""
        if self.text_weights is None:
            raise ValueError("Rows without labels alone need text_weights, from which the classes of the rows start.")
        self.classes_ = np.arange(len(self.text_weights))
        self.n_features_in_ = np.shape(X)[1]
        rows = unit_rows(np.asarray(X, dtype=np.float64))
        self._set_gaussians(rows, softmax(_TEXT_SCALE * rows @ np.asarray(self.text_weights).T, axis=1))
        self._maximise(rows[:0], np.zeros((0, len(self.classes_))), X)
        return self

    def _maximise(self, X: Array, known: Array, X_unlabelled: Array) -> None:
        """Expectation maximisation with the labelled rows' classes fixed."""
        unlabelled = unit_rows(np.asarray(X_unlabelled, dtype=np.float64))
        rows = np.concatenate([unit_rows(X), unlabelled])
        for _ in range(self.em_steps):
            # `coef_` holds the text weights too, where there are some.
            scores = (unlabelled @ self.coef_.T + self.intercept_) / self._factor(len(rows))
            self._set_gaussians(rows, np.concatenate([known, softmax(scores, axis=1)]))

    def _factor(self, rows: int) -> float:
        """Scale of the shrunk inverse against the inverse covariance."""
        return min(self.n_features_in_ / max(rows - 1, 1), 1.0)

    def _set_gaussians(self, rows: Array, weights: Array) -> None:
        """Set the scores by unit rows and the share of each class in them (rows, classes)."""
        counts = weights.sum(0)
        means = weights.T @ rows / np.maximum(counts, np.finfo(float).tiny)[:, None]
        precision = self._precision(rows, weights, means)
        if self.priors not in ("uniform", "empirical"):
            raise ValueError(f'priors="{self.priors}" must be uniform or empirical.')
        shares = counts / counts.sum() if self.priors == "empirical" else np.full(len(counts), 1 / len(counts))
        coef = means @ precision
        log_priors = np.log(np.maximum(shares, np.finfo(float).tiny))
        intercept = self._factor(len(rows)) * log_priors - (coef * means).sum(1) / 2
        if self.text_weights is not None:
            text = np.asarray(self.text_weights, dtype=np.float64)
            if text.shape != coef.shape:
                raise ValueError(f"text_weights must have the shape {coef.shape}, got {text.shape}.")
            coef, intercept = _TEXT_SCALE * text + self.alpha * coef, self.alpha * intercept
        self._set_linear(coef, intercept)

    def _precision(self, rows: Array, weights: Array, means: Array) -> Array:
        """Shrunk inverse covariance (width, width)."""
        counts, width = weights.sum(0), rows.shape[1]
        scatters = []
        for index, mean in enumerate(means):
            centred = rows - mean
            scatters.append((centred * weights[:, index : index + 1]).T @ centred)
        if self.covariance == "pooled":
            covariance = sum(scatters) / max(len(rows) - 1, 1)
        elif self.covariance == "class_mean":
            each = [s / (count - 1) for s, count in zip(scatters, counts, strict=True) if count >= 2]
            covariance = sum(each) / len(each) if each else np.zeros((width, width))
        else:
            raise ValueError(f'covariance="{self.covariance}" must be pooled or class_mean.')
        trace = np.trace(covariance)
        if trace <= 0:
            return np.eye(width)
        return width * np.linalg.pinv((len(rows) - 1) * covariance + trace * np.eye(width), hermitian=True)


@dataclass
class GDAConfig(EstimatorConfig):
    """Configuration of GDA. No gradient steps; saved: K (d + 2) + 2 d numbers.

    Training rows with a negative label are rows without a label. Text weights are for the array estimator alone.
    """

    covariance: Literal["pooled", "class_mean"] = field(
        default="pooled",
        metadata={
            "help": "`pooled`, or `class_mean`, in which a small class weighs as much as a large one.",
            "other": "class_mean",
        },
    )
    priors: Literal["uniform", "empirical"] = field(
        default="uniform",
        metadata={"help": "`uniform`, or `empirical`, the shares of the training rows.", "other": "empirical"},
    )
    em_steps: int = field(
        default=10,
        metadata={
            "range": (0, 1e4),
            "help": "Steps of expectation maximisation over rows without labels.",
            "untried": True,
        },
    )

    estimator_class = GDA
    unlabelled_rows = "X_unlabelled"


class GDALayer(LinearEstimatorHead):
    """Head with the arrays of `GDA`."""

    other_param_names = linear_arrays("gda")


register_head(METHOD, GDAConfig, GDALayer)
