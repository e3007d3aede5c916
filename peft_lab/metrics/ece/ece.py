"""Expected calibration error of a classifier, from 15 bins of equal width (`peft_lab.metrics.calibration`)."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np

from peft_lab.metrics.calibration import BINS, expected_calibration_error


class ExpectedCalibrationError(evaluate.Metric):
    """`compute(predictions, references, bins=15)`, probabilities (n, classes) and classes (n,) -> `{"ece": float}`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Mean difference between confidence and accuracy over bins of confidence, weighted by rows.",
            citation="",
            inputs_description="predictions: probabilities, (n, classes); references: class indices, (n,); bins.",
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[list[float]], references: list[int], bins: int = BINS) -> dict[str, float]:
        probabilities = np.asarray(predictions, dtype=np.float32)
        correct = probabilities.argmax(-1) == np.asarray(references)
        return {"ece": expected_calibration_error(probabilities.max(-1), correct.astype(float), bins)}
