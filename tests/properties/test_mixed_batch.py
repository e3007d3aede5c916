"""Batches of every method in which each row has an adapter of its own."""

from __future__ import annotations

import pytest
import torch
from support.backbones import TINY, tiny_inputs
from support.cover import MAIN
from support.properties import (
    EVERY_OWN,
    OWN,
    adapt,
    assert_close,
    config,
    main_tensor,
    move,
    output,
    pairs,
    text_or_image,
)

from peft_lab import registry


@pairs(OWN, MAIN)
def test_mixed_batch_equals_each_row_alone(base, method, family):
    names = ["second", "__base__", "default", "second"]
    inputs = tiny_inputs(base, batch=4)
    model = adapt(method, base)
    model.add_adapter("second", config(method))
    move(model, "default", seed=1), move(model, "second", seed=2)
    mixed = output(model, inputs, adapter_names=names)
    for row, name in enumerate(names):
        one = {k: v[row : row + 1] for k, v in inputs.items()}
        alone = output(model, one, adapter_names=[name])
        assert_close(mixed[row : row + 1], alone, 5e-5)
    model.set_adapter("second")
    assert_close(mixed[[0, 3]], output(model, inputs)[[0, 3]], 5e-5)
    with pytest.raises(ValueError, match="non-existing"):
        output(model, inputs, adapter_names=["nobody"] * 4)
    with pytest.raises(ValueError, match="eval"):
        model.train()(**inputs, adapter_names=names)


@pytest.mark.parametrize("method", EVERY_OWN)
def test_rows_of_a_mixed_batch_may_have_gradients_after_inference_mode(method):
    if not registry.method(method).can("mixed_batch"):
        pytest.skip("serves no mixed batches")
    base = TINY[text_or_image(method)]()
    names = [f"{method}_after", "default"]  # of this test alone: what belongs to names is kept
    model = adapt(method, base)
    model.add_adapter(names[0], config(method))
    move(model), move(model, names[0], seed=2)
    inputs = tiny_inputs(base)
    with torch.inference_mode():
        expected = main_tensor(model.eval()(**inputs, adapter_names=names))
    found = main_tensor(model(**inputs, adapter_names=names))
    assert torch.equal(found, expected)
    found.square().mean().backward()


@pairs(OWN, ["llama", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_one_adapter_a_row(base, method, family, beams):
    inputs = {k: v for k, v in tiny_inputs(base, batch=3).items() if not k.startswith("decoder")}
    model = adapt(method, base)
    model.add_adapter("second", config(method))
    move(model, "default", seed=1), move(model, "second", seed=2)
    settings = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
    mixed = model.generate(**inputs, adapter_names=["second", "__base__", "default"], **settings)
    model.set_adapter("second")
    alone = model.generate(**inputs, **settings)
    assert torch.equal(mixed[0, : alone.shape[1]], alone[0, : mixed.shape[1]])
