"""Support of prompts: decoders beyond the role table, tokens before patches; and the errors of those that lack it."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import pytest
import torch
import transformers as hf
from support.backbones import _GROUPED, _SEQ2SEQ, _SPECIAL, _T5, _TEXT, TINY, WAVEFORM, _build
from support.cover import cover
from support.properties import adapt, move
from torch import Tensor, nn

from peft_lab.backbones import module_roles
from peft_lab.backbones.prompt_support import PROMPT_SUPPORT
from peft_lab.errors import ConfigError
from peft_lab.tuners.sequence.layer import SequenceLayer

_GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
_HEADS = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_DECODER = {"d_model": 16, "num_layers": 2, "attention_heads": 2, "ffn_dim": 32, "max_position_embeddings": 64}
_NEO = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "window_size": 64, "max_position_embeddings": 64}
#: Decoders that are not in the role table: caches of other names, positions made in the blocks, no attention in some.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "codegen": ("CodeGenForCausalLM", {**_GPT, "n_head": 4, "rotary_dim": 2, "n_ctx": 64, **_SPECIAL}),
    "ctrl": ("CTRLLMHeadModel", {**_GPT, "dff": 32, "vocab_size": 99}),
    "falcon": ("FalconForCausalLM", _TEXT),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", {**_GPT, **_SPECIAL}),
    "gpt_neo": ("GPTNeoForCausalLM", {**_NEO, "attention_types": [[["global", "local"], 1]], **_SPECIAL}),
    "gpt_neox": ("GPTNeoXForCausalLM", _TEXT),
    "gptj": ("GPTJForCausalLM", {**_GPT, "rotary_dim": 4, **_SPECIAL}),
    "lfm2": ("Lfm2ForCausalLM", {"num_key_value_heads": 1, "layer_types": ["conv", "full_attention"], **_TEXT}),
    "llama4_text": ("Llama4ForCausalLM", {"num_local_experts": 2, **_GROUPED}),
    "openai-gpt": ("OpenAIGPTLMHeadModel", {**_GPT, "vocab_size": 99}),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        {
            **_GROUPED,
            **_HEADS,
            **_EXPERTS,
            "layer_types": ["linear_attention", "full_attention"],
            "shared_expert_intermediate_size": 16,
        },
    ),
    "xglm": ("XGLMForCausalLM", {**_DECODER, **_SPECIAL}),
}
#: Models that do not support prompts, by `model_type`.
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("BloomForCausalLM", {"hidden_size": 16, "n_layer": 2, "n_head": 2, **_SPECIAL}),
    "falcon": ("FalconForCausalLM", {"alibi": True, **_TEXT}),
    "fnet": ("FNetForSequenceClassification", _TEXT),
    "funnel": (
        "FunnelForSequenceClassification",
        {"d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32, "block_sizes": [1, 1], "vocab_size": 99},
    ),
    "led": ("LEDForConditionalGeneration", {**_SEQ2SEQ, "attention_window": 4}),
    "longformer": ("LongformerForSequenceClassification", {"attention_window": 8, **_TEXT}),
    "longt5": ("LongT5ForConditionalGeneration", {"encoder_attention_type": "local", "local_radius": 4, **_T5}),
    "mpt": ("MptForCausalLM", {"d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 64, **_SPECIAL}),
    "roformer": ("RoFormerForSequenceClassification", {"embedding_size": 16, **_TEXT}),
    **{
        name: (f"{cls}ForSequenceClassification", WAVEFORM)
        for name, cls in {
            "wav2vec2": "Wav2Vec2",
            "hubert": "Hubert",
            "wavlm": "WavLM",
            "unispeech": "UniSpeech",
            "unispeech-sat": "UniSpeechSat",
            "data2vec-audio": "Data2VecAudio",
        }.items()
    },
    "xlm": ("XLMForSequenceClassification", {"emb_dim": 16, "n_layers": 2, "n_heads": 2, "n_words": 99}),
    "xlnet": ("XLNetLMHeadModel", {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32, "vocab_size": 99}),
}
GENERATE = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
METHODS = ("soft_prompt", "iapt")
VISION = ("vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "beit", "siglip", "ijepa")

others = pytest.mark.parametrize(("method", "family"), cover(itertools.product(METHODS, OTHERS)))


def _base(table: dict[str, tuple[str, dict[str, Any]]], family: str) -> Any:
    name, settings = table[family]
    return _build(getattr(hf, name), **settings)


def _model(method: str, family: str) -> Any:
    return move(adapt(method, _base(OTHERS, family))).eval()


def _text() -> Tensor:
    return torch.randint(5, 90, (1, 9), generator=torch.Generator().manual_seed(0))


def _labels(ids: Tensor, instruction: int) -> Tensor:
    return torch.where(torch.arange(ids.shape[1]) < instruction, -100, ids)


def test_every_family_is_named_once():
    tested = {name for name, support in PROMPT_SUPPORT.items() if support.tested and not support.obstacle}
    assert tested == set(OTHERS)
    assert not any(map(module_roles.family, OTHERS))
    refused = {name for name, support in PROMPT_SUPPORT.items() if support.obstacle}
    assert {*refused, "falcon"} == {*REFUSED, "falcon_h1"}, "one with a recurrence beside attention is refused unseen"


@others
@torch.no_grad()
def test_prompts_change_what_is_said_and_see_no_answer(method, family):
    model, ids = _model(method, family), _text()
    inputs = {"attention_mask": torch.ones_like(ids)}
    out = model(input_ids=ids, labels=_labels(ids, 4), **inputs).logits
    with model.disable_adapter():
        assert (model(input_ids=ids, **inputs).logits - out).abs().max() > 1e-3
    ids[0, -1] = 5 if ids[0, -1] > 5 else 6
    later = model(input_ids=ids, labels=_labels(ids, 4), **inputs).logits
    assert (later - out)[:, :-1].abs().max() < 1e-6


@others
@torch.no_grad()
def test_written_as_taught(method, family):
    """A text written token by token has the logits of the whole text at once."""
    model, ids = _model(method, family), _text()
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        return_dict_in_generate=True,
        output_logits=True,
        **GENERATE,
    )
    whole, mask = out.sequences, torch.ones_like(out.sequences)
    instruction = torch.arange(whole.shape[1])[None] < ids.shape[1]
    taught = model(input_ids=whole, attention_mask=mask, instruction_mask=instruction).logits
    assert (torch.stack(out.logits, 1) - taught[:, ids.shape[1] - 1 : -1]).abs().max() < 1e-5


@others
@torch.no_grad()
def test_padding_at_the_left(method, family):
    """Changes nothing; refused where blocks without attention would carry prompts through it."""
    model, ids = _model(method, family), _text()
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids[:, :6]], 1)
    mask = (torch.arange(9) >= 3).long()[None]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    if family in ("lfm2", "qwen3_next"):
        with pytest.raises(ConfigError, match=r"has no attention.*padding at the left"):
            model(input_ids=padded, attention_mask=mask)
        return
    alone = model(input_ids=ids[:, :6], attention_mask=torch.ones(1, 6, dtype=torch.long))
    for given in (None, positions):
        out = model(input_ids=padded, attention_mask=mask, position_ids=given)
        assert (out.logits[:, 3:] - alone.logits).abs().max() < 1e-5
    # Rotary positions tell distances alone, so that all of a row's may be shifted.
    if family in ("codegen", "gptj", "gpt_neox", "falcon", "llama4_text"):
        out = model(input_ids=padded, attention_mask=mask, position_ids=torch.arange(9)[None])
        assert (out.logits[:, 3:] - alone.logits).abs().max() < 1e-5


@pytest.mark.parametrize("family", REFUSED)
def test_no_room(family):
    with pytest.raises(ConfigError, match=f'does not support prompts.*model type "{family}"'):
        adapt("soft_prompt", _base(REFUSED, family))


def test_families_that_were_never_tried(caplog: pytest.LogCaptureFixture):
    """They are said to be so, and what fails in their blocks is one sentence."""
    base = TINY["llama"]()
    base.config.model_type = base.model.config.model_type = "strange"
    with caplog.at_level(logging.WARNING):
        model = adapt("soft_prompt", base)
    assert 'not been tried with model type "strange"' in caplog.text
    block = next(module for module in model.modules() if type(module).__name__ == "LlamaDecoderLayer")
    ids = _text()
    model(input_ids=ids)
    block.mlp.up_proj.weight = nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(ConfigError, match=r'model type "strange", and its blocks fail.*RuntimeError: mat1'):
        model(input_ids=ids)


@torch.no_grad()
def test_instruction_ends_at_the_first_answer():
    """What stands behind an answer has seen it, so prompts must not be made from it."""
    model, ids = move(adapt("iapt", TINY["llama"]())).eval(), _text()
    labels = torch.where((torch.arange(9) > 2) & (torch.arange(9) < 6), ids, -100)
    before = model(input_ids=ids, labels=labels).logits
    ids[0, 7] = 5 if ids[0, 7] > 5 else 6
    assert (model(input_ids=ids, labels=labels).logits - before)[:, :7].abs().max() == 0


@torch.no_grad()
def test_labels_of_tokens_are_no_text():
    """Where a causal model tags tokens, its labels say nothing of what is an answer."""
    cls, config = hf.LlamaForTokenClassification, TINY["llama"]().config
    model = move(adapt("iapt", cls(config)))
    ids = _text()
    labels = torch.zeros_like(ids)
    assert torch.equal(model(input_ids=ids, labels=labels).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("name", ["prompt_lookup_num_tokens", "assistant_model"])
def test_drafts_are_refused(name):
    model, ids = move(adapt("iapt", TINY["llama"]())).eval(), _text()
    value = 3 if name.startswith("prompt") else TINY["llama"]().eval()
    with pytest.raises(ConfigError, match=f"leave out {name}"):
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **{name: value}, **GENERATE)


@torch.no_grad()
def test_prompts_that_would_leave_a_sliding_window():
    """Right as long as the window holds them, and then refused, in generation from a short text too."""
    base = TINY["mistral"]()
    base.config.sliding_window = 16
    model, ids = move(adapt("soft_prompt", base, num_virtual_tokens=4)).eval(), _text()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    short = {**GENERATE, "max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(**inputs, **short)
    taught = model(out.sequences, use_cache=False).logits
    assert (torch.stack(out.logits, 1) - taught[:, 8:-1]).abs().max() < 1e-5
    with pytest.raises(ConfigError, match=r"13 tokens and 4 prompts.*window of 16.*use_cache=False"):
        model.generate(**inputs, **{**short, "max_new_tokens": 8})
    assert model.generate(**inputs, use_cache=False, **{**GENERATE, "max_new_tokens": 8}).shape == (1, 17)


@pytest.mark.parametrize("name", VISION)
@torch.no_grad()
def test_tokens_before_the_patches(name):
    """As many as the sequence of a vision transformer is longer than its grid."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    jepa = hf.IJepaForImageClassification(hf.IJepaConfig(**sizes, image_size=16, patch_size=8))
    base = jepa if name == "ijepa" else TINY[name]()
    base = base.vision_model if name == "siglip" else base
    model = adapt("vpt", base)
    layer = next(module for module in model.modules() if isinstance(module, SequenceLayer))
    seen: list[int] = []
    layer.base_layer.register_forward_pre_hook(lambda block, args: seen.append(args[0].shape[1]))
    inputs = {"pixel_values": torch.randn(1, 3, 16, 16)}
    with model.disable_adapter():
        model(**inputs)
    assert seen == [4 + layer.stack.prefix_tokens]
