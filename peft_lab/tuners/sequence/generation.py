"""Calls of `generate` on a model with prompts in its sequence.

What is written must not change the prompts: they are made from the tokens that `generate` was given. With a KV cache
they are in it; without one the text is read anew for each token, and the number of tokens at the first reading tells
which were given. A cache of an earlier call holds prompts beside its tokens, and `generate` takes what lies behind the
cache's length as new, so the length is reported to it without them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from types import MethodType
from typing import Any

from torch import nn

from peft_lab.errors import ConfigError
from peft_lab.tuners.sequence.prompt_state import in_use, outer_cache, report_text_length, report_whole_length

#: Arguments with which text is read in pieces, or with drafts of what is to be written.
_NO_WHOLE_TEXT = ("prefill_chunk_size", "assistant_model", "prompt_lookup_num_tokens")

#: Number of tokens that the running `generate` was given, by block; None outside of one.
_GIVEN: ContextVar[dict[nn.Module, int] | None] = ContextVar("peft_lab_generation", default=None)


def given_length(block: nn.Module, tokens: int) -> int:
    """Number of tokens, of those that a block reads, that the running `generate` was given.

    Outside of `generate`, and when the block reads for the first time, these are all `tokens`.
    """
    known = _GIVEN.get()
    return tokens if known is None else min(known.setdefault(block, tokens), tokens)


class WrappedGenerate:
    """Function `generate` of one model instance whose blocks may hold prompts.

    A deep copy or a pickle of the model takes its own along.

    Attributes:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        # Another library may have wrapped the instance before.
        self._inner: Callable[..., Any] | None = vars(model).get("generate")
        self.__name__ = "generate"
        self.__doc__ = self._own().__doc__

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._own())

    def _own(self) -> Callable[..., Any]:
        own: Any = type(self.model)
        return self._inner or MethodType(own.generate, self.model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the model does.

        Raises:
            ConfigError: the text would be read in pieces, or drafts of it; an instruction is given, and the cache holds
                prompts already.
        """
        config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
        settings = config or getattr(self.model, "generation_config", None)
        given = [n for n in _NO_WHOLE_TEXT if kwargs.get(n) is not None or getattr(settings, n, None) is not None]
        if given and in_use(self.model):
            raise ConfigError(f"Prompts are made for a whole text, and then tokens come singly: leave out {given[0]}.")
        cache = outer_cache(kwargs)
        if report_text_length(cache) and kwargs.get("instruction_mask") is not None:
            report_whole_length(cache)
            raise ConfigError("The KV cache of a turn before holds prompts already: leave out instruction_mask.")
        token = _GIVEN.set({})
        try:
            return self._own()(*args, **kwargs)
        finally:
            report_whole_length(cache)
            _GIVEN.reset(token)


def wrap_generate(model: Any) -> None:
    """Wrap `generate` of a model that has one; an existing wrapper stays."""
    if hasattr(type(model), "generate") and not isinstance(vars(model).get("generate"), WrappedGenerate):
        model.generate = WrappedGenerate(model)


def unwrap_generate(model: Any) -> None:
    """Remove the wrapper of `wrap_generate`."""
    wrapper = vars(model).get("generate")
    if isinstance(wrapper, WrappedGenerate):
        if wrapper._inner is None:
            del model.generate
        else:
            model.generate = wrapper._inner
