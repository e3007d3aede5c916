"""Gaussian discriminant analysis with a shrunk covariance, and with text weights where there are some.

Source: Wang et al. 2024, A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation, arXiv:2402.04087. Written
from the equations.

Readings: covariance="class_mean" is the paper's mean of the classes' covariances, of classes with two rows or more;
rows without labels enter by expectation maximisation from the labelled rows, or from the text weights where no row has
a label. Where no class has two different rows the covariance is that of the identity. With more rows than features the
shrunk inverse is about width / rows times the inverse covariance: unequal priors are scaled alike, and the expectation
step divides by that factor.

An adapter with `text_templates` reads the projected class token of an image, and its text weights are the features of
class texts by the text tower of the same checkpoint (CLIP). A class without training rows is never its answer, though
it has a text; `alpha` is best chosen on validation rows, as the authors do for most tasks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from scipy.special import softmax
from torch import Tensor

from peft_lab.errors import ConfigError
from peft_lab.tuners import MethodInfo
from peft_lab.tuners.estimators import (
    Array,
    EstimatorConfig,
    HeadInput,
    LinearClassifier,
    LinearEstimatorHead,
    linear_arrays,
    register_head,
    shared_width,
    text_classifier,
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

    Training rows with a negative label are rows without a label. With `text_templates` d is the width p of the space
    that images and texts share, and the text weights, K p numbers, and the projection, p times the width of a token,
    are saved too.

    Raises:
        ConfigError: a template without one place for the name, `alpha` without templates, or templates with `pooling`.
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
    text_templates: list[str] | None = field(
        default=None,
        metadata={
            "help": "Texts of a class, with {} for its name, whose text classifier is added; for image classifiers "
            "from a checkpoint with two towers (CLIP).",
            "untried": "needs a checkpoint",
        },
    )
    alpha: float = field(
        default=1.0,
        metadata={
            "range": (0, 1e6),
            "help": "Factor of the Gaussian scores beside the text classifier's, 100 times the cosines.",
            "untried": "needs a checkpoint",
        },
    )

    estimator_class = GDA
    unlabelled_rows = "X_unlabelled"

    def check(self) -> None:
        super().check()
        if self.text_templates is None:
            if self.alpha != 1.0:
                raise ConfigError(f"alpha={self.alpha} has no effect without text_templates; give both.")
            return
        for template in self.text_templates:
            if template.count("{}") != 1:
                raise ConfigError(f'text_templates: "{template}" must have one {{}}, where the name of a class goes.')
        if not self.text_templates:
            raise ConfigError("text_templates=[] names no text; leave it out for a classifier without texts.")
        if self.pooling != "auto":
            raise ConfigError(
                f'pooling="{self.pooling}" has no effect with text_templates, which read projected class tokens; leave '
                "it out."
            )


class GDALayer(LinearEstimatorHead):
    """Head with the arrays of `GDA`.

    With class texts it holds their unit features (classes, shared width) and the projection (shared width, token
    width).
    """

    other_param_names = (*linear_arrays("gda"), "gda_text", "gda_projection")

    def shapes(self, config: GDAConfig) -> dict[str, tuple[int, ...]]:
        found = super().shapes(config)
        if config.text_templates is not None:
            width = self.feature_width(config)
            found |= {"text": (self.facts.classes, width), "projection": (width, self.facts.token_width)}
        return found

    def feature_width(self, config: GDAConfig) -> int:
        if config.text_templates is None:
            return super().feature_width(config)
        width = shared_width(self.whole[0], self.facts)
        if width is None:
            raise ConfigError(
                f"text_templates need an image classifier from a checkpoint with two towers, such as CLIP, and "
                f"{type(self.whole[0]).__name__} has no text tower; leave them out."
            )
        return width

    def pool(self, adapter: str, features: HeadInput) -> Tensor:
        if self.configs[adapter].text_templates is None:
            return super().pool(adapter, features)
        projection, token = self.value(adapter, "projection"), features.class_token
        assert token is not None, "models without a class token have no shared width"
        return token.to(projection.dtype) @ projection.T

    def read_rows(self, adapter: str, batches: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Tensor, Any]]:
        templates = self.configs[adapter].text_templates
        if templates is not None:
            texts = text_classifier(self.whole[0], self.facts, templates)
            self.value(adapter, "text").copy_(texts.weights)
            self.value(adapter, "projection").copy_(texts.projection)
        yield from super().read_rows(adapter, batches)

    def fit(self, adapter: str, rows: Any, labels: Any, unlabelled: Any) -> GDA:
        config = self.configs[adapter]
        estimator: GDA = config.estimator()
        if config.text_templates is not None:
            estimator.text_weights = self.value(adapter, "text").cpu().double().numpy()[np.unique(labels)]
        return estimator.fit(rows, labels, unlabelled)


register_head(METHOD, GDAConfig, GDALayer)
