"""Perplexity: exp of the mean negative log-probability of the reference tokens."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np


class Perplexity(evaluate.Metric):
    """`compute(predictions)`, natural log-probabilities of the reference tokens, (n,) -> `{"perplexity": float}`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="exp of the mean negative log-probability; every token counts the same.",
            citation="",
            inputs_description="predictions: log-probabilities of the reference tokens, shape (n,).",
            features=datasets.Features({"predictions": datasets.Value("float64")}),
        )

    def _compute(self, predictions: list[float]) -> dict[str, float]:
        return {"perplexity": float(np.exp(-np.mean(predictions)))}
