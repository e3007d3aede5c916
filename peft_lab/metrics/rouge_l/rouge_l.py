"""ROUGE-L: F1 of the longest common subsequence of words, by Google Research's `rouge_score` without stemming."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np
from rouge_score import rouge_scorer


class RougeL(evaluate.Metric):
    """`compute(predictions, references)`, texts -> `{"rouge_l": float}`, the mean over the rows."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Mean F1 of the longest common subsequence of words; lower case, letters a-z and digits alone.",
            citation="Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries",
            inputs_description="predictions, references: texts, n of each.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
        pairs = zip(predictions, references, strict=True)
        return {"rouge_l": float(np.mean([scorer.score(r, p)["rougeL"].fmeasure for p, r in pairs]))}
