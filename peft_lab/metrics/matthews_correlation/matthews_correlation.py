"""Matthews correlation coefficient (scikit-learn's `matthews_corrcoef`)."""

from __future__ import annotations

import datasets
import evaluate
from sklearn.metrics import matthews_corrcoef


class MatthewsCorrelation(evaluate.Metric):
    """`compute(predictions, references)`, integers of shape (n,) -> `{"matthews_correlation": float}`, 0 by chance."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Correlation of predicted and true classes, fair under class imbalance.",
            citation="",
            inputs_description="predictions, references: class indices, shape (n,).",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}
