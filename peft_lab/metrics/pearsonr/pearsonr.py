"""Pearson's correlation coefficient (scipy's `pearsonr`)."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np
from scipy.stats import pearsonr


class Pearsonr(evaluate.Metric):
    """`compute(predictions, references)`, floats of shape (n,) -> `{"pearsonr": float}`.

    The correlation with a constant is undefined; it counts as 0, so that a model that predicts one value is never best.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Pearson's linear correlation.",
            citation="",
            inputs_description="predictions, references: numbers, shape (n,).",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        if len(predictions) < 2 or np.ptp(predictions) == 0 or np.ptp(references) == 0:
            return {"pearsonr": 0.0}
        return {"pearsonr": float(pearsonr(references, predictions).statistic)}
