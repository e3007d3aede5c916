"""Model types that support prompt tokens, and errors for the others."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from peft_lab.backbones import module_roles
from peft_lab.backbones.prompt_support import ALIBI, PROMPT_SUPPORT
from peft_lab.errors import ConfigError

logger = logging.getLogger("peft_lab")


def check_supported(model: nn.Module, stack: Any) -> None:
    """Refuse a stack without prompt support; warn of an untested one.

    Raises:
        ConfigError: prompts would do nothing there, or harm.
    """
    model_type = stack.config.model_type
    known = PROMPT_SUPPORT.get(model_type)
    # ALiBi is a setting of some families, so the table of model types cannot tell.
    obstacle = known.obstacle if known is not None else ""
    if not obstacle and getattr(stack.config, "alibi", False):
        obstacle = ALIBI
    if obstacle:
        raise ConfigError(
            f'{type(model).__name__} does not support prompts in its sequence: model type "{model_type}" {obstacle}. '
            "Take a method that adapts its weights."
        )
    if not is_tested(model_type):
        logger.warning(
            'Prompts in the sequence have not been tried with model type "%s": see that they change what it says, and '
            "that generate() with and without use_cache agree.",
            model_type,
        )


def is_tested(model_type: str) -> bool:
    """Test whether the test suite covers prompts in models of this type."""
    known = PROMPT_SUPPORT.get(model_type)
    return module_roles.family(model_type) is not None or (known is not None and known.tested and not known.obstacle)


@contextmanager
def explained(model_type: str) -> Iterator[None]:
    """Turn a block's errors into `ConfigError` for untested model types.

    Raises:
        ConfigError: instead of the block's own error, which stands in it.
    """
    try:
        yield
    except (AssertionError, AttributeError, IndexError, RuntimeError, TypeError) as error:
        # In a tested type the error is a bug, and lack of memory says nothing of prompts: both go on as they are.
        if is_tested(model_type) or isinstance(error, torch.OutOfMemoryError):
            raise
        raise ConfigError(
            f'Prompts in the sequence have not been tried with model type "{model_type}", and its blocks fail '
            f"with them ({type(error).__name__}: {error}). Take a method that adapts its weights."
        ) from error
