"""The state of one forward call of a stack with prompts: made and dropped by hooks on the stack, read by its blocks.

What belongs to one call is in its `Call` and not on a module: two forwards before one backward, recomputed blocks and
threads share nothing. Hooks and not a wrapper, because the stack may be the whole model (`AutoModel`), which nothing
could wrap.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.masking_utils import find_first_full_attention_index

from peft_lab.errors import ConfigError, check_keys
from peft_lab.tuners.tokens import parameter_names, split


@dataclass
class CacheSlots:
    """Which slots a KV cache holds: their number by depth, and those that a row does not use, bool (batch, slots)."""

    count: dict[int, int] = field(default_factory=dict)
    unused: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class Call:
    """State of one forward call of one stack of blocks.

    Attributes:
        stack: the module that was called.
        mask: bool (batch, tokens), False at padding; None if there is none.
        instruction: (batch, tokens), true where a prompt may look, as the caller gave it; None if it did not.
        labels: labels of the call; a text that is to be continued has -100 where there is no answer.
        continues: whether the model continues texts, so that labels are a part of them.
        prompt_ids: int (batch,), which of an adapter's prompts each row asks for; None if it does not.
        cache: what the KV cache holds of slots; None without a cache.
        prefill: whether slots are to be filled; False for a step of decoding.
        depth: number of blocks that have run.
        states: the slots as the block before left them (batch, slots, dim).
        unused: bool (batch, slots), the slots of `states` that a row does not have; None if every row has all.
        shared: what an earlier block of this call hands on to later ones, by a key of the method's choice.
        logits: class logits (batch, classes) in place of the head's, and the rows that have them; None for the head's.
        readout: slots of the last block (batch, slots, dim) whose mean with the class token the head shall read, and
            which of them count, bool (batch, slots); None if it reads the class token alone.
        refused: why prompts cannot go into this call; said by the first block that has some.
        length, position: number of tokens, and where among them the slots stand.
    """

    stack: nn.Module
    mask: Tensor | None = None
    instruction: Tensor | None = None
    labels: Tensor | None = None
    continues: bool = False
    prompt_ids: Tensor | None = None
    cache: CacheSlots | None = None
    prefill: bool = True
    depth: int = 0
    states: Tensor | None = None
    unused: Tensor | None = None
    shared: dict[Any, Any] = field(default_factory=dict)
    logits: tuple[Tensor, Tensor | None] | None = None
    readout: tuple[Tensor, Tensor] | None = None
    refused: str = ""
    length: int = 0
    position: int = 0
    token: Token[Call | None] | None = None

    def of_rows(self, index: Tensor, batch: int) -> Call:
        """The call as rows of a batch of this size see it; `shared` stays the same."""
        of_each = ("mask", "instruction", "labels", "prompt_ids")
        values: dict[str, Any] = {name: getattr(self, name) for name in of_each}
        chosen: dict[str, Any] = {k: None if v is None or len(v) != batch else v[index] for k, v in values.items()}
        return Call(self.stack, **chosen, continues=self.continues, depth=self.depth, shared=self.shared)


#: The call that runs, if any.
CALL: ContextVar[Call | None] = ContextVar("peft_lab_call", default=None)
_INPUTS: ContextVar[dict[str, Any] | None] = ContextVar("peft_lab_inputs", default=None)
_GIVEN: ContextVar[dict[str, Tensor] | None] = ContextVar("peft_lab_given", default=None)
#: Arguments of a forward that prompts read and that no backbone knows.
_OWN = ("instruction_mask", "prompt_ids")
#: The attribute of a KV cache that holds its `CacheSlots`. It is there since a copy of the cache takes it along, and
#: since `torch.compile` fails on a table of caches from which one dies meanwhile.
CACHE_SLOTS = "peft_lab_slots"


def begin(stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
    """Pre-hook of a stack: make the `Call`, and count the slots that a cache holds into mask and positions."""
    names = parameter_names(type(stack).forward)
    kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    cache, mask = own_cache(kwargs.get("past_key_values")), kwargs.get("attention_mask")
    own = {name: value for name in _OWN if (value := kwargs.pop(name, None)) is not None}
    inputs = {**_expanded(kwargs), **(_INPUTS.get() or {}), **own}
    call = Call(
        stack,
        mask=mask.bool() if mask is not None and mask.ndim == 2 else None,
        instruction=inputs.get("instruction_mask"),
        labels=inputs.get("labels"),
        continues=bool(inputs.get("continues")),
        prompt_ids=inputs.get("prompt_ids"),
    )
    past = int(cache.get_seq_length()) if cache is not None else 0
    if getattr(cache, "is_compileable", False):
        call.refused = "Prompts in the sequence need a cache that grows; leave out cache_implementation='static'."
    elif past:
        call.prefill = False
        call.cache = getattr(cache, CACHE_SLOTS, None)
        if call.cache is not None:
            call.refused = _count_cached(call.cache, cache, past, kwargs, names)
    elif _is_packed(kwargs.get("position_ids"), call.mask):
        call.refused = "Packed sequences have no place for prompts: pass one sequence per row of the batch."
    call.token = CALL.set(call)
    return (), kwargs


def end(stack: nn.Module, args: Any, output: Any) -> Any:
    """Post-hook of a stack, called after errors too: drop the `Call`, and take the slots out of what was recorded.

    Raises:
        ConfigError: what stands behind the stack shall read slots, and it was called alone.
    """
    call = CALL.get()
    if call is None or call.stack is not stack or call.token is None:
        return output
    CALL.reset(call.token)
    inputs = _INPUTS.get()
    if inputs is not None:
        inputs |= {name: value for name in ("logits", "readout") if (value := getattr(call, name)) is not None}
    elif call.readout is not None and output is not None:
        raise ConfigError("Prompts are read behind the stack of blocks; call the whole model.")
    for name, dims in (("hidden_states", (1,)), ("attentions", (2, 3))):
        recorded = getattr(output, name, None)
        if isinstance(recorded, tuple) and call.prefill and call.length:
            setattr(output, name, tuple(_tokens_alone(part, call, dims) for part in recorded))
    return output


def _tokens_alone(part: Tensor, call: Call, dims: tuple[int, ...]) -> Tensor:
    """What was recorded, without the slots that it may hold along some dimensions."""
    for dim in dims:
        count = part.shape[dim] - call.length
        part = split(part, count, call.position, dim)[0] if count > 0 else part
    return part


def take_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    """Pre-hook of the whole model: keep what tells the instruction from the answer.

    Raises:
        ConfigError: `instruction_mask` or `prompt_ids` is no tensor.
    """
    own = {name: kwargs.pop(name, None) for name in _OWN}
    for name, value in own.items():
        if value is not None and not isinstance(value, Tensor):
            raise ConfigError(f"{name} must be a tensor, got {type(value).__name__}.")
    inputs = {"labels": kwargs.get("labels"), "continues": can_continue(model), **own}
    _INPUTS.set({name: value for name, value in inputs.items() if value is not None})
    return args, kwargs


def can_continue(model: Any) -> bool:
    """Whether a model writes text behind what it is given, so that its labels are tokens."""
    return not isinstance(model, PreTrainedModel) or model.can_generate()


def replace_logits(head: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Post-hook of a classification head: put the logits of the slots there, so that the model's own loss sees them."""
    found = (_INPUTS.get() or {}).get("logits")
    if found is None:
        return output
    logits, rows = found[0].to(output.dtype), found[1]
    return logits if rows is None else torch.where(rows[:, None], logits, output)


def read_out(norm: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Post-hook of the norm behind the blocks: put the mean of class token and slots in the place of the class token.

    Args:
        norm: the norm.
        args: not used.
        output: its output for all tokens (batch, tokens, dim), the class token first, or for that alone (batch, dim).
    """
    call, inputs = CALL.get(), _INPUTS.get() or {}
    found = inputs.pop("readout", None) if call is None else call.readout
    if found is None:
        return output
    if call is not None:
        call.readout = None  # the norm runs again, for the slots
    slots, used = found
    read = torch.where(used[..., None], norm(slots), 0).sum(1)
    first = output if output.ndim == 2 else output[:, 0]
    mean = (first + read) / (1 + used.sum(1, keepdim=True))
    mean = mean.to(output.dtype)
    return mean if output.ndim == 2 else torch.cat([mean[:, None], output[:, 1:]], 1)


def drop_inputs(model: nn.Module, args: Any, output: Any) -> Any:
    """Post-hook of the whole model, called after errors too."""
    _INPUTS.set(None)
    return output


@contextmanager
def prompt_inputs(**inputs: Tensor) -> Iterator[None]:
    """Give prompts what they read where the call itself cannot: `generate` takes no argument that a model has not.

    Args:
        inputs: `instruction_mask` (batch, tokens), which is False for tokens behind its end, and `prompt_ids` (batch,).

    Raises:
        ConfigError: an argument of another name.
    """
    check_keys(inputs, _OWN, "prompt_inputs")
    token = _GIVEN.set(inputs)
    try:
        yield
    finally:
        _GIVEN.reset(token)


def _expanded(kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """The inputs given around a call, for as many rows (beams) and tokens as it has now."""
    given = dict(_GIVEN.get() or {})
    like = next((kwargs[n] for n in ("input_ids", "inputs_embeds", "pixel_values") if kwargs.get(n) is not None), None)
    for name, value in given.items():
        if like is not None and len(like) % len(value) == 0:
            given[name] = value = value.repeat_interleave(len(like) // len(value), 0)
        if like is not None and name == "instruction_mask":
            given[name] = nn.functional.pad(value, (0, max(like.shape[1] - value.shape[1], 0)))
    return given


def _count_cached(slots: CacheSlots, cache: Cache, past: int, kwargs: dict[str, Any], names: tuple[str, ...]) -> str:
    """Count the slots in; returns why that cannot be, if so."""
    if any(cache.is_sliding) and len({slots.count.get(depth, 0) for depth in range(len(cache.layers))}) > 1:
        return "Prompts in some blocks only do not go with a cache of sliding windows; pass use_cache=False."
    given = kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"]
    if given.shape[1] > 1 and any(slots.count.values()):
        return (
            f"A KV cache with prompts in it goes on by one token at a time, got {given.shape[1]}: leave out "
            "prefill_chunk_size and assistant_model, and give the whole text where a conversation goes on."
        )
    mask = kwargs.get("attention_mask")
    measured = slots.count.get(find_first_full_attention_index(cache), 0)  # the layer that the stack sizes the mask by
    if measured and mask is not None and mask.ndim == 2:
        kwargs["attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], measured), mask], 1)
    if kwargs.get("position_ids") is None and "position_ids" in names:
        start = past - slots.count.get(0, 0)
        kwargs["position_ids"] = torch.arange(start, start + given.shape[1], device=given.device)[None]
    return ""


def _is_packed(position_ids: Tensor | None, mask: Tensor | None) -> bool:
    """Whether a row begins anew somewhere within its tokens."""
    if position_ids is None or position_ids.ndim != 2:
        return False
    anew = position_ids.diff(dim=1) < 0
    if mask is not None and mask.shape == position_ids.shape:
        anew = anew & mask[:, 1:] & mask[:, :-1]
    return bool(anew.any())


def own_cache(cache: Any) -> Any:
    """The cache of self-attention."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
