"""Linear probe by scikit-learn: logistic regression on a frozen backbone's features, solved to its optimum.

The baseline "head" trains the same head by gradient steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sklearn.linear_model import LogisticRegression

from peft_lab.tuners import MethodInfo
from peft_lab.tuners.estimators import (
    EstimatorConfig,
    LinearEstimatorHead,
    StandardisedClassifier,
    linear_arrays,
    register_head,
)

METHOD = MethodInfo(
    name="linear_probe",
    title="Linear probe, solved",
    paper="",
    place="head",
    config="LinearProbeConfig",
    roles=("head",),
    capabilities=("mixed_batch",),
    learning_rate=0.0,
    budget=(0.6, 0.1),
)


class LinearProbe(StandardisedClassifier):
    """scikit-learn's LogisticRegression on standardised features.

    Args:
        C: inverse weight of the regulariser.
        tol: tolerance of the solver.
        max_iter: most iterations of the solver.
    """

    def __init__(self, C: float = 0.1, tol: float = 1e-4, max_iter: int = 1000) -> None:
        super().__init__(C, tol, max_iter)

    def _solver(self) -> LogisticRegression:
        return LogisticRegression(C=self.C, tol=self.tol, max_iter=self.max_iter)


@dataclass
class LinearProbeConfig(EstimatorConfig):
    """Configuration of the solved linear probe. No gradient steps; saved: K (d + 2) + 2 d numbers."""

    C: float = field(
        default=0.1, metadata={"range": (1e-12, 1e12), "help": "Inverse weight of the regulariser.", "other": 10.0}
    )

    estimator_class = LinearProbe


class LinearProbeLayer(LinearEstimatorHead):
    """Head with the arrays of `LinearProbe`."""

    other_param_names = linear_arrays("linear_probe")


register_head(METHOD, LinearProbeConfig, LinearProbeLayer)
