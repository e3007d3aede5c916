"""Instruction of a row: the tokens that prompts may be made from.

They are neither padding nor answer: as `instruction_mask` gives them, else, where a model continues a text, those
before the first label of the row. A further turn behind an answer has seen it and does not count. While `generate`
runs, they are the tokens that it was given, and never what it has written.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.nn.functional import pad

from peft_lab.errors import ConfigError
from peft_lab.tuners.layer import AdapterLayer
from peft_lab.tuners.sequence.generation import given_length
from peft_lab.tuners.sequence.prompt_state import PromptState

_NO_INSTRUCTION = (
    'Method "{}" trains without labels or instruction_mask in the call, so its prompts see the answers too; label '
    "smoothing and a loss function of one's own take the labels out of it: then pass instruction_mask."
)


def instruction_tokens(layer: AdapterLayer, causal: bool, tokens: Tensor, state: PromptState) -> Tensor | None:
    """Mask of the instruction tokens, bool (batch, tokens); None for all.

    Args:
        layer: block before which prompts are made.
        causal: True if no block of its stack lets a token see later ones.
        tokens: its hidden states (batch, tokens, dim).
        state: state of the call for these rows.

    Raises:
        ConfigError: a row has no such token, or `instruction_mask` is not of the batch's shape.
    """
    given, labels = state.row_input("instruction_mask"), state.labels
    length, begun = tokens.shape[1], given_length(layer, tokens.shape[1])
    # Without a KV cache `generate` reads its own tokens again, behind those that it was given.
    if begun < length:
        if given is None:
            given = torch.ones(tokens.shape[0], begun, dtype=torch.bool, device=tokens.device)
        given = pad(given, (0, length - given.shape[1]))
    if given is not None and given.shape != tokens.shape[:2]:
        raise ConfigError(
            f"instruction_mask has shape {list(given.shape)}, expected {list(tokens.shape[:2])} as the tokens have."
        )
    # Where labels are tokens of the text, those before the first one are the instruction.
    continued = causal and state.continues_text
    if given is None and continued and labels is not None and labels.shape == tokens.shape[:2]:
        given = (labels != -100).cumsum(1) == 0
    if given is None:
        if continued and layer.training:
            warnings.warn(_NO_INSTRUCTION.format(layer.info.name), stacklevel=2)
        return state.mask
    chosen = given.bool() if state.mask is None else given.bool() & state.mask
    if not bool(chosen.any(1).all()):
        raise ConfigError(
            f'Method "{layer.info.name}" makes its prompts from the instruction, and a row of the batch has none: '
            "labels must be -100 at its beginning, or pass instruction_mask."
        )
    return chosen
