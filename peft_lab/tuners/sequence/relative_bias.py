"""Relative position biases that a block makes for itself, over prompts and text (T5).

Prompts stand right before the text there. In a row that is padded at the left they would be as far away as the padding
is long, so each such row gets a bias of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_lab.tuners.forward_context import ForwardContext


class PaddedPrompts(NamedTuple):
    """Places of the prompts in a batch with padding at the left.

    Attributes:
        first: index of each row's first token among the tokens, int64 (batch,).
        end: number of entries up to the last prompt.
    """

    first: Tensor
    end: int


class RowBias:
    """Function `compute_bias` of one attention module, with distances counted from each row's first token.

    It stands in the instance, so that a deep copy or a pickle of the module takes its own along.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, query_length: int, key_length: int, *args: Any, **kwargs: Any) -> Tensor:
        """Bias (1 or batch, heads, queries, keys)."""
        own: Any = type(self.module)
        compute = MethodType(own.compute_bias, self.module)
        context = ForwardContext.current()
        padded: PaddedPrompts | None = None if context is None else context.shared.get(self.module)
        if padded is None:
            return compute(query_length, key_length, *args, **kwargs)
        # Each entry's place without the padding before its row, by which the entries of the bias are chosen.
        place = torch.arange(key_length, device=padded.first.device)
        shifted = (place - padded.first[:, None]).clamp(min=padded.end)
        place = torch.where(place < padded.end, place, shifted)
        bias: Tensor = compute(key_length, key_length, device=kwargs.get("device"))[0]
        return bias[:, place[:, -query_length:, None], place[:, None, :]].transpose(0, 1)


def wrap_biases(block: nn.Module) -> list[nn.Module]:
    """Wrap the biases that a block makes for itself; return their modules."""
    found = [m for m in block.modules() if hasattr(m, "relative_attention_bias") and hasattr(m, "compute_bias")]
    module: Any
    for module in found:
        module.compute_bias = RowBias(module)
    return found


def share(context: ForwardContext, modules: Iterable[nn.Module], first: Tensor | None, end: int) -> None:
    """Share with the biases of a block where the text of each row begins.

    Kept in the context of the call, which a block that is recomputed in the backward pass sees again.

    Args:
        context: the forward call.
        modules: the modules that `wrap_biases` found in the block.
        first: index of each row's first token among the tokens, int64 (batch,); None without padding at the left.
        end: number of entries up to the last prompt.
    """
    for module in modules:
        context.shared[module] = None if first is None else PaddedPrompts(first, end)


def unwrap_biases(model: nn.Module) -> None:
    """Remove the wrappers of `wrap_biases`."""
    for module in model.modules():
        if isinstance(vars(module).get("compute_bias"), RowBias):
            del module.compute_bias
