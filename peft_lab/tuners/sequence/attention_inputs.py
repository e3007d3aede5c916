"""Masks, rotary positions and biases extended for prompts in the sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft_lab.errors import ConfigError
from peft_lab.tuners.sequence.text_positions import at_first_token
from peft_lab.tuners.tokens import insert


def extend_mask(
    mask: Tensor | None,
    tokens: Tensor,
    count: int,
    at: int,
    causal: bool,
    unused: Tensor | None,
    first: Tensor | None = None,
) -> Any:
    """Extend a prefill's attention mask by `count` prompts at position `at`.

    Args:
        mask: as the stack made it for the tokens alone: None, bool or additive (batch or 1, heads or 1, queries or 1,
            keys), or (batch, keys) for flash attention.
        tokens: hidden states (batch, n, dim) without prompts.
        causal: True if the block is causal; a prompt then sees the prompts before it only, and no token.
        unused: bool (batch, count), prompts that a row does not have; None if every row has all.
        first: index of each row's first token, int64 (batch,); None for 0 in all rows.

    Raises:
        ConfigError: a kind of mask that has no place for prompts.
    """
    if mask is None:
        if unused is None:
            return None  # without padding nothing is masked but the future, which the kernel masks by itself
        mask = _open_mask(tokens, tokens.shape[1], causal)
    if not isinstance(mask, Tensor):
        raise ConfigError(
            f"Prompts in the sequence do not go with a mask of type {type(mask).__name__}; load the backbone with "
            'attn_implementation="sdpa" or "eager".'
        )
    # Flash attention takes (batch, keys) and makes the causal part by itself.
    if mask.ndim == 2:
        seen = mask.new_ones(mask.shape[0], count) if unused is None else (~unused).to(mask.dtype)
        return insert(mask, seen, at)
    if mask.ndim != 4:
        raise ConfigError(f"Prompts in the sequence need an attention mask of 2 or 4 dimensions, got {mask.ndim}.")
    visible, hidden = _levels(mask)
    if unused is not None:
        mask = mask.expand(unused.shape[0], *mask.shape[1:])
    # New columns: the tokens see every prompt that their row has.
    batch, heads, queries, keys = mask.shape
    columns = mask.new_full((batch, heads, queries, count), visible)
    if unused is not None:
        columns = _hide(columns, unused[:, None, None, :], hidden)
    # One row that holds for all queries needs no rows for the prompts.
    if queries == 1 and tokens.shape[1] > 1:
        return insert(mask, columns, at, 3)
    # New rows: the prompts among themselves, then the tokens, which only a block that is not causal shows them.
    between = mask.new_full((batch, heads, count, count), visible)
    if causal:
        future = torch.ones(count, count, dtype=torch.bool, device=mask.device).triu(1)
        between = _hide(between, future, hidden)
    if unused is not None:
        itself = torch.eye(count, dtype=torch.bool, device=mask.device)  # a row of a softmax must not be empty
        between = _hide(between, unused[:, None, None, :] & ~itself, hidden)
    # A prompt sees the tokens that the first token sees, which are not all where attention is local.
    rows = (
        mask.new_full((batch, heads, count, keys), hidden)
        if causal
        else at_first_token(mask, first, 2).expand(batch, heads, count, keys)
    )
    return insert(insert(mask, columns, at, 3), insert(rows, between, at, 3), at, 2)


def _hide(mask: Tensor, where: Tensor, hidden: Any) -> Tensor:
    # ONNX Runtime fills no bool tensors
    return mask & ~where if mask.dtype is torch.bool else mask.masked_fill(where, hidden)


def align_keys(mask: Any, keys: int, tokens: Tensor, unused: Tensor | None) -> Any:
    """Align a decoding step's mask with a layer's `keys` cache entries.

    The prompts are at the left of them. The stack sizes one mask for all layers, by the first one, which may hold fewer
    or more prompts than this one.
    """
    if mask is None:
        if unused is None or not unused.any():
            return None
        mask = _open_mask(tokens, keys, causal=True)
    # Tokens are at the right in every layer, so the difference is made up at the left.
    visible, hidden = _levels(mask)
    missing = keys - mask.shape[-1]
    if missing > 0:
        mask = torch.cat([mask.new_full((*mask.shape[:-1], missing), visible), mask], -1)
    elif missing < 0:
        mask = mask[..., -missing:]
    if unused is not None:
        mask = mask.expand(unused.shape[0], *mask.shape[1:]).clone()
        part = mask[..., : unused.shape[1]]
        part.masked_fill_(unused if mask.ndim == 2 else unused[:, None, None, :], hidden)
    return mask


def extend_rotary(
    embeddings: Any, tokens: int, count: int, at: int, first: Tensor | None = None, sines_first: bool = False
) -> Any:
    """Extend rotary positions by prompts at position 0, or at that of each row's first token.

    Positions of patches alone, without class tokens, stay as they are. They are cosines and sines (batch or 1, tokens,
    dim), or complex numbers of that shape.

    Args:
        embeddings: as the stack made them for the tokens alone.
        tokens: number of tokens.
        count: number of prompts.
        at: number of tokens before the prompts.
        first: index of each row's first token, int64 (batch or 1,); None for position 0.
        sines_first: True if the pair is sines and cosines.
    """
    pair = isinstance(embeddings, tuple) and len(embeddings) == 2
    if pair and sines_first:
        return extend_rotary(embeddings[::-1], tokens, count, at, first)[::-1]
    if not pair and not (isinstance(embeddings, Tensor) and embeddings.is_complex()):
        return embeddings
    parts: tuple[Tensor, ...] = embeddings if pair else (embeddings,)
    if parts[0].shape[-2] != tokens:
        return embeddings
    dim = parts[0].ndim - 2
    if first is not None and dim == 1:
        extended = tuple(_extend_at_first(part, count, at, first) for part in parts)
        return extended if pair else extended[0]
    # Position 0 is the rotation by no angle: cosine 1, sine 0, or the complex number 1; some rotations also scale.
    start = [part.narrow(dim, 0, 1) for part in parts]
    scale = torch.hypot(*start) if pair else start[0].abs().to(parts[0].dtype)
    shape = [*scale.shape]
    shape[dim] = count
    ones = scale.expand(shape)
    if not pair:
        return insert(parts[0], ones, at, dim)
    return insert(parts[0], ones, at, dim), insert(parts[1], torch.zeros_like(ones), at, dim)


def _extend_at_first(part: Tensor, count: int, at: int, first: Tensor) -> Tensor:
    """Extend cosines, sines or complex numbers (batch or 1, tokens, dim) by those of each row's first token."""
    new = at_first_token(part, first, 1)
    return insert(part.expand(new.shape[0], -1, -1), new.expand(-1, count, -1), at)


def extend_bias(bias: Tensor | None, tokens: int, count: int, at: int) -> Tensor | None:
    """Extend a relative position bias (..., tokens, tokens) by zeros for prompts.

    A longer one stays as it is.
    """
    if bias is None or bias.shape[-1] != tokens:
        return bias
    bias = insert(bias, bias.new_zeros(*bias.shape[:-1], count), at, bias.ndim - 1)
    return insert(bias, bias.new_zeros(*bias.shape[:-2], count, bias.shape[-1]), at, bias.ndim - 2)


def extend_queries(values: Any, tokens: int, count: int, at: int) -> Any:
    """Extend mask or bias (..., tokens, keys) of attention to another text by queries of prompts.

    They see what the first token sees, which is all that is not padding there. One row for all queries stays as it is.
    """
    if not isinstance(values, Tensor) or values.ndim != 4 or values.shape[2] != tokens or tokens == 1:
        return values
    return insert(values, values.narrow(2, 0, 1).expand(-1, -1, count, -1), at, 2)


def align_bias(bias: Tensor | None, keys: int) -> Tensor | None:
    """Extend a decoding step's bias (..., entries) to a layer's `keys` cache entries by zeros for prompts.

    Blocks hand it on, and those before may hold no prompts.
    """
    missing = 0 if bias is None else keys - bias.shape[-1]
    return bias if bias is None or missing <= 0 else torch.nn.functional.pad(bias, (missing, 0))


def _open_mask(tokens: Tensor, keys: int, causal: bool) -> Tensor:
    """Additive mask (1, 1, tokens, keys) that hides the future if `causal`.

    Every kind of attention but flash takes such a mask.
    """
    mask = tokens.new_zeros(tokens.shape[1], keys)
    if causal:
        future = torch.ones_like(mask, dtype=torch.bool).triu(1 + keys - tokens.shape[1])
        mask = mask.masked_fill(future, _levels(mask)[1])
    return mask[None, None]


def _levels(mask: Tensor) -> tuple[float, float]:
    """Values of a mask for visible and for hidden.

    A mask of floating point is additive; any other is true for visible.
    """
    return (0.0, torch.finfo(mask.dtype).min) if mask.dtype.is_floating_point else (1, 0)
