"""Fingerprints of quantised weights, quantised here to 16 levels a row."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_lab.adapter_files import safe_files
from peft_lab.adapter_files.base_fingerprint import any_base, check, compare, fingerprint
from peft_lab.errors import AdapterMismatchError

WEIGHTS = [torch.randn(24, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(12)]


def quantised(weight: Tensor, name: str = "four-bits") -> dict[str, Any]:
    """Fingerprint of a weight rounded to 15 levels between the extremes of each row."""
    step = weight.abs().amax(1, keepdim=True) / 7
    values = (weight / step).round() * step
    return {**fingerprint(values), "quantization": name, "rms": values.square().mean().sqrt().item()}


def records(weights: list[Tensor], form: str) -> dict[str, dict[str, Any]]:
    found = {}
    for index, weight in enumerate(weights):
        found[str(index)] = quantised(weight, form) if form else fingerprint(weight)
    return found


def noisy(share: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(99)
    return [weight + share * torch.randn(weight.shape, generator=generator) for weight in WEIGHTS]


@pytest.mark.parametrize(("there", "here"), [("four-bits", ""), ("", "four-bits"), ("four-bits", "other")])
def test_the_same_base_in_another_form_is_accepted_and_said(
    there: str, here: str, caplog: pytest.LogCaptureFixture
) -> None:
    recorded, found = records(WEIGHTS, there), records(WEIGHTS, here)
    safe_files.check_fingerprints(recorded, "a test")
    with caplog.at_level(logging.WARNING, "peft_lab"):
        check(recorded, recorded, dtype_bound=True)
        assert not caplog.records
        # another name for the same values is no other form
        if {there, here} == {"four-bits", "other"}:
            assert compare(recorded["0"], found["0"]) == "same"
            return
        check(recorded, found, dtype_bound=False)
    assert len(caplog.records) == 1
    assert "12 modules" in caplog.text
    with pytest.raises(AdapterMismatchError, match="save_bases=True"):
        check(recorded, found, dtype_bound=True)


@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize(("there", "here"), [("four-bits", ""), ("", "four-bits"), ("four-bits", "four-bits")])
def test_another_base_is_refused_in_any_form(there: str, here: str, share: float) -> None:
    recorded, found = records(WEIGHTS, there), records(noisy(share), here)
    with pytest.raises(AdapterMismatchError, match="checkpoint and revision"):
        check(recorded, found, dtype_bound=False)
    with any_base():
        check(recorded, found, dtype_bound=False)


def test_a_change_below_the_error_of_quantising_is_told_in_the_same_form_alone() -> None:
    near = noisy(0.03)
    check(records(WEIGHTS, "four-bits"), records(near, ""), dtype_bound=False)
    with pytest.raises(AdapterMismatchError, match="other scales"):
        check(records(WEIGHTS, "four-bits"), records(near, "four-bits"), dtype_bound=False)
    with pytest.raises(AdapterMismatchError, match="sha256"):
        check(records(WEIGHTS, ""), records(near, ""), dtype_bound=False)


def test_one_wholly_different_module_is_found_among_many() -> None:
    found = records([*WEIGHTS[:5], -WEIGHTS[5], *WEIGHTS[6:]], "")
    with pytest.raises(AdapterMismatchError, match='"5"'):
        check(records(WEIGHTS, "four-bits"), found, dtype_bound=False)


def test_weights_without_values_are_compared_by_their_hash() -> None:
    packed = {"shape": [24, 32], "dtype": "int32", "sha256": "a", "probe": [], "quantization": "gptq"}
    assert compare(packed, packed) == "same"
    assert compare(packed, fingerprint(WEIGHTS[0])) == "weights"
