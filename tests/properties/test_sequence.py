"""Prompts in the sequence: what holds for every method that puts them there, and what cannot work says so."""

from __future__ import annotations

import copy
import inspect
from functools import cache
from typing import Any

import pytest
import torch
from peft import get_peft_model
from support.backbones import TINY, tiny_inputs
from support.properties import (
    IMAGE_LOGITS,
    IMAGES,
    SEQUENCE,
    TRAINED,
    adapt,
    adapter_parameters,
    config,
    main_tensor,
    move,
    output,
)
from torch import Tensor, nn
from transformers import DynamicCache, ViTConfig, ViTForImageClassification

from peft_lab import registry
from peft_lab.backbones import module_roles
from peft_lab.errors import ConfigError
from peft_lab.tuners.registration import config_class
from peft_lab.tuners.sequence.attention_inputs import extend_bias, extend_mask, extend_rotary
from peft_lab.tuners.sequence.layer import SequenceLayer
from peft_lab.tuners.tokens import insert, split

DECODERS = [
    *("gpt2", "opt", "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "phi", "phi3"),
]
ENCODERS = ["bert", "roberta", "distilbert", "deberta-v2", "modernbert", "mpnet", "albert", "electra"]
VISION = ["vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "beit"]
GENERATE = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

methods = pytest.mark.parametrize("method", SEQUENCE)
#: transformers itself has no sdpa for these.
EAGER = ("gemma2", "deberta-v2", "mpnet")


decoders = pytest.mark.parametrize(
    ("family", "attention"), [(f, a) for f in DECODERS for a in ("sdpa", "eager") if a == "eager" or f not in EAGER]
)


def spread(families: list[str], attentions: tuple[str, ...] = ("eager",)) -> pytest.MarkDecorator:
    """Parametrise over families, the kinds of attention that they have, and methods by turns.

    For what the mechanism does by itself: every family and every method has its turn, not every pair of them.
    """
    found = [(f, a) for f in families for a in attentions if a == "eager" or f not in EAGER]
    cases = [(SEQUENCE[i % len(SEQUENCE)], *case) for i, case in enumerate(found)]
    return pytest.mark.parametrize(("method", "family", "attention"), cases)


@cache
def _model(method: str, family: str, attention: str = "eager") -> Any:
    """A model with two adapters that differ; the second one writes its prompts before the first block only."""
    base = TINY[family]().eval()
    base.set_attn_implementation(attention)
    model = adapt(method, base)
    other = {"num_virtual_tokens": 5} if "num_virtual_tokens" in _fields(method) else {"num_prompts": 5}
    model.add_adapter("other", config(method, layers_to_transform=[0], **other))
    move(model, "default", seed=1), move(model, "other", seed=2)
    return model.eval()


def _fields(method: str) -> set[str]:
    return set(config_class(method).__dataclass_fields__)


@cache
def _padded() -> dict[str, Tensor]:
    """Two texts of 5 and 9 tokens, padded at the left."""
    ids = torch.randint(5, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def assert_near(a: Tensor, b: Tensor, limit: float) -> None:
    assert (a - b).abs().max().item() < limit


# Text that goes on ----------------------------------------------------------------------------------------------------


@methods
@decoders
@torch.no_grad()
def test_decoder(method, family, attention):
    """Left padding, a cache, generation and teacher forcing all give the same logits."""
    _check_decoder(_model(method, family, attention))


@spread(DECODERS, ("sdpa", "eager"))
@torch.no_grad()
def test_decoder_with_prompts_before_some_blocks(method, family, attention):
    model = _model(method, family, attention)
    model.set_adapter("other")
    _check_decoder(model)


def _check_decoder(model: Any) -> None:
    inputs = _padded()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    full = model(**inputs, position_ids=_positions(mask), use_cache=False).logits
    single = model(input_ids=ids[:1, 4:]).logits
    assert_near(full[0, 4:], single[0], 1e-5)

    cache = DynamicCache(config=model.config)
    instruction = mask.clone()
    instruction[:, -2:] = 0  # the last two tokens come one by one
    whole = model(**inputs, position_ids=_positions(mask), use_cache=False, instruction_mask=instruction).logits
    start = model(
        input_ids=ids[:, :7], attention_mask=mask[:, :7], position_ids=_positions(mask)[:, :7], past_key_values=cache
    ).logits
    assert_near(start[:, 4:], whole[:, 4:7], 1e-4)
    for step in (7, 8):
        place = _positions(mask)[:, step : step + 1]
        next_token = {"input_ids": ids[:, step : step + 1], "attention_mask": mask[:, : step + 1]}
        out = model(**next_token, position_ids=place, past_key_values=cache)
        assert_near(out.logits[:, 0], whole[:, step], 1e-4)

    out = model.generate(**inputs, output_logits=True, return_dict_in_generate=True, **GENERATE)
    mask = torch.cat([mask, torch.ones_like(mask[:, :4])], 1)
    forced = model(
        input_ids=out.sequences,
        attention_mask=mask,
        position_ids=_positions(mask),
        use_cache=False,
        instruction_mask=torch.nn.functional.pad(inputs["attention_mask"], (0, 4)),
    ).logits
    assert_near(torch.stack(out.logits, 1), forced[:, 8:-1], 2e-4)


@spread(DECODERS)
@torch.no_grad()
def test_a_cache_without_positions_and_masks(method, family, attention):
    """A step on a cache counts the tokens before it, not the prompts."""
    model, ids = _model(method, family, attention), _padded()["input_ids"][1:]
    for name in ("default", "other"):
        model.set_adapter(name)
        instruction = torch.tensor([[1] * 7 + [0] * 2])
        whole, cache = (
            model(ids, use_cache=False, instruction_mask=instruction).logits,
            DynamicCache(config=model.config),
        )
        assert_near(model(ids[:, :7], past_key_values=cache).logits, whole[:, :7], 1e-4)
        for step in (7, 8):
            assert_near(model(ids[:, step : step + 1], past_key_values=cache).logits[:, 0], whole[:, step], 1e-4)


@spread(DECODERS)
@torch.no_grad()
def test_rows_of_a_batch_decode_as_alone(method, family, attention):
    """Different numbers of prompts in different blocks, rows without any, and beams."""
    model, inputs = _model(method, family), _padded()
    four = {key: value.repeat(2, 1)[:3] for key, value in inputs.items()}
    names, settings = ["default", "other", "__base__"], {"output_logits": True, "return_dict_in_generate": True}
    mixed = torch.stack(model.generate(**four, adapter_names=names, **settings, **GENERATE).logits, 1)
    for row, name in enumerate(names):
        alone = torch.stack(model.generate(**four, adapter_names=[name] * 3, **settings, **GENERATE).logits, 1)
        assert_near(mixed[row], alone[row], 1e-5)
    with model.disable_adapter():
        plain = torch.stack(model.generate(**four, **settings, **GENERATE).logits, 1)
    assert_near(mixed[2], plain[2], 1e-5)
    beams = model.generate(**inputs, adapter_names=["default", "other"], num_beams=3, **GENERATE)
    model.set_adapter("other")
    assert torch.equal(beams[1], model.generate(**inputs, num_beams=3, **GENERATE)[1])
    model.set_adapter("default")
    assert torch.equal(beams[0], model.generate(**inputs, num_beams=3, **GENERATE)[0])


@methods
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_embeddings_instead_of_tokens(method, family):
    model, inputs = _model(method, family), _padded()
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    mask = inputs["attention_mask"]
    expected = model.generate(**inputs, **GENERATE)[:, 9:]
    assert torch.equal(model.generate(inputs_embeds=embeddings, attention_mask=mask, **GENERATE), expected)
    assert_near(model(inputs_embeds=embeddings).logits, model(input_ids=inputs["input_ids"]).logits, 1e-6)


@methods
@torch.no_grad()
def test_encoder_of_an_encoder_decoder(method):
    model, inputs = _model(method, "t5"), _padded()
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
    assert_near(model(**padded, **decoder).logits, model(**short, **decoder).logits, 1e-5)
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


@pytest.mark.parametrize("method", [name for name in SEQUENCE if name in TRAINED])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text", "opt"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_two_forwards_before_one_backward_with_checkpointing(method, family, reentrant):
    """Recomputed blocks see the prompts and the mask of their own call."""
    ids, short = _padded()["input_ids"], torch.tensor([[9, 8, 7], [6, 5, 9]])
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
        torch.testing.assert_close(found[1][name], grad, atol=1e-6, rtol=1e-5)


# What others see ------------------------------------------------------------------------------------------------------


@spread([*DECODERS, *ENCODERS, *VISION, "swin", "clip", "siglip", "t5"])
@torch.no_grad()
def test_hidden_states_and_attentions_are_those_of_the_tokens(method, family, attention):
    base = TINY[family]()
    base.set_attn_implementation(attention)
    inputs = tiny_inputs(base)
    plain = base(**inputs, output_hidden_states=True, output_attentions=True)
    model = move(adapt(method, base))
    out = model(**inputs, output_hidden_states=True, output_attentions=True)
    compared = 0
    for name in ("hidden_states", "attentions", "encoder_hidden_states", "encoder_attentions", "last_hidden_state"):
        for ours, theirs in zip(_all(out, name), _all(plain, name), strict=True):
            assert ours.shape == theirs.shape, name
            compared += 1
    for tower in ("vision_model_output", "text_model_output"):
        if tower in out:
            assert out[tower].last_hidden_state.shape == plain[tower].last_hidden_state.shape
            compared += 1
    assert compared


def _all(result: Any, name: str) -> tuple[Tensor, ...]:
    value = getattr(result, name, None)
    return () if value is None else (value,) if isinstance(value, Tensor) else value


@spread([*ENCODERS, *VISION])
@torch.no_grad()
def test_head_and_pooler_see_the_tokens_alone(method, family, attention):
    """Every module behind the last block gets input of the shape that it has without prompts."""
    base = TINY[family]()
    inputs = tiny_inputs(base)
    model = move(adapt(method, base, modules_to_save=[]))
    seen = [_shapes(base, inputs), _shapes(model.get_base_model(), inputs)]
    assert seen[0] == seen[1]
    assert seen[0]


@pytest.mark.parametrize("family", ["vit", "dinov2_with_registers"])
@pytest.mark.parametrize("method", IMAGES)
def test_methods_for_images_show_the_tokens_alone(method, family):
    test_hidden_states_and_attentions_are_those_of_the_tokens(method, family, "eager")
    base = TINY[family]()
    inputs = tiny_inputs(base)
    model = move(adapt(method, base, modules_to_save=[])).get_base_model()
    plain, seen = _shapes(base, inputs), _shapes(model, inputs)
    scored = int(method in IMAGE_LOGITS)  # the final norm also gets the slots
    assert len(seen) == len(plain) + scored
    assert seen[scored:] == plain


def _shapes(model: nn.Module, inputs: dict[str, Tensor]) -> list[tuple[str, torch.Size]]:
    found: list[tuple[str, torch.Size]] = []
    inside = [name for name, m in model.named_modules() if isinstance(m, SequenceLayer)]
    blocks = inside or module_roles.modules_by_role(model, "block")
    handles = [
        m.register_forward_pre_hook(lambda m, args, name=name: found.append((name, args[0].shape)) if args else None)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear | nn.LayerNorm) and not name.startswith(tuple(f"{b}." for b in blocks))
    ]
    model(**inputs)
    for handle in handles:
        handle.remove()
    return found


@spread([*ENCODERS, "llama", "gpt2", "gemma2"], ("sdpa", "eager"))
@torch.no_grad()
def test_padding_at_the_right_changes_nothing(method, family, attention):
    base = TINY[family]()
    base.set_attn_implementation(attention)
    model = move(adapt(method, base))
    ids = torch.tensor([[7, 8, 9, 10, 2]])
    padded = torch.nn.functional.pad(ids, (0, 3))
    mask = (torch.arange(8) < 5).long()[None]
    ours = main_tensor(model(input_ids=padded, attention_mask=mask))
    alone = main_tensor(model(input_ids=ids, attention_mask=torch.ones_like(ids)))
    assert_near(ours[:, : alone.shape[1]], alone, 1e-5)


@pytest.mark.parametrize("family", [*DECODERS, "bert", "vit", "dinov2_with_registers", "t5", "beit", "swin"])
@pytest.mark.parametrize("method", [name for name in SEQUENCE if registry.method(name).can("mixed_batch")])
@torch.no_grad()
def test_hidden_slots_change_nothing(method, family):
    """A row of the base in a batch has slots that are masked: it answers as the base does alone."""
    base = TINY[family]()
    inputs = tiny_inputs(base)
    model = move(adapt(method, base))
    mixed = output(model, inputs, adapter_names=["__base__", "default"])
    assert_near(mixed[0], output(base, inputs)[0], 1e-5)
    assert not torch.allclose(mixed[1], output(base, inputs)[1], atol=1e-4)


# Errors ---------------------------------------------------------------------------------------------------------------


def _llama(method: str, **settings: Any) -> Any:
    base = TINY["llama"]()
    for name, value in settings.items():
        setattr(base.config, name, value)
    return move(adapt(method, base))


@methods
def test_static_cache_is_refused(method):
    with pytest.raises(ConfigError, match=r"cache that grows.*cache_implementation"):
        _llama(method).generate(**_padded(), cache_implementation="static", **GENERATE)


@methods
def test_chunked_prefill_is_refused(method):
    model = _llama(method)
    for size in (2, 8):
        with pytest.raises(ConfigError, match="prefill_chunk_size"):
            model.generate(**_padded(), prefill_chunk_size=size, **GENERATE)
    settings = copy.deepcopy(model.generation_config)
    settings.prefill_chunk_size = 8
    with pytest.raises(ConfigError, match="prefill_chunk_size"):
        model.generate(**_padded(), generation_config=settings)
    with pytest.raises(ConfigError, match="prefill_chunk_size"):  # without peft's wrapper
        model.get_base_model().generate(**_padded(), prefill_chunk_size=4, **GENERATE)


@methods
@torch.no_grad()
def test_cache_from_elsewhere_is_refused(method):
    model, cache = _llama(method), DynamicCache()
    with model.disable_adapter():
        model(_padded()["input_ids"], past_key_values=cache)
    with pytest.raises(ConfigError, match="not filled with these prompts"):
        model(torch.tensor([[5], [6]]), past_key_values=cache)
    cache = DynamicCache()
    model(_padded()["input_ids"], past_key_values=cache)
    with pytest.raises(ConfigError, match="one token at a time, got 2"):
        model(torch.tensor([[5, 6], [6, 5]]), past_key_values=cache)


@methods
@torch.no_grad()
def test_a_copied_cache_goes_on_as_its_original(method):
    model, cache = _llama(method), DynamicCache()
    model(_padded()["input_ids"], past_key_values=cache)
    copied, step = copy.deepcopy(cache), torch.tensor([[5], [6]])
    assert_near(model(step, past_key_values=copied).logits, model(step, past_key_values=cache).logits, 1e-6)


@methods
def test_packed_sequences_are_refused(method):
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5]])
    with pytest.raises(ConfigError, match="Packed sequences"):
        _llama(method)(_padded()["input_ids"][1:], position_ids=positions)


@methods
@torch.no_grad()
def test_what_is_refused_works_without_the_adapter(method):
    """Static caches, chunks, packed texts and caches that go on, where the adapter is off; and positions at padding."""
    base, model = TINY["llama"](), _llama(method)
    packed = {"input_ids": _padded()["input_ids"][1:], "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5]])}
    chunked = {**_padded(), "prefill_chunk_size": 4, **GENERATE}
    static = {**_padded(), "cache_implementation": "static", **GENERATE}
    with model.disable_adapter():
        assert torch.equal(model(**packed).logits, base(**packed).logits)
        assert torch.equal(model.generate(**chunked), base.generate(**chunked))
        assert torch.equal(model.generate(**static), base.generate(**static))
    filled = _positions(_padded()["attention_mask"]).masked_fill(_padded()["attention_mask"] == 0, 1)
    assert_near(
        model(**_padded(), position_ids=filled).logits[0, 4:], model(_padded()["input_ids"][:1, 4:]).logits[0], 1e-5
    )


@methods
@torch.no_grad()
def test_sliding_windows(method):
    """Refused where prompts would leave the window that a cache keeps; right where they stay, and without a cache."""
    base = TINY["mistral"]()
    base.config.sliding_window = 9
    model = move(adapt(method, base))
    with pytest.raises(ConfigError, match=r"sliding window of 9.*use_cache=False"):
        model.generate(**_padded(), **GENERATE)
    assert model.generate(**_padded(), use_cache=False, **GENERATE).shape == (2, 13)
    model.add_adapter("some", config(method, layers_to_transform=[0]))
    model.set_adapter("some")
    move(model, "some")
    with pytest.raises(ConfigError, match="sliding window"):
        model.generate(**_padded(), **GENERATE)


@methods
def test_two_active_adapters_are_refused(method):
    model = _model(method, "llama")
    model.base_model.set_adapter(["default", "other"])
    try:
        with pytest.raises(ConfigError, match="one adapter active at a time, not default, other"):
            model(**_padded())
    finally:
        model.set_adapter("default")


@methods
def test_block_without_its_backbone_is_refused(method):
    model = _model(method, "llama")
    block = next(m for m in model.modules() if isinstance(m, SequenceLayer))
    with pytest.raises(ConfigError, match="without its backbone"):
        block(torch.zeros(1, 3, 16))


@methods
def test_an_error_in_a_forward_leaves_nothing_behind(method):
    model = _model(method, "llama")
    expected = output(model, _padded())
    with pytest.raises(IndexError):
        model(torch.tensor([[1, 10_000]]))
    assert torch.equal(output(model, _padded()), expected)
    with pytest.raises(ConfigError, match="without its backbone"):
        next(m for m in model.modules() if isinstance(m, SequenceLayer))(torch.zeros(1, 3, 16))


# The parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 1, 3])
def test_insert_and_split(at):
    tokens, new = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    both = insert(tokens, new, at)
    assert torch.equal(both[:, at : at + 5], new)
    rest, slots = split(both, 5, at)
    assert torch.equal(rest, tokens)
    assert torch.equal(slots, new)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_mask_of_a_causal_block(kind):
    seen = torch.ones(3, 3, dtype=torch.bool).tril()
    lowest = torch.finfo(torch.float32).min
    mask = seen if kind == torch.bool else torch.zeros(3, 3).masked_fill(~seen, lowest)
    unused = torch.tensor([[False, False], [True, False]])
    got = extend_mask(mask[None, None], torch.zeros(2, 3, 4), 2, 0, True, unused)
    got = got if kind == torch.bool else got == 0
    every = torch.ones(5, 5, dtype=torch.bool).tril()
    assert torch.equal(got[0, 0], every)
    every[1:, 0] = False  # nothing sees a slot that the row has not; it sees itself, so that no softmax is empty
    assert torch.equal(got[1, 0], every)


def test_mask_of_an_encoder_hides_padding_from_slots():
    mask = torch.tensor([[True, True, False]])[:, None, None].expand(1, 1, 3, 3)
    got = extend_mask(mask, torch.zeros(1, 3, 4), 2, 1, False, None)
    assert torch.equal(got[0, 0], torch.tensor([True, True, True, True, False]).expand(5, 5))


def test_mask_of_flash_attention_holds_rows_and_keys():
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    got = extend_mask(mask, torch.zeros(2, 3, 4), 2, 0, True, torch.tensor([[True, False], [False, False]]))
    assert got.tolist() == [[0, 1, 0, 1, 1], [1, 1, 1, 1, 1]]
    got = extend_mask(mask, torch.zeros(2, 3, 4), 2, 1, False, None)
    assert got.tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]


def test_mask_of_another_kind_is_refused():
    with pytest.raises(ConfigError, match=r"mask of type object.*sdpa"):
        extend_mask(object(), torch.zeros(1, 3, 4), 2, 0, True, None)
    with pytest.raises(ConfigError, match="2 or 4 dimensions, got 3"):
        extend_mask(torch.zeros(1, 3, 3), torch.zeros(1, 3, 4), 2, 0, True, None)


def test_rotary_positions_of_slots_do_not_turn():
    angle = torch.arange(3.0)[None, :, None] * torch.ones(4)
    cos, sin = extend_rotary((2 * angle.cos(), 2 * angle.sin()), 3, 2, 0)
    assert torch.allclose(cos[:, :2], torch.full((1, 2, 4), 2.0))
    assert torch.equal(sin[:, :2], torch.zeros(1, 2, 4))
    assert torch.equal(cos[:, 2:], 2 * angle.cos())


def test_bias_of_slots_is_zero():
    bias = extend_bias(torch.ones(1, 2, 3, 3), 3, 2, 1)
    assert bias.shape == (1, 2, 5, 5)
    assert bias[..., 1:3].abs().sum() == bias[..., 1:3, :].abs().sum() == 0
    assert bias.sum() == 18


def test_mask_of_flex_attention_is_refused_with_the_mend():
    from torch.nn.attention.flex_attention import create_block_mask

    mask = create_block_mask(lambda b, h, q, k: q >= k, 1, 1, 3, 3, device="cpu")
    with pytest.raises(ConfigError, match=r'mask of type BlockMask.*attn_implementation="sdpa"'):
        extend_mask(mask, torch.zeros(1, 3, 4), 2, 0, True, None)


# Visual prompts by hand -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projection", [None, 4])
@pytest.mark.parametrize("position", ["after", "before"])
@pytest.mark.parametrize("deep", [True, False])
@torch.no_grad()
def test_vpt_equals_blocks_run_by_hand(deep, position, projection):
    base = TINY["vit"]().eval()
    model = move(adapt("vpt", base, num_prompts=3, deep=deep, position=position, projection=projection))
    parameters = adapter_parameters(model)
    prompts = [p for name, p in parameters.items() if "prompts" in name]
    if projection:
        weight, bias = (
            next(p for n, p in parameters.items() if f"projection_{kind}" in n) for kind in ("weight", "bias")
        )
        prompts = [p @ weight.T + bias for p in prompts]
    pixels = tiny_inputs(base)["pixel_values"]
    at = 1 if position == "after" else 0
    x = base.vit.embeddings(pixels)
    for depth, block in enumerate(base.vit.layers):
        if depth == 0:
            x = torch.cat([x[:, :at], prompts[0].expand(2, -1, -1), x[:, at:]], 1)
        elif deep:
            x = torch.cat([x[:, :at], prompts[depth].expand(2, -1, -1), x[:, at + 3 :]], 1)
        x = block(x)
    x = torch.cat([x[:, :at], x[:, at + 3 :]], 1)
    assert_near(output(model, {"pixel_values": pixels}), base.classifier(base.vit.layernorm(x)[:, 0]), 1e-6)


@pytest.mark.parametrize(("fields", "expected"), [({}, 351_373), ({"deep": False}, 305_293 + 5 * 768)])
def test_published_counts_of_vpt(fields, expected):
    """SUN397 with 5 prompts on ViT-B/16, head included."""
    with torch.device("meta"):
        base = ViTForImageClassification(ViTConfig(num_labels=397))
    model = get_peft_model(base, config("vpt", base, num_prompts=5, **fields))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


def test_vpt_dropout_is_of_each_sample():
    base = TINY["vit"]()
    model = move(adapt("vpt", base, dropout=0.5)).train()
    pixels = tiny_inputs(base)["pixel_values"][:1].repeat(2, 1, 1, 1)
    logits = model(pixels).logits
    assert not torch.allclose(logits[0], logits[1])


def test_vpt_numbers_of_prompts_by_block():
    base = TINY["vit"]()
    model = adapt("vpt", base, num_prompts=[2, 7])
    assert [len(p) for name, p in adapter_parameters(model).items()] == [2, 7]
    with pytest.raises(ConfigError, match="3 numbers, but 2 blocks"):
        adapt("vpt", base, num_prompts=[1, 2, 3])
    assert inspect.signature(config_class("vpt")).parameters["deep"].default is True
