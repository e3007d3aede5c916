"""Estimators of a frozen backbone's features: array estimators, and a head that holds their arrays."""

from __future__ import annotations

from peft_lab.tuners.estimators.classifiers import Array, ArrayClassifier, ClassSums, LinearClassifier, unit_rows

__all__ = ["Array", "ArrayClassifier", "ClassSums", "LinearClassifier", "unit_rows"]
