"""Masks, rotary positions and biases with slots for prompts; tokens put in and taken out."""

from __future__ import annotations

import pytest
import torch

from peft_lab.errors import ConfigError
from peft_lab.tuners.sequence.attention_inputs import extend_bias, extend_mask, extend_rotary
from peft_lab.tuners.tokens import insert, split


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
