"""FeTrIL: features of past classes are made from those of new ones, moved by the difference of the class means.

Source: Petit et al. 2023, FeTrIL: Feature Translation for Exemplar-Free Class-Incremental Learning, arXiv:2211.13131.
Written from the equations; in the authors' code the first 512 rows are not normalised, here all are.

Outside of a protocol that brings classes one after the other there are no past classes, and FeTrIL is a linear support
vector machine on unit features.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sklearn.metrics import pairwise_distances_argmin
from sklearn.svm import LinearSVC

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
    name="fetril",
    title="FeTrIL",
    paper="2211.13131",
    place="head",
    config="FeTrILConfig",
    roles=("head",),
    capabilities=("mixed_batch",),
    learning_rate=0.0,
    budget=(0.6, 0.1),
)


class FeTrIL(IncrementalClassifier):
    """Linear support vector machine with translated features of past classes.

    Classes without rows in a call are past ones. A past class p has the pseudo-features x - mean_n + mean_p, with the
    rows x of the new class n whose mean is nearest to its own. All rows are then divided by their norms.

    Args:
        C: inverse weight of the regulariser.
        tol: tolerance of the solver.
        max_iter: most iterations of the solver.
    """

    unit_norm = True

    def __init__(self, C: float = 1.0, tol: float = 1e-4, max_iter: int = 1000) -> None:
        self.C = C
        self.tol = tol
        self.max_iter = max_iter

    def _set_scores(self, X: Array, y: Array) -> None:
        rows, labels = self.pseudo_features(X, y)
        solver = LinearSVC(C=self.C, tol=self.tol, dual=False, max_iter=self.max_iter)
        solver.fit(unit_rows(rows), labels)
        self.n_iter_ = solver.n_iter_
        self._set_linear(solver.coef_, solver.intercept_)

    def pseudo_features(self, X: Array, y: Array) -> tuple[Array, Array]:
        """Rows of the new classes, and translated ones of the past classes, with their labels."""
        is_new = np.isin(self.classes_, y)
        new, past = np.flatnonzero(is_new), np.flatnonzero(~is_new)
        rows, labels = [X], [y]
        if len(past):
            means = self.sums_.means
            nearest = new[pairwise_distances_argmin(means[past], means[new])]
            for index, source in zip(past, nearest, strict=True):
                own = X[y == self.classes_[source]]
                rows.append(own - means[source] + means[index])
                labels.append(np.full(len(own), self.classes_[index]))
        return np.concatenate(rows), np.concatenate(labels)


@dataclass
class FeTrILConfig(EstimatorConfig):
    """Configuration of FeTrIL. No gradient steps; saved: K (d + 2) + 2 d numbers.

    All classes of a task are first classes, so it is a linear support vector machine on unit features.
    """

    C: float = field(
        default=1.0, metadata={"range": (1e-12, 1e12), "help": "Inverse weight of the regulariser.", "other": 0.01}
    )

    estimator_class = FeTrIL


class FeTrILLayer(LinearEstimatorHead):
    """Head with the arrays of `FeTrIL`."""

    other_param_names = linear_arrays("fetril")

    def fit(self, adapter: str, rows: Any, labels: Any, unlabelled: Any) -> Any:
        logger.warning(
            "All classes of this task come at once, so FeTrIL equals a linear support vector machine on unit features "
            "here; it differs where classes come one after the other."
        )
        return super().fit(adapter, rows, labels, unlabelled)


register_head(METHOD, FeTrILConfig, FeTrILLayer)
