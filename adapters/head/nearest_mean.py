"""Nearest class mean: a row belongs to the class whose mean feature is nearest.

Source: Mensink et al. 2013, Distance-Based Image Classification; as a baseline of continual learning, Janson et al.
2022, arXiv:2210.04428.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from peft_lab.tuners import MethodInfo
from peft_lab.tuners.estimators import (
    Array,
    EstimatorConfig,
    IncrementalClassifier,
    LinearEstimatorHead,
    linear_arrays,
    register_head,
    unit_rows,
)

METHOD = MethodInfo(
    name="nearest_mean",
    title="Nearest class mean",
    paper="2210.04428",
    place="head",
    config="NearestMeanConfig",
    roles=("head",),
    capabilities=("mixed_batch",),
    learning_rate=0.0,
    budget=(0.6, 0.1),
)


class NearestMean(IncrementalClassifier):
    """Nearest class mean, with running means.

    Args:
        metric: "euclidean", whose scores are -|x - mean|² / 2, or "cosine", whose scores are `temperature` times the
            cosine of row and mean.
        temperature: factor of the cosines; no effect on the class that is predicted.

    Raises:
        ValueError: an unknown metric.
    """

    def __init__(self, metric: str = "euclidean", temperature: float = 16.0) -> None:
        self.metric = metric
        self.temperature = temperature

    @property
    def unit_norm(self) -> bool:
        return self.metric == "cosine"

    @property
    def squared_distance(self) -> bool:
        return self.metric == "euclidean"

    def _set_scores(self, X: Array, y: Array) -> None:
        if self.metric not in ("euclidean", "cosine"):
            raise ValueError(f'metric="{self.metric}" must be euclidean or cosine.')
        self.counts_ = self.sums_.counts
        means = self.sums_.means
        if self.metric == "cosine":
            self._set_linear(self.temperature * unit_rows(means), np.zeros(len(means)))
        else:
            # Around their centre the means are small, so that float32 holds their distances.
            center = means.mean(0)
            coef = means - center
            self._set_linear(coef, -(coef**2).sum(1) / 2, center)


@dataclass
class NearestMeanConfig(EstimatorConfig):
    """Configuration of the nearest class mean. No gradient steps; saved: K (d + 2) + 2 d numbers."""

    metric: Literal["euclidean", "cosine"] = field(
        default="euclidean", metadata={"help": "`euclidean` or `cosine`.", "other": "cosine"}
    )
    temperature: float = field(
        default=16.0,
        metadata={
            "range": (0, 1e4),
            "help": "Factor of the cosines; the class that is predicted does not depend on it.",
            "other": 8.0,
            "with": {"metric": "cosine"},
        },
    )

    estimator_class = NearestMean


class NearestMeanLayer(LinearEstimatorHead):
    """Head with the arrays of `NearestMean`."""

    other_param_names = linear_arrays("nearest_mean")


register_head(METHOD, NearestMeanConfig, NearestMeanLayer)
