"""F1 score (scikit-learn's `f1_score`)."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np
from sklearn.metrics import f1_score


class F1(evaluate.Metric):
    """`compute(predictions, references, average="auto")`, both integers of shape (n,) -> `{"f1": float}`.

    `auto` means `binary` (of class 1) while all values are 0 or 1, else `macro`. A class that is never predicted
    counts as 0.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Harmonic mean of precision and recall.",
            citation="",
            inputs_description="predictions, references: class indices, shape (n,); average; labels.",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(
        self,
        predictions: list[int],
        references: list[int],
        average: str = "auto",
        labels: list[int] | None = None,
    ) -> dict[str, float]:
        if average == "auto":
            average = "binary" if set(np.unique([*predictions, *references])) <= {0, 1} else "macro"
        labels = None if average == "binary" else labels
        return {"f1": float(f1_score(references, predictions, average=average, labels=labels, zero_division=0))}
