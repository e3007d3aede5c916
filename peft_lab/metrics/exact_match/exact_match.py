"""Exact match: the share of texts that equal their reference, character by character."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np


class ExactMatch(evaluate.Metric):
    """`compute(predictions, references, ignore_case=False)`, texts -> `{"exact_match": float}`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of texts that equal their reference.",
            citation="",
            inputs_description="predictions, references: texts, n of each; ignore_case.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str], ignore_case: bool = False) -> dict[str, float]:
        change = str.casefold if ignore_case else str
        pairs = zip(predictions, references, strict=True)
        return {"exact_match": float(np.mean([change(p) == change(r) for p, r in pairs]))}
