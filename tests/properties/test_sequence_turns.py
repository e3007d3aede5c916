"""Calls of `generate` with prompts: what they write is the same with and without a cache, and in one turn or two."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from support.backbones import _SEQ2SEQ, _T5, TINY, _build
from support.cover import cover
from support.properties import SEQUENCE, adapt, assert_close, move
from support.sequences import GENERATE, methods, padded_texts, two_adapters
from torch import Tensor
from torch.nn.functional import pad

import peft_lab
from peft_lab.errors import ConfigError
from peft_lab.tuners.registration import config_class

#: Ways to write; a sample is drawn from one seed.
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sample": {"do_sample": True, "num_return_sequences": 2, "top_k": 5},
}
#: Decoders alone and behind encoders: rotary, learned and relative positions, given or counted by the decoder itself.
BEHIND_ENCODERS = ("t5", "umt5", "bart", "whisper")
WRITERS = ("llama", "gpt2", "opt", "gemma3_text", *BEHIND_ENCODERS)
#: Methods whose prompts depend on the text.
READING = [m for m in SEQUENCE if any(i.name == "instruction_mask" for i in config_class(m)().row_inputs())]


def _base(family: str) -> Any:
    import transformers as hf

    if family == "bart":
        return _build(hf.BartForConditionalGeneration, max_position_embeddings=64, **_SEQ2SEQ)
    return _build(hf.UMT5ForConditionalGeneration, **_T5) if family == "umt5" else TINY[family]()


def _inputs(family: str) -> dict[str, Tensor]:
    if family == "whisper":
        return {"input_features": torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(1))}
    return padded_texts()


def _written(model: Any, inputs: dict[str, Any], **settings: Any) -> Tensor:
    torch.manual_seed(0)
    return model.generate(**inputs, **{**GENERATE, **settings})


@pytest.mark.parametrize(
    ("method", "family", "mode", "some_blocks"),
    # A cache of sliding windows is refused where only some blocks have prompts.
    cover(c for c in itertools.product(SEQUENCE, WRITERS, MODES, (False, True)) if c[1] != "gemma3_text" or not c[3]),
)
def test_without_a_cache_as_with_one(method, family, mode, some_blocks):
    """Nothing that is written changes the prompts."""
    fields = {"layers_to_transform": [1]} if some_blocks else {}
    stack = {"stack": "decoder"} if family in BEHIND_ENCODERS else {}
    model, inputs = move(adapt(method, _base(family), **fields, **stack), scale=0.5), _inputs(family)
    if stack and family != "whisper":
        inputs = {**inputs, "decoder_input_ids": torch.tensor([[1, 7, 8], [1, 5, 6]])}
    expected = _written(model, inputs, **MODES[mode])
    assert torch.equal(_written(model, inputs, **MODES[mode], use_cache=False), expected)
    # Nor does what another call has written, nor a copy of the model.
    assert torch.equal(_written(pickle.loads(pickle.dumps(model)), inputs, **MODES[mode], use_cache=False), expected)


@pytest.mark.parametrize(
    ("method", "mode", "cached", "door"),
    cover(itertools.product(READING, MODES, (True, False), ("argument", "around", "base"))),
)
def test_an_instruction_that_is_given(method, mode, cached, door):
    """By argument, around the call, and without peft's wrapper: prompts are made from it, in every step."""
    model, inputs = two_adapters(method, "llama"), padded_texts()
    mask, rows = inputs["attention_mask"].clone(), {}
    mask[:, -2:] = 0
    settings = {**MODES[mode], "use_cache": cached}
    with peft_lab.row_inputs(instruction_mask=mask):
        expected = _written(model, inputs, **MODES[mode])
    if door == "around":
        with peft_lab.row_inputs(instruction_mask=mask):
            found = _written(model, inputs, **settings)
    else:
        rows = {"instruction_mask": mask}
        found = _written(model if door == "argument" else model.get_base_model(), {**inputs, **rows}, **settings)
    assert torch.equal(found, expected)
    assert not torch.equal(_written(model, inputs, **MODES[mode]), expected)
    with pytest.raises(ConfigError, match=r"instruction_mask has shape \[2, 9\], expected \[2, 10\]"):
        model(torch.ones(2, 10, dtype=torch.long), instruction_mask=mask)


@pytest.mark.parametrize(
    ("method", "family", "given"),
    cover(itertools.product(SEQUENCE, ("llama", "gpt2", "opt", "gemma3_text"), ("whole", "new", "embeddings"))),
)
@torch.no_grad()
def test_a_second_turn_goes_on_with_the_cache(method, family, given):
    """The tokens of a second question are read behind the first answer, and the prompts are those of the first turn."""
    model, inputs = move(adapt(method, _base(family)), scale=0.5), padded_texts()
    settings = {"return_dict_in_generate": True, "output_logits": True}
    first = _written(model, inputs, **settings)
    ids = torch.cat([first.sequences, torch.tensor([[7, 8, 9], [9, 10, 11]])], 1)
    mask = pad(inputs["attention_mask"], (0, ids.shape[1] - 9), value=1)
    second = {"input_ids": ids, "attention_mask": mask}
    if method in READING:
        with peft_lab.row_inputs(instruction_mask=inputs["attention_mask"]):
            expected = _written(model, second, use_cache=False, **settings)
    else:
        expected = _written(model, second, use_cache=False, **settings)
    # The last token that was written is not in the cache.
    if given == "new":
        second["input_ids"] = ids[:, -4:]
    elif given == "embeddings":
        second = {"inputs_embeds": model.get_input_embeddings()(ids), "attention_mask": mask}
    cache = copy.deepcopy(first.past_key_values)
    found = _written(model, second, past_key_values=cache, **settings)
    assert_close(torch.stack(found.logits), torch.stack(expected.logits), 1e-4)
    assert torch.equal(found.sequences[:, -4:], expected.sequences[:, -4:])
    assert "get_seq_length" not in vars(cache)
    # A third turn, and the caller's own loop.
    step = model(torch.tensor([[5], [6]]), attention_mask=pad(mask, (0, 4), value=1), past_key_values=cache)
    longer = torch.cat([ids, expected.sequences[:, -4:-1], torch.tensor([[5], [6]])], 1)
    rows = {"instruction_mask": pad(inputs["attention_mask"], (0, longer.shape[1] - 9))} if method in READING else {}
    alone = model(longer, attention_mask=pad(mask, (0, 4), value=1), **rows)
    assert_close(step.logits[:, 0], alone.logits[:, -1], 1e-4)


@methods
def test_a_second_turn_is_refused_where_its_prompts_are_others(method):
    model, inputs = two_adapters(method, "llama"), padded_texts()
    first = _written(model, inputs, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, torch.tensor([[7, 8], [9, 10]])], 1)
    second = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with pytest.raises(ConfigError, match="prompts of default, and this call has the adapters other, default"):
        _written(model, {**second, "adapter_names": ["other", "default"]}, past_key_values=first.past_key_values)
    with pytest.raises(ConfigError, match=r"holds prompts already.*leave out instruction_mask"):
        _written(model, second, past_key_values=first.past_key_values, instruction_mask=torch.ones_like(ids))
    with model.disable_adapter(), pytest.raises(ConfigError, match="switched off: let generate"):
        _written(model, second, past_key_values=first.past_key_values)


@methods
def test_a_call_leaves_nothing_behind(method):
    """Two calls with texts of different lengths, one inside the other's criteria, are as each alone; unloading too."""
    model, inputs = move(adapt(method, TINY["gpt2"]()), scale=0.5), padded_texts()
    short = {name: value[1:, :3] for name, value in inputs.items()}
    alone = _written(model, short, use_cache=False)
    inner = []

    def criterion(ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        inner.append(_written(model, short, use_cache=False))
        return torch.zeros(len(ids), dtype=torch.bool)

    expected = _written(model, inputs, use_cache=False)
    found = model.generate(**inputs, **GENERATE, use_cache=False, stopping_criteria=[criterion])
    assert torch.equal(found, expected)
    assert inner
    assert all(torch.equal(each, alone) for each in inner)
    unloaded = model.unload()
    assert torch.equal(_written(unloaded, inputs), _written(TINY["gpt2"](), inputs))
    assert "generate" not in vars(unloaded)
