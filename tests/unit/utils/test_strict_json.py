"""JSON text without NaN, whatever is in the values."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from peft_lab.utils.strict_json import dumps, finite


def refuse(name: str) -> None:
    raise ValueError(name)


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, np.float32("nan"), np.float64("inf"), torch.tensor(math.nan)], ids=repr
)
@pytest.mark.parametrize("place", [lambda v: v, lambda v: [v], lambda v: (1, {"a": [v]}), lambda v: {"a": {"b": v}}])
def test_a_number_that_is_not_finite_is_null_wherever_it_stands(value, place):
    assert json.loads(dumps(place(value)), parse_constant=refuse) == json.loads(json.dumps(place(None)))


def test_everything_else_stays_as_it_is():
    values = {"a": 1, "b": [0.1, True, None, "nan"], "c": np.float32(0.5), "d": torch.tensor(3), "e": {"z", "y"}}
    expected = {"a": 1, "b": [0.1, True, None, "nan"], "c": 0.5, "d": 3, "e": ["y", "z"]}
    assert json.loads(dumps(values)) == expected == finite(values)
    assert json.loads(dumps({"dtype": torch.float16})) == {"dtype": "torch.float16"}
