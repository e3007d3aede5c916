"""Initialisation of prompts from a text.

The start values are the hidden states of the text's tokens in the frozen backbone, before each of its blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_lab.tuners.sequence import SequenceLayer


@torch.no_grad()
def states_before(model: nn.Module, stack: nn.Module, blocks: Sequence[str], ids: Tensor) -> dict[int, Tensor]:
    """Hidden states (tokens, width) before each block of a stack, float32.

    They are by the block's index. Adapters that are on the model already are switched off for it, and dropout too.

    Args:
        model: the module from which the paths of `blocks` start.
        stack: its encoder or decoder, whose main input is `input_ids`.
        blocks: paths of the blocks, in order.
        ids: token ids (tokens,).
    """
    found: dict[int, Tensor] = {}

    def keep(depth: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            found[depth] = hidden[0].float()

        return hook

    # A hook reads the input of each block, which is the place of the prompts that it gets.
    modules = [model.get_submodule(block) for block in blocks]
    handles = [m.register_forward_pre_hook(keep(i), with_kwargs=True) for i, m in enumerate(modules)]
    layers = [m for m in model.modules() if isinstance(m, SequenceLayer)]
    # The model is left as it was, whichever adapters were on and in whichever mode.
    switched, training = [layer.disable_adapters for layer in layers], stack.training
    try:
        stack.eval()
        for layer in layers:
            layer._disable_adapters = True
        stack(input_ids=ids[None].to(next(stack.parameters()).device))
    finally:
        stack.train(training)
        for layer, off in zip(layers, switched, strict=True):
            layer._disable_adapters = off
        for handle in handles:
            handle.remove()
    return found
