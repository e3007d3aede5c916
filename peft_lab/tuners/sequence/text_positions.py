"""Positions of text with padding, and the places where prompts stand in it.

Transformers numbers the tokens of a batch from its left edge, padding included. Under rotary positions that shifts a
row as a whole and changes none of its distances, but prompts that stand at position 0 would be as far away as the
padding is long. So prompts stand at the position of their row's first token, and where the call gives no positions,
those of a text with padding before some of its tokens are counted from the mask, as `generate` counts them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def first_tokens(mask: Tensor | None) -> Tensor | None:
    """Index of each row's first token, int64 (batch,); None without padding at the left.

    `mask` is bool (batch, tokens), False at padding.
    """
    if mask is None:
        return None
    # A program that torch.export makes is for every mask, so it may not look at this one's values.
    if not torch.compiler.is_exporting() and bool(mask[:, 0].all()):
        return None
    return mask.int().argmax(1)


def needs_count(mask: Tensor | None) -> bool:
    """Test whether padding stands before a token of some row, so that positions differ from indices."""
    if mask is None or torch.compiler.is_exporting():
        return mask is not None
    return bool((mask[:, 1:] & ~mask[:, :-1]).any())


def counted(mask: Tensor, offset: int) -> Tensor:
    """Position of each token among its row's tokens, int64 (batch, tokens).

    The first is `offset`, which also stands at padding before it.
    """
    return (mask.cumsum(1) - 1).clamp(min=0) + offset


def is_counted(positions: Tensor, mask: Tensor | None, offset: int) -> bool:
    """Test whether given positions (batch or 1, tokens) are those that `counted` makes, padding aside."""
    if positions.ndim != 2:
        return False
    mask = torch.ones_like(positions, dtype=torch.bool) if mask is None else mask
    return bool(((positions == counted(mask, offset)) | ~mask).all())


def position_offset(stack: nn.Module) -> int:
    """First position of a text: 0, or the one behind that of padding in a table that has an entry for it (RoBERTa)."""
    for name, module in stack.named_modules():
        if "position" in name and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.padding_idx + 1
    return 0


def at_first_token(values: Tensor, first: Tensor | None, dim: int) -> Tensor:
    """Entry of each row's first token along a dimension of `values`, which keeps the length 1.

    Args:
        values: (batch or 1, ...).
        first: index of each row's first token, int64 (batch or 1,); None for 0 in all rows.
        dim: dimension of the tokens.
    """
    if first is None:
        return values.narrow(dim, 0, 1)
    # not by take_along_dim, of which torch.export makes a program for one size alone
    sizes = [values.shape[0] if first.shape[0] == 1 else first.shape[0], *values.shape[1:]]
    index = first.reshape(-1, *[1] * (values.ndim - 1)).expand(*sizes[:dim], 1, *sizes[dim + 1 :])
    return values.expand(sizes).gather(dim, index)
