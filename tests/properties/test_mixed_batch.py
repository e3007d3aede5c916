"""Batches of every method in which each row has an adapter of its own."""

from __future__ import annotations

import pytest
import torch
from support.backbones import TINY, tiny_inputs
from support.cover import MAIN
from support.properties import (
    EVERY_OWN,
    HEADS,
    ON_OPS,
    OWN,
    adapt,
    assert_close,
    backward,
    config,
    main_tensor,
    move,
    output,
    pairs,
    text_or_image,
)
from torch import nn
from transformers import GenerationConfig

from peft_lab import registry
from peft_lab.errors import ConfigError


@pairs([*OWN, *HEADS], MAIN)
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


@pairs([*OWN, *HEADS], ["bert", "llama", "vit"])
def test_there_is_one_name_for_each_row(base, method, family):
    if not registry.method(method).can("mixed_batch"):
        pytest.skip("serves no mixed batches")
    inputs = {k: v for k, v in tiny_inputs(base, batch=4).items() if not k.startswith("decoder")}
    model = adapt(method, base)
    calls = [lambda names: model(**inputs, adapter_names=names)]
    calls.append(lambda names: model(inputs[base.main_input_name], adapter_names=names))
    if family == "llama":
        calls.append(lambda names: model.generate(**inputs, adapter_names=names, max_new_tokens=1))
        calls.append(lambda names: model.generate(inputs["input_ids"], adapter_names=names, num_beams=2))
        embedded = base.get_input_embeddings()(inputs["input_ids"])
        calls.append(lambda names: model(inputs_embeds=embedded, adapter_names=names))
    for names in (["default"] * 2, ["default"] * 5, ["__base__"], ["__base__"] * 8, []):
        for call in calls:
            with pytest.raises(ConfigError, match=rf"`adapter_names` .* got {len(names)} and 4 "):
                call(names)
    with pytest.raises(ConfigError, match="one name per row"):
        calls[0]("default")


class _Net(nn.Module):
    """A model of one's own, whose input has another name than those of transformers."""

    def __init__(self):
        super().__init__()
        self.body, self.top = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, batch, gain=1.0):
        return self.top(self.body(batch) * gain)


@pytest.mark.parametrize("method", [m for m in ON_OPS if registry.method(m).can("mixed_batch")])
def test_there_is_one_name_for_each_row_of_a_model_of_ones_own(method):
    model, rows = adapt(method, _Net(), target_modules=["body"]), torch.randn(4, 4)
    # Names of the base alone reach no layer that would count them.
    for names in (["default"] * 2, ["__base__"] * 8):
        for call in (lambda n: model(rows, adapter_names=n), lambda n: model(gain=2.0, batch=rows, adapter_names=n)):
            with pytest.raises(ConfigError, match=rf"`adapter_names` .* got {len(names)} and 4 "):
                call(names)
    assert model(rows, adapter_names=["default"] * 4).shape == (4, 2)


@pytest.mark.parametrize("method", [m for m in OWN if registry.method(m).can("mixed_batch")])
def test_rows_without_a_head_of_their_own_have_the_head_of_the_base(method):
    base = TINY["bert"]()
    model = adapt(method, base)
    model.add_adapter("headless", config(method, modules_to_save=[]))
    move(model, "default", seed=1), move(model, "headless", seed=2)
    with torch.no_grad():
        model.get_base_model().classifier.modules_to_save["default"].weight.add_(1.0)
    inputs, names = tiny_inputs(base, batch=4), ["headless", "default", "__base__", "default"]
    alone = {name: output(model, inputs, adapter_names=[name] * 4) for name in names}
    for active in ("default", "headless"):
        model.set_adapter(active)
        assert_close(alone[active], output(model, inputs), 5e-5)
        mixed = output(model, inputs, adapter_names=names)
        for row, name in enumerate(names):
            assert_close(mixed[row], alone[name][row], 5e-5)


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
    backward(method, found.square().mean())


@pairs(OWN, ["llama", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_one_adapter_a_row(base, method, family, beams):
    """Beams are given as an argument or in a generation config, and a head that is saved sees them as rows."""
    inputs = {k: v for k, v in tiny_inputs(base, batch=3).items() if not k.startswith("decoder")}
    model = adapt(method, base, modules_to_save=["lm_head"])
    model.add_adapter("second", config(method, modules_to_save=["lm_head"]))
    move(model, "default", seed=1), move(model, "second", seed=2)
    settings = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
    if family == "llama":
        settings = {"generation_config": GenerationConfig(pad_token_id=0, **settings)}
    mixed = model.generate(**inputs, adapter_names=["second", "__base__", "default"], **settings)
    model.set_adapter("second")
    alone = model.generate(**inputs, **settings)
    assert torch.equal(mixed[0, : alone.shape[1]], alone[0, : mixed.shape[1]])
