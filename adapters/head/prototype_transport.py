"""Prototype transport: class means moved to the rows that entropic optimal transport assigns to them.

Source: Cuturi 2013, Sinkhorn Distances, arXiv:1306.0895; prototypes moved by transport plans as in Hu et al. 2021,
arXiv:2006.03806 (transductive few-shot learning). The solver is POT's.

Readings: support prototypes and query rows are unit features, both with uniform mass; the cost is the squared Euclidean
distance divided by its largest value, so that `reg` is relative. Without query rows the support rows themselves are the
queries, and their labels are not looked at in the transport.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from sklearn.metrics import pairwise_distances

from peft_lab.errors import ConfigError
from peft_lab.tuners import MethodInfo
from peft_lab.tuners.estimators import (
    Array,
    ClassSums,
    EstimatorConfig,
    LinearClassifier,
    LinearEstimatorHead,
    linear_arrays,
    register_head,
    unit_rows,
)

METHOD = MethodInfo(
    name="prototype_transport",
    title="Prototype transport",
    paper="2006.03806",
    place="head",
    config="PrototypeTransportConfig",
    roles=("head",),
    capabilities=("mixed_batch",),
    learning_rate=0.0,
    budget=(0.6, 0.1),
)


class PrototypeTransport(LinearClassifier):
    """Cosine classifier whose prototypes are barycentres of a transport plan.

    Args:
        reg: weight of the entropy, relative to the largest cost; small values assign each row to one prototype.
        step: how far a prototype moves, from 0 (class mean) to 1 (barycentre of its rows).
        max_iter: most iterations of Sinkhorn's algorithm.
        temperature: factor of the cosines; no effect on the class that is predicted.

    Raises:
        ConfigError: the package POT is not installed.
    """

    unit_norm = True

    def __init__(self, reg: float = 0.02, step: float = 0.5, max_iter: int = 1000, temperature: float = 16.0) -> None:
        self.reg = reg
        self.step = step
        self.max_iter = max_iter
        self.temperature = temperature

    def fit(self, X: Array, y: Array, X_query: Array | None = None) -> PrototypeTransport:
        """Average the support features (rows, width) by class, and move the means to the query rows."""
        X, y = self._labelled(X, y)
        sums = ClassSums(X.shape[1])
        sums.add(unit_rows(X), y)
        self.classes_, self.means_ = sums.classes, unit_rows(sums.means)
        return self.transport(X if X_query is None else X_query)

    def transport(self, X_query: Array) -> PrototypeTransport:
        """Move the prototypes from the class means to the barycentres of query rows (rows, width)."""
        rows = unit_rows(np.asarray(X_query, dtype=np.float64))
        plan = self.plan(rows)
        barycentres = plan @ rows / plan.sum(1, keepdims=True)
        coef = self.temperature * unit_rows((1 - self.step) * self.means_ + self.step * barycentres)
        self._set_linear(coef, np.zeros(len(coef)))
        return self

    def plan(self, rows: Array) -> Array:
        """Entropic transport plan (classes, rows) from the class means to unit rows."""
        try:
            from ot.bregman import sinkhorn_log
        except ImportError as error:
            raise ConfigError(
                'Method "prototype_transport" solves optimal transport by the package POT, which is not installed: '
                'pip install "peft-lab[transport]".'
            ) from error
        cost = pairwise_distances(self.means_, rows, metric="sqeuclidean")
        cost /= max(cost.max(), np.finfo(float).tiny)
        masses = [np.full(n, 1 / n) for n in cost.shape]
        # warn=False, because a plan of nearly the right sums moves the prototypes as well
        plan, log = sinkhorn_log(*masses, cost, self.reg, numItermax=self.max_iter, warn=False, log=True)
        self.n_iter_ = log["niter"] + 1
        return plan


@dataclass
class PrototypeTransportConfig(EstimatorConfig):
    """Configuration of prototype transport. No gradient steps; saved: K (d + 2) + 2 d numbers.

    Training rows with a negative label are the query rows; without any, the training rows themselves are.
    """

    reg: float = field(
        default=0.02,
        metadata={"range": (1e-4, 1e4), "help": "Weight of the entropy, relative to the largest cost.", "other": 0.5},
    )
    step: float = field(
        default=0.5,
        metadata={
            "range": (0, 1),
            "help": "How far a prototype moves, from 0 (class mean) to 1 (barycentre of its rows).",
            "other": 1.0,
        },
    )
    max_iter: int = field(
        default=1000, metadata={"range": (1, 1e6), "help": "Most iterations of the solver.", "other": 1}
    )
    temperature: float = field(
        default=16.0,
        metadata={
            "range": (0, 1e4),
            "help": "Factor of the cosines; the class that is predicted does not depend on it.",
            "other": 8.0,
        },
    )

    estimator_class = PrototypeTransport
    unlabelled_rows = "X_query"


class PrototypeTransportLayer(LinearEstimatorHead):
    """Head with the arrays of `PrototypeTransport`."""

    other_param_names = linear_arrays("prototype_transport")


register_head(METHOD, PrototypeTransportConfig, PrototypeTransportLayer)
