"""TEEN: prototypes of new classes, moved towards those of similar base classes.

Source: Wang et al. 2023, Few-Shot Class-Incremental Learning via Training-Free Prototype Calibration,
arXiv:2312.05229. Written from the equations.

Outside of a protocol that brings classes one after the other there are no new classes, and TEEN is the nearest mean by
cosine.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.special import softmax

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

logger = logging.getLogger("peft_lab")

METHOD = MethodInfo(
    name="teen",
    title="TEEN",
    paper="2312.05229",
    place="head",
    config="TEENConfig",
    roles=("head",),
    capabilities=("mixed_batch",),
    learning_rate=0.0,
    budget=(0.6, 0.1),
)


class TEEN(IncrementalClassifier):
    """Cosine classifier with calibrated prototypes of new classes.

    The classes of the first call are the base classes, those that come later are new. With unit vectors c of the class
    means, a new prototype is (1 - alpha) c_new + alpha norm(sum_b softmax_b(temperature cos(c_new, c_b)) c_b).

    Args:
        alpha: share of the base classes in a new prototype, 0 to 1.
        temperature: factor of the cosines, of the calibration and of the scores.
        base_classes: the first of the sorted classes that are base classes; None for those of the first call.
    """

    unit_norm = True

    def __init__(self, alpha: float = 0.5, temperature: float = 16.0, base_classes: int | None = None) -> None:
        self.alpha = alpha
        self.temperature = temperature
        self.base_classes = base_classes

    def _set_scores(self, X: Array, y: Array) -> None:
        prototypes = unit_rows(self.sums_.means)
        is_base = np.isin(self.classes_, self.first_classes_[: self.base_classes])
        base, new = prototypes[is_base], prototypes[~is_base]
        similar = unit_rows(softmax(self.temperature * new @ base.T, axis=1) @ base)
        prototypes[~is_base] = (1 - self.alpha) * new + self.alpha * similar
        # A cosine classifier divides each prototype by its norm.
        coef = self.temperature * unit_rows(prototypes)
        self._set_linear(coef, np.zeros(len(coef)))


@dataclass
class TEENConfig(EstimatorConfig):
    """Configuration of TEEN. No gradient steps; saved: K (d + 2) + 2 d numbers.

    Without `base_classes` all classes of a task are base classes, and TEEN is the nearest mean by cosine.
    """

    alpha: float = field(
        default=0.5,
        metadata={
            "range": (0, 1),
            "help": "Share of similar base classes in the prototype of a new class.",
            "other": 0.1,
            "with": {"base_classes": 1},
        },
    )
    temperature: float = field(
        default=16.0, metadata={"range": (0, 1e4), "help": "Factor of the cosines.", "other": 8.0}
    )
    base_classes: int | None = field(
        default=None,
        metadata={
            "range": (1, 1e6),
            "help": "Number of the first classes that are base classes; nothing means all.",
            "other": 1,
        },
    )

    estimator_class = TEEN


class TEENLayer(LinearEstimatorHead):
    """Head with the arrays of `TEEN`."""

    other_param_names = linear_arrays("teen")

    def fit(self, adapter: str, rows: Any, labels: Any, unlabelled: Any) -> Any:
        config = self.configs[adapter]
        if config.base_classes is None or config.base_classes >= len(np.unique(labels)):
            logger.warning(
                "All classes of this task come at once, so TEEN equals the nearest mean by cosine here; it differs "
                "where classes come one after the other."
            )
        return super().fit(adapter, rows, labels, unlabelled)


register_head(METHOD, TEENConfig, TEENLayer)
