"""Prompts in texts that go on: caches, padding, beams, encoder-decoders and recomputed blocks."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from support.backbones import TINY, tiny_inputs
from support.cover import cover
from support.properties import SEQUENCE, TRAINED, adapt, adapter_parameters, assert_close, move, output
from support.sequences import DECODERS, GENERATE, methods, padded_texts, positions, spread, two_adapters, with_attention
from transformers import DynamicCache

from peft_lab.errors import ConfigError
from peft_lab.tuners.sequence.layer import SequenceLayer


@pytest.mark.parametrize(
    ("method", "family", "attention"), cover((m, *case) for m in SEQUENCE for case in with_attention(DECODERS))
)
@torch.no_grad()
def test_decoder(method, family, attention):
    """Left padding, a cache, generation and teacher forcing all give the same logits."""
    _check_decoder(two_adapters(method, family, attention))


@spread(DECODERS, ("sdpa", "eager"))
@torch.no_grad()
def test_decoder_with_prompts_before_some_blocks(method, family, attention):
    model = two_adapters(method, family, attention)
    model.set_adapter("other")
    _check_decoder(model)


def _check_decoder(model: Any) -> None:
    inputs = padded_texts()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    full = model(**inputs, position_ids=positions(mask), use_cache=False).logits
    single = model(input_ids=ids[:1, 4:]).logits
    assert_close(full[0, 4:], single[0], 1e-5)

    cache = DynamicCache(config=model.config)
    instruction = mask.clone()
    instruction[:, -2:] = 0  # the last two tokens come one by one
    whole = model(**inputs, position_ids=positions(mask), use_cache=False, instruction_mask=instruction).logits
    start = model(
        input_ids=ids[:, :7], attention_mask=mask[:, :7], position_ids=positions(mask)[:, :7], past_key_values=cache
    ).logits
    assert_close(start[:, 4:], whole[:, 4:7], 1e-4)
    for step in (7, 8):
        place = positions(mask)[:, step : step + 1]
        next_token = {"input_ids": ids[:, step : step + 1], "attention_mask": mask[:, : step + 1]}
        out = model(**next_token, position_ids=place, past_key_values=cache)
        assert_close(out.logits[:, 0], whole[:, step], 1e-4)

    out = model.generate(**inputs, output_logits=True, return_dict_in_generate=True, **GENERATE)
    mask = torch.cat([mask, torch.ones_like(mask[:, :4])], 1)
    forced = model(
        input_ids=out.sequences,
        attention_mask=mask,
        position_ids=positions(mask),
        use_cache=False,
        instruction_mask=torch.nn.functional.pad(inputs["attention_mask"], (0, 4)),
    ).logits
    assert_close(torch.stack(out.logits, 1), forced[:, 8:-1], 2e-4)


@spread(DECODERS)
@torch.no_grad()
def test_a_cache_without_positions_and_masks(method, family, attention):
    """A step on a cache counts the tokens before it, not the prompts."""
    model, ids = two_adapters(method, family, attention), padded_texts()["input_ids"][1:]
    for name in ("default", "other"):
        model.set_adapter(name)
        instruction = torch.tensor([[1] * 7 + [0] * 2])
        whole, cache = (
            model(ids, use_cache=False, instruction_mask=instruction).logits,
            DynamicCache(config=model.config),
        )
        assert_close(model(ids[:, :7], past_key_values=cache).logits, whole[:, :7], 1e-4)
        for step in (7, 8):
            assert_close(model(ids[:, step : step + 1], past_key_values=cache).logits[:, 0], whole[:, step], 1e-4)


@spread(DECODERS)
@torch.no_grad()
def test_rows_of_a_batch_decode_as_alone(method, family, attention):
    """Different numbers of prompts in different blocks, rows without any, and beams."""
    model, inputs = two_adapters(method, family), padded_texts()
    four = {key: value.repeat(2, 1)[:3] for key, value in inputs.items()}
    names, settings = ["default", "other", "__base__"], {"output_logits": True, "return_dict_in_generate": True}
    mixed = torch.stack(model.generate(**four, adapter_names=names, **settings, **GENERATE).logits, 1)
    for row, name in enumerate(names):
        alone = torch.stack(model.generate(**four, adapter_names=[name] * 3, **settings, **GENERATE).logits, 1)
        assert_close(mixed[row], alone[row], 1e-5)
    with model.disable_adapter():
        plain = torch.stack(model.generate(**four, **settings, **GENERATE).logits, 1)
    assert_close(mixed[2], plain[2], 1e-5)
    beams = model.generate(**inputs, adapter_names=["default", "other"], num_beams=3, **GENERATE)
    model.set_adapter("other")
    assert torch.equal(beams[1], model.generate(**inputs, num_beams=3, **GENERATE)[1])
    model.set_adapter("default")
    assert torch.equal(beams[0], model.generate(**inputs, num_beams=3, **GENERATE)[0])


@methods
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_embeddings_instead_of_tokens(method, family):
    model, inputs = two_adapters(method, family), padded_texts()
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    mask = inputs["attention_mask"]
    expected = model.generate(**inputs, **GENERATE)[:, 9:]
    assert torch.equal(model.generate(inputs_embeds=embeddings, attention_mask=mask, **GENERATE), expected)
    assert_close(model(inputs_embeds=embeddings).logits, model(input_ids=inputs["input_ids"]).logits, 1e-6)


@methods
@torch.no_grad()
def test_encoder_of_an_encoder_decoder(method):
    model, inputs = two_adapters(method, "t5"), padded_texts()
    assert all("encoder" in name for name in model.targeted_module_names)
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = model.generate(**inputs, num_beams=2, **GENERATE)
    mixed = model.generate(**inputs, adapter_names=["default", "other"], num_beams=2, **GENERATE)
    assert torch.equal(mixed[0], alone["default"][0])
    assert torch.equal(mixed[1], alone["other"][1])
    model.set_adapter("default")
    decoder = {"decoder_input_ids": torch.tensor([[0, 7, 8]])}
    padded = {"input_ids": torch.tensor([[7, 8, 9, 0, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0, 0]])}
    short = {"input_ids": torch.tensor([[7, 8, 9]]), "attention_mask": torch.tensor([[1, 1, 1]])}
    assert_close(model(**padded, **decoder).logits, model(**short, **decoder).logits, 1e-5)
    fixed = copy.deepcopy(model.get_base_model())
    assert "decoder" not in " ".join(n for n, m in fixed.named_modules() if isinstance(m, SequenceLayer))


@methods
@torch.no_grad()
def test_a_chosen_stack(method):
    base = TINY["t5"]()
    model = adapt(method, base, stack="decoder")
    assert all(name.startswith("decoder.") for name in model.targeted_module_names)
    moved = move(model)
    inputs = tiny_inputs(base)
    assert not torch.allclose(output(moved, inputs), output(base, inputs), atol=1e-4)
    model = adapt(method, TINY["clip"](), stack="text_model")
    assert all(name.startswith("text_model.") for name in model.targeted_module_names)
    with pytest.raises(ConfigError, match=r'stack="decodre" is none of .*Did you mean "decoder"'):
        adapt(method, base, stack="decodre")


@pytest.mark.parametrize(
    ("method", "family", "reentrant"),
    cover(
        itertools.product([m for m in SEQUENCE if m in TRAINED], ["gpt2", "llama", "gemma3_text", "opt"], [True, False])
    ),
)
def test_two_forwards_before_one_backward_with_checkpointing(method, family, reentrant):
    """Recomputed blocks see the prompts and the mask of their own call."""
    ids, short = padded_texts()["input_ids"], torch.tensor([[9, 8, 7], [6, 5, 9]])
    found = []
    for checkpointing in (False, True):
        model = move(adapt(method, TINY[family]())).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        losses = [
            model(x, labels=torch.where(x > 40, x, -100).index_fill(1, torch.tensor([0]), -100)) for x in (ids, short)
        ]
        first, second = (loss.logits.square().mean() for loss in losses)
        (first + 3 * second).backward()
        found.append({name: p.grad for name, p in adapter_parameters(model).items()})
    assert any(grad is not None and grad.abs().sum() > 0 for grad in found[0].values())
    for name, grad in found[0].items():
        assert_close(found[1][name], grad)
