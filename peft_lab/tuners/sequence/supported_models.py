"""Which transformers have room for prompts in their sequence, and what is said of those that have none."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from peft_lab.backbones import module_roles
from peft_lab.errors import ConfigError

logger = logging.getLogger("peft_lab")

_ALIBI = "biases its attention by distance (ALiBi)"
_OWN_LENGTH = "makes masks or positions for the text alone in each block"
_IN_PIECES = "attends within pieces of the text"
#: What leaves no room, by `model_type`.
NO_ROOM = {
    **dict.fromkeys(("bloom", "mpt"), _ALIBI),
    **dict.fromkeys(("falcon_h1", "roformer", "xlm", "xlnet"), _OWN_LENGTH),
    **dict.fromkeys(("led", "longformer", "longt5"), _IN_PIECES),
    "fnet": "mixes tokens without attention",
    "funnel": "merges tokens between its blocks",
}
#: What tests put prompts into beside the families of the role table.
ALSO_TRIED = (
    *("codegen", "ctrl", "falcon", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "lfm2", "llama4_text", "openai-gpt"),
    *("qwen3_next", "xglm"),
)


def check_supported(model: nn.Module, stack: Any) -> None:
    """Refuse a stack that has no room for prompts, and say of one that no test has.

    Raises:
        ConfigError: prompts would do nothing there, or harm.
    """
    kind = stack.config.model_type
    why = NO_ROOM.get(kind, _ALIBI if getattr(stack.config, "alibi", False) else None)
    if why is not None:
        raise ConfigError(
            f'{type(model).__name__} has no room for prompts in its sequence: model type "{kind}" {why}. Take a method '
            "that adapts its weights."
        )
    if not tried(kind):
        logger.warning(
            'Prompts in the sequence have not been tried with model type "%s": see that they change what it says, and '
            "that generate() with and without use_cache agree.",
            kind,
        )


def tried(kind: str) -> bool:
    """Whether tests put prompts into models of this `model_type`."""
    return kind in ALSO_TRIED or module_roles.family(kind) is not None


@contextmanager
def explained(kind: str) -> Iterator[None]:
    """What goes wrong in a block with prompts of a `model_type` that was never tried, as a `ConfigError`.

    Raises:
        ConfigError: instead of the block's own error, which stands in it.
    """
    try:
        yield
    except (AssertionError, AttributeError, IndexError, RuntimeError, TypeError) as error:
        if tried(kind) or isinstance(error, torch.OutOfMemoryError):
            raise
        raise ConfigError(
            f'Prompts in the sequence have not been tried with model type "{kind}", and its blocks fail with them '
            f"({type(error).__name__}: {error}). Take a method that adapts its weights."
        ) from error
