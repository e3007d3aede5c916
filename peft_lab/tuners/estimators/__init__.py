"""Estimators of a frozen backbone's features: array estimators, and a head that holds their arrays."""

from __future__ import annotations

from peft_lab.backbones.class_texts import shared_width, text_classifier
from peft_lab.tuners.estimators.classifiers import (
    Array,
    ArrayClassifier,
    ClassSums,
    IncrementalClassifier,
    LinearClassifier,
    StandardisedClassifier,
    unit_rows,
)
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
    "IncrementalClassifier",
    "LinearClassifier",
    "LinearEstimatorHead",
    "StandardisedClassifier",
    "linear_arrays",
    "register_head",
    "shared_width",
    "text_classifier",
    "unit_rows",
]
