"""Estimators of a frozen backbone's features: array estimators, and a head that holds their arrays."""

from __future__ import annotations

from peft_lab.tuners.estimators.classifiers import Array, ArrayClassifier, ClassSums, LinearClassifier, unit_rows
from peft_lab.tuners.estimators.config import EstimatorConfig
from peft_lab.tuners.estimators.head import EstimatorHead, LinearEstimatorHead, linear_arrays
from peft_lab.tuners.head_layer import HeadInput, register_head

__all__ = [
    "Array",
    "ArrayClassifier",
    "ClassSums",
    "EstimatorConfig",
    "EstimatorHead",
    "HeadInput",
    "LinearClassifier",
    "LinearEstimatorHead",
    "linear_arrays",
    "register_head",
    "unit_rows",
]
