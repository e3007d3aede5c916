"""What prompts in the sequence cannot do: each is refused in a sentence, and works where the adapter is off."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.backbones import TINY
from support.properties import adapt, assert_close, config, move, output
from support.sequences import GENERATE, methods, padded_texts, positions, two_adapters
from transformers import DynamicCache

from peft_lab.errors import ConfigError
from peft_lab.tuners.sequence.layer import SequenceLayer


def _llama(method: str, **settings: Any) -> Any:
    base = TINY["llama"]()
    for name, value in settings.items():
        setattr(base.config, name, value)
    return move(adapt(method, base))


@methods
def test_static_cache_is_refused(method):
    with pytest.raises(ConfigError, match=r"cache that grows.*cache_implementation"):
        _llama(method).generate(**padded_texts(), cache_implementation="static", **GENERATE)


@methods
def test_chunked_prefill_is_refused(method):
    model = _llama(method)
    for size in (2, 8):
        with pytest.raises(ConfigError, match="prefill_chunk_size"):
            model.generate(**padded_texts(), prefill_chunk_size=size, **GENERATE)
    settings = copy.deepcopy(model.generation_config)
    settings.prefill_chunk_size = 8
    with pytest.raises(ConfigError, match="prefill_chunk_size"):
        model.generate(**padded_texts(), generation_config=settings)
    others = {"prefill_chunk_size": 4, "prompt_lookup_num_tokens": 2, "assistant_model": TINY["llama"]()}
    for name, value in others.items():
        with pytest.raises(ConfigError, match=f"leave out {name}"):  # without peft's wrapper
            model.get_base_model().generate(**padded_texts(), **{name: value}, **GENERATE)


@methods
@torch.no_grad()
def test_cache_from_elsewhere_is_refused(method):
    model, cache = _llama(method), DynamicCache()
    with model.disable_adapter():
        model(padded_texts()["input_ids"], past_key_values=cache)
    with pytest.raises(ConfigError, match="not filled with these prompts"):
        model(torch.tensor([[5], [6]]), past_key_values=cache)
    cache = DynamicCache()
    model(padded_texts()["input_ids"], past_key_values=cache)
    with model.disable_adapter(), pytest.raises(ConfigError, match=r"holds the prompts of default.*switched off"):
        model(torch.tensor([[5], [6]]), past_key_values=cache)
    model.add_adapter("other", config(method))
    model.set_adapter("other")
    with pytest.raises(ConfigError, match="holds the prompts of default, and this call has the adapters other"):
        model(torch.tensor([[5], [6]]), past_key_values=cache)
    with pytest.raises(ConfigError, match="this call has the adapters default, other"):
        model(torch.tensor([[5], [6]]), past_key_values=cache, adapter_names=["default", "other"])


@methods
@torch.no_grad()
def test_a_copied_cache_goes_on_as_its_original(method):
    model, cache = _llama(method), DynamicCache()
    model(padded_texts()["input_ids"], past_key_values=cache)
    copied, step = copy.deepcopy(cache), torch.tensor([[5], [6]])
    assert_close(model(step, past_key_values=copied).logits, model(step, past_key_values=cache).logits, 1e-6)


@methods
def test_packed_sequences_are_refused(method):
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5]])
    with pytest.raises(ConfigError, match="Packed sequences"):
        _llama(method)(padded_texts()["input_ids"][1:], position_ids=positions)


@methods
@torch.no_grad()
def test_what_is_refused_works_without_the_adapter(method):
    """Static caches, chunks, packed texts and caches that go on, where the adapter is off; and positions at padding."""
    base, model = TINY["llama"](), _llama(method)
    packed = {"input_ids": padded_texts()["input_ids"][1:], "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5]])}
    chunked = {**padded_texts(), "prefill_chunk_size": 4, **GENERATE}
    static = {**padded_texts(), "cache_implementation": "static", **GENERATE}
    with model.disable_adapter():
        assert torch.equal(model(**packed).logits, base(**packed).logits)
        assert torch.equal(model.generate(**chunked), base.generate(**chunked))
        assert torch.equal(model.generate(**static), base.generate(**static))
    filled = positions(padded_texts()["attention_mask"]).masked_fill(padded_texts()["attention_mask"] == 0, 1)
    assert_close(
        model(**padded_texts(), position_ids=filled).logits[0, 4:],
        model(padded_texts()["input_ids"][:1, 4:]).logits[0],
        1e-5,
    )


@methods
@torch.no_grad()
def test_sliding_windows(method):
    """Refused where prompts would leave the window that a cache keeps; right where they stay, and without a cache."""
    base = TINY["mistral"]()
    base.config.sliding_window = 9
    model = move(adapt(method, base))
    with pytest.raises(ConfigError, match=r"sliding window of 9.*use_cache=False"):
        model.generate(**padded_texts(), **GENERATE)
    assert model.generate(**padded_texts(), use_cache=False, **GENERATE).shape == (2, 13)
    model.add_adapter("some", config(method, layers_to_transform=[0]))
    model.set_adapter("some")
    move(model, "some")
    with pytest.raises(ConfigError, match="sliding window"):
        model.generate(**padded_texts(), **GENERATE)


@methods
def test_two_active_adapters_are_refused(method):
    model = two_adapters(method, "llama")
    model.base_model.set_adapter(["default", "other"])
    try:
        with pytest.raises(ConfigError, match="one adapter active at a time, not default, other"):
            model(**padded_texts())
    finally:
        model.set_adapter("default")


@methods
def test_block_without_its_backbone_is_refused(method):
    model = two_adapters(method, "llama")
    block = next(m for m in model.modules() if isinstance(m, SequenceLayer))
    with pytest.raises(ConfigError, match="without its backbone"):
        block(torch.zeros(1, 3, 16))


@methods
def test_an_error_in_a_forward_leaves_nothing_behind(method):
    model = two_adapters(method, "llama")
    expected = output(model, padded_texts())
    with pytest.raises(IndexError):
        model(torch.tensor([[1, 10_000]]))
    assert torch.equal(output(model, padded_texts()), expected)
    with pytest.raises(ConfigError, match="without its backbone"):
        next(m for m in model.modules() if isinstance(m, SequenceLayer))(torch.zeros(1, 3, 16))
