"""Life of an adapter of every method: put on, switched, saved, loaded, merged, copied and taken away."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from support.backbones import TINY, tiny_inputs
from support.cover import MAIN, cover, places_and_families
from support.properties import (
    CONVOLUTIONAL,
    DRAWS,
    EVERY_OWN,
    FITTED,
    HEADS,
    KEEPS_HEAD,
    NO_SEQUENCE,
    OWN,
    SEQUENCE,
    UNTRAINED,
    adapt,
    adapter_parameters,
    assert_close,
    config,
    equal_states,
    equal_weights,
    home,
    move,
    needs_add_adapter,
    output,
    pairs,
)

from peft_lab import registry
from peft_lab.errors import ConfigError

own = pytest.mark.parametrize("method", EVERY_OWN)


@pairs([*OWN, *KEEPS_HEAD, *DRAWS, *HEADS], TINY, places_and_families)
@torch.no_grad()
def test_life_of_an_adapter(base, method, family, tmp_path):
    """Start, effect, disabling, saving, loading, merging and unmerging on one model."""
    inputs = tiny_inputs(base)
    # A frozen copy: nn.MultiheadAttention (SigLIP's pooling head) rounds otherwise where its weights require grad.
    plain = output(copy.deepcopy(base).requires_grad_(False), inputs)
    model = adapt(method, base)
    assert torch.equal(output(model, inputs), plain) == registry.method(method).can("identity_start")
    moved = output(move(model), inputs)
    assert not torch.allclose(moved, plain, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(output(model, inputs), plain)
    assert torch.equal(output(model, inputs), moved)

    model.save_pretrained(tmp_path)
    # Trainable as the first one: a linear layer with a bias rounds otherwise where its weights are frozen.
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert torch.equal(output(loaded, inputs), moved)
    assert equal_states(get_peft_model_state_dict(loaded), get_peft_model_state_dict(model))

    if not registry.method(method).can("merge"):
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(NotImplementedError, match=f'Method "{method}" cannot be merged.*because'):
                merge()
        unloaded = model.unload()
        assert type(unloaded) is type(base)
        assert torch.equal(output(unloaded, inputs), plain)
        return
    if family in CONVOLUTIONAL:  # their tiny models amplify the rounding of float32 to a thousandth of the output
        model, inputs = model.double(), {name: value.double() for name, value in inputs.items()}
        moved = output(model, inputs)
        with model.disable_adapter():
            plain = output(model, inputs)
    try:
        model.merge_adapter()
    except ConfigError as error:  # the family has no place for a bias; test_merging.py has all of this
        assert str(error).startswith(f"{type(base).__name__} has no place")  # noqa: PT017
        assert torch.equal(output(model, inputs), moved)
        assert torch.equal(output(model.unload(), inputs), plain)
        return
    assert_close(output(model, inputs), moved)
    with model.disable_adapter():
        assert torch.equal(output(model, inputs), plain)
    model.unmerge_adapter()
    assert torch.equal(output(model, inputs), moved)
    merged = model.merge_and_unload()
    assert type(merged) is type(base)
    assert_close(output(merged, inputs), moved)


@pytest.mark.parametrize(("method", "family"), cover(itertools.product(SEQUENCE, NO_SEQUENCE)))
def test_families_without_a_place_for_prompts_are_refused(base, method, family):
    with pytest.raises(ConfigError, match="prompts"):
        adapt(method, base)


@pairs([*OWN, *KEEPS_HEAD, *DRAWS, *HEADS], MAIN)
def test_several_adapters_on_one_model(base, method, family):
    inputs = tiny_inputs(base)
    model = adapt(method, base)
    model.add_adapter("second", config(method))
    move(model, "default", seed=1), move(model, "second", seed=2)
    first = output(model, inputs)
    model.set_adapter("second")
    second = output(model, inputs)
    assert not torch.allclose(first, second, atol=1e-5)
    model.set_adapter("default")
    assert torch.equal(output(model, inputs), first)
    model.delete_adapter("default")
    assert torch.equal(output(model, inputs), second)
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("default")
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter("second", config(method))


@needs_add_adapter
@pytest.mark.parametrize("method", [*OWN, *KEEPS_HEAD, *DRAWS, *HEADS])
def test_transformers_own_adapter_methods(method, tmp_path):
    base = TINY["vit"]()
    inputs = tiny_inputs(base)
    plain = output(base, inputs)
    base.add_adapter(config(method), adapter_name="first")
    base.add_adapter(config(method), adapter_name="second")
    move(base, "first", seed=1), move(base, "second", seed=2)
    base.set_adapter("first")
    first = output(base, inputs)
    base.set_adapter("second")
    assert not torch.allclose(output(base, inputs), first, atol=1e-5)
    base.set_adapter("first")
    base.save_pretrained(tmp_path)
    base.disable_adapters()
    assert torch.equal(output(base, inputs), plain)
    base.enable_adapters()
    base.delete_adapter("second")
    torch.testing.assert_close(output(base, inputs), first)
    again = TINY["vit"]()
    again.load_adapter(tmp_path)
    torch.testing.assert_close(output(again, inputs), first)


@pairs([*OWN, *KEEPS_HEAD, *DRAWS, *HEADS], ["bert", "vit"])
def test_a_pickled_model_is_the_same(base, method, family):
    model = move(adapt(method, base))
    expected = output(model, tiny_inputs(base))
    again = pickle.loads(pickle.dumps(model))
    assert type(again.base_model) is type(model.base_model)
    assert torch.equal(output(again, tiny_inputs(base)), expected)
    with again.disable_adapter():
        assert torch.equal(output(again, tiny_inputs(base)), output(base, tiny_inputs(base)))


@own
def test_same_seed_same_adapter(method):
    base = TINY[home(method)]()
    one, two = adapt(method, base, seed=3), adapt(method, base, seed=3)
    assert equal_weights(one, two)


@own
def test_nothing_is_trained_in_inference_mode(method, tmp_path):
    base = TINY[home(method)]()
    adapt(method, base).save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).peft_type == method.upper()
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert not [n for n, p in loaded.named_parameters() if p.requires_grad]
    trainable = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    wanted = {n for n, p in trainable.named_parameters() if p.requires_grad}
    assert bool(wanted) == (method not in FITTED)
    assert method in UNTRAINED or wanted >= set(adapter_parameters(trainable))


@own
def test_model_status_names_the_method(method):
    status = adapt(method, TINY[home(method)]()).get_model_status()
    assert status.peft_types == {"default": method.upper()}
    trained = {"default": "irregular" if method in UNTRAINED else True}
    assert status.requires_grad == ({} if method in FITTED else trained)
    assert status.available_adapters == ["default"]
