"""What others see of prompts in the sequence: hidden states, heads and padding are those of the tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.backbones import TINY, tiny_inputs
from support.cover import cover
from support.properties import IMAGE_LOGITS, IMAGES, SEQUENCE, adapt, assert_close, main_tensor, move, output
from support.sequences import DECODERS, ENCODERS, VISION, spread
from torch import Tensor, nn

from peft_lab import registry
from peft_lab.backbones import module_roles
from peft_lab.tuners.sequence.layer import SequenceLayer


@spread([*DECODERS, *ENCODERS, *VISION, "swin", "clip", "siglip", "t5", "audio-spectrogram-transformer", "dpt"])
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
    assert_close(ours[:, : alone.shape[1]], alone, 1e-5)


@pytest.mark.parametrize(
    ("method", "family"),
    cover(
        (method, family)
        for family in [*DECODERS, "bert", "vit", "dinov2_with_registers", "t5", "beit", "swin"]
        for method in SEQUENCE
        if registry.method(method).can("mixed_batch")
    ),
)
@torch.no_grad()
def test_hidden_slots_change_nothing(method, family):
    """A row of the base in a batch has slots that are masked: it answers as the base does alone."""
    base = TINY[family]()
    inputs = tiny_inputs(base)
    model = move(adapt(method, base))
    mixed = output(model, inputs, adapter_names=["__base__", "default"])
    assert_close(mixed[0], output(base, inputs)[0], 1e-5)
    assert not torch.allclose(mixed[1], output(base, inputs)[1], atol=1e-4)
