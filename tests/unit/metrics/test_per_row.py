"""Jackknife values of metrics, against the metric computed anew without each row."""

from __future__ import annotations

import numpy as np
import pytest

from peft_lab.metrics import METRICS
from peft_lab.metrics.per_row import BOUNDS, jackknife_values
from peft_lab.metrics.predictions import Predictions

DRAW = np.random.default_rng(0)


@pytest.mark.parametrize("metric", ["mae", "rmse", "r2"])
@pytest.mark.parametrize("shift", [0.0, 1e6])
def test_errors_of_numbers_without_each_row(metric: str, shift: float) -> None:
    reference = DRAW.normal(size=40) + shift
    prediction = reference + DRAW.normal(size=40)
    function = METRICS[metric].function
    items = Predictions("regression", {"reference": reference, "prediction": prediction})
    value, rows = jackknife_values(metric, items)
    assert value == pytest.approx(function(prediction, reference), rel=1e-6)
    for row in (0, 17, 39):
        without = function(np.delete(prediction, row), np.delete(reference, row))
        assert rows[row] == pytest.approx(40 * value - 39 * without, rel=1e-4, abs=1e-4)
    assert BOUNDS[metric][0] <= value <= BOUNDS[metric][1]


def test_r2_of_constant_references_is_that_of_scikit_learn() -> None:
    same = np.full(5, 2.0)
    for prediction, expected in ((same, 1.0), (np.array([2.0, 2, 2, 2, 3]), 0.0)):
        items = Predictions("regression", {"reference": same, "prediction": prediction})
        assert jackknife_values("r2", items)[0] == METRICS["r2"].function(prediction, same) == expected
