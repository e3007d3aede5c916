"""State of prompt tokens in one forward call of a stack.

It is made around the stack and read by its blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache
from transformers.masking_utils import find_first_full_attention_index

from peft_lab.errors import ConfigError
from peft_lab.tuners.forward_context import ForwardContext
from peft_lab.tuners.sequence.key_values import shift_positions
from peft_lab.tuners.sequence.text_positions import counted, first_tokens, is_counted, needs_count, position_offset
from peft_lab.tuners.tokens import parameter_names, split

#: Key of the state in `ForwardContext.shared`.
_PROMPTS = "prompts"
#: Keys by which the stack hands class logits and prompts on to the head behind it.
HEAD_LOGITS, READOUT = "head_logits", "readout"
_CACHE_NAMES = ("past_key_values", "cache", "layer_past")
#: Attribute of a KV cache that holds its `CachedPrompts`. It is stored on the cache, because a copy of the cache takes
#: it along, and because `torch.compile` fails on a table of caches from which one dies meanwhile.
CACHED_PROMPTS = "peft_lab_prompts"


@dataclass
class CachedPrompts:
    """Prompt tokens in a KV cache.

    Attributes:
        adapters: names of the adapters whose prompts they are, one for all rows, or one for each.
        counted: True if positions are those among a row's own tokens; else later ones go on from the length.
        count: number of prompts by index of the block.
        unused: bool (batch, prompts) by index of the block, the prompts that a row does not have.
    """

    adapters: tuple[str, ...]
    counted: bool
    count: dict[int, int] = field(default_factory=dict)
    unused: dict[int, Tensor] = field(default_factory=dict)

    def check_adapters(self, names: tuple[str, ...]) -> None:
        """Refuse to go on with other adapters than those whose prompts the cache holds.

        Raises:
            ConfigError: the names differ.
        """
        if names != self.adapters:
            raise ConfigError(
                f"The KV cache holds the prompts of {', '.join(self.adapters)}, and this call has the adapters "
                f"{', '.join(names) or 'switched off'}: let generate() make a cache of its own."
            )


@dataclass
class PromptState:
    """State of prompt tokens in one forward call of one stack.

    Attributes:
        context: the forward call that it belongs to.
        mask: bool (batch, tokens), False at padding; None if there is none.
        first: index of each row's first token, int64 (batch or 1,), where the prompts have their position; None for
            position 0.
        positions_given: True if the call gives positions.
        counted: True if positions are those among a row's own tokens.
        rows: numbers of the batch's rows that it is for, int64; None for all.
        batch: number of rows of the whole batch.
        cache: prompts that the KV cache holds; None without a cache.
        prefill: True where prompts are to be written; False for a step of decoding.
        depth: number of blocks that have run.
        states: the prompts as the block before left them (batch, prompts, dim).
        unused: bool (batch, prompts), the prompts of `states` that a row does not have; None if every row has all.
        refused: reason why prompts cannot go into this call; raised by the first block that has some.
        length, position: number of tokens, and number of those before the prompts.
    """

    context: ForwardContext
    mask: Tensor | None = None
    first: Tensor | None = None
    positions_given: bool = False
    counted: bool = True
    rows: Tensor | None = None
    batch: int = 0
    cache: CachedPrompts | None = None
    prefill: bool = True
    depth: int = 0
    states: Tensor | None = None
    unused: Tensor | None = None
    refused: str = ""
    length: int = 0
    position: int = 0

    @staticmethod
    def current() -> PromptState | None:
        """State of the running stack; None outside of a stack."""
        context = ForwardContext.current()
        return None if context is None else context.shared.get(_PROMPTS)

    def for_rows(self, rows: Tensor) -> PromptState:
        """State for some rows of the batch."""
        mask = None if self.mask is None else self.mask[rows]
        return replace(self, mask=mask, rows=rows, states=None, unused=None)

    def merge_rows(self, states: Tensor, counts: Tensor, writes: Tensor) -> None:
        """Merge new prompts (batch, prompts, dim) of a mixed batch.

        A row that writes gets the new ones, the others keep theirs. Prompts stand at the right of those that a row does
        not have.

        Args:
            states: the new prompts.
            counts: number of prompts that each row writes, int64 (batch,).
            writes: bool (batch,), True if a row writes at all.
        """
        if self.states is not None:
            before = self.states.shape[1]
            missing = states.shape[1] - before
            old = pad(self.states, (0, 0, max(missing, 0), 0))
            states = pad(states, (0, 0, max(-missing, 0), 0))
            states = torch.where(writes[:, None, None], states, old)
            had = torch.full_like(counts, before) if self.unused is None else (~self.unused).sum(1)
            counts = torch.where(writes, counts, had)
        size = states.shape[1]
        unused = torch.arange(size, device=states.device) < (size - counts)[:, None]
        self.states, self.unused = states, unused if bool(unused.any()) else None

    def row_input(self, name: str) -> Tensor | None:
        """Value of a declared row input for the rows of this state."""
        found = self.context.row_input(name, self.batch)
        return found if found is None or self.rows is None else found[self.rows]

    @property
    def labels(self) -> Tensor | None:
        """Labels of the call for this state's rows; None without labels."""
        # Labels that are not one per row of the batch cannot be chosen by row.
        labels = self.context.arguments.get("labels")
        if not isinstance(labels, Tensor) or self.rows is None or len(labels) != self.batch:
            return labels
        return labels[self.rows]

    @property
    def continues_text(self) -> bool:
        """True if the called model continues its input text."""
        return can_continue(self.context.model)


def can_continue(model: Any) -> bool:
    """Test whether a model continues its input text.

    Its labels are then tokens.
    """
    return not isinstance(model, PreTrainedModel) or model.can_generate()


def run_with_prompts(stack: nn.Module, forward: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
    """Run a stack of blocks that may hold prompts.

    This code stands around the stack's forward. It makes the `PromptState`, counts cached prompts into mask and
    positions, and takes the prompts out of recorded hidden states and attentions.

    Raises:
        ConfigError: the head behind the stack reads prompts, and the stack was called alone.
    """
    context = ForwardContext.current()
    assert context is not None, "the wrapper of the stack has opened one"
    state = _begin(stack, context, kwargs)
    # The stacks of one model (encoder and decoder, text and vision) share a context, each with its own state.
    outer = context.shared.get(_PROMPTS)
    context.shared[_PROMPTS] = state
    # A stack that takes no positions counts them from the length of the cache.
    cache = outer_cache(kwargs) if "position_ids" not in parameter_names(type(stack).forward) else None
    report_text_length(cache)
    try:
        output = forward(**kwargs)
    finally:
        context.shared[_PROMPTS] = outer
        report_whole_length(cache)
    if READOUT in context.shared and context.model is stack:
        raise ConfigError("Prompts are read behind the stack of blocks; call the whole model.")
    # Tensors recorded inside of the blocks hold the prompts; callers expect those of the tokens alone.
    for name, dims in (("hidden_states", (1,)), ("attentions", (2, 3))):
        recorded = getattr(output, name, None)
        if isinstance(recorded, tuple) and state.prefill and state.length:
            setattr(output, name, tuple(_tokens_alone(part, state, dims) for part in recorded))
    return output


def _begin(stack: nn.Module, context: ForwardContext, kwargs: dict[str, Any]) -> PromptState:
    """Make a call's state and account for padding and for prompts in the cache."""
    names = parameter_names(type(stack).forward)
    outer = outer_cache(kwargs)
    report_whole_length(outer)
    cache, mask = self_attention_cache(outer), kwargs.get("attention_mask")
    state = PromptState(context, mask=mask.bool() if mask is not None and mask.ndim == 2 else None)
    state.positions_given = kwargs.get("position_ids") is not None
    past = int(cache.get_seq_length()) if cache is not None else 0
    # A reason is kept, not raised: a stack without prompts in this call must run.
    if getattr(cache, "is_compileable", False):
        state.refused = "Prompts in the sequence need a cache that grows; leave out cache_implementation='static'."
    elif past:
        state.prefill = False
        state.cache = getattr(cache, CACHED_PROMPTS, None)
        if state.cache is not None:
            state.refused = _count_cached(state, cache, stack, kwargs)
    elif _is_packed(kwargs.get("position_ids"), state.mask):
        state.refused = "Packed sequences have no place for prompts: pass one sequence per row of the batch."
    else:
        state.first = first_tokens(state.mask)
        if state.positions_given:
            state.first = kwargs["position_ids"].new_zeros(1) if state.first is None else state.first
            state.counted = is_counted(kwargs["position_ids"], state.mask, position_offset(stack))
        # Only where prompts are in use: the stack without them answers as transformers lets it.
        elif state.mask is not None and "position_ids" in names and needs_count(state.mask) and in_use(stack):
            kwargs["position_ids"] = counted(state.mask, position_offset(stack))
    shift_positions(stack, state, kwargs)
    return state


def in_use(model: nn.Module) -> bool:
    """Test whether prompts are put before a block of the model in this call."""
    return any(getattr(module, "in_use", False) for module in model.modules())


def _tokens_alone(part: Tensor, state: PromptState, dims: tuple[int, ...]) -> Tensor:
    """Remove the prompts from a recorded tensor along some dimensions."""
    for dim in dims:
        count = part.shape[dim] - state.length
        if count > 0:
            part = split(part, count, state.position, dim)[0]
    return part


def replace_logits(head: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Post-hook of a classification head that replaces its logits by the prompts'.

    So the model's own loss gets them. The context holds logits (batch, classes) and the rows that have them, bool
    (batch,), None for all.
    """
    context = ForwardContext.current()
    found = None if context is None else context.shared.get(HEAD_LOGITS)
    if found is None:
        return output
    logits, rows = found[0].to(output.dtype), found[1]
    return logits if rows is None else torch.where(rows[:, None], logits, output)


def read_out(norm: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Post-hook of the final norm that averages class token and prompts.

    The mean replaces the class token. The context holds the prompts (batch, prompts, dim) of the last block and those
    that count, bool (batch, prompts).

    Args:
        norm: the norm.
        args: not used.
        output: its output for all tokens (batch, tokens, dim), the class token first, or for that alone (batch, dim).
    """
    context = ForwardContext.current()
    found = None if context is None else context.shared.pop(READOUT, None)  # the norm runs again, for the prompts
    if found is None:
        return output
    prompts, used = found
    # The mean is over normed tokens, and over those prompts that the row has.
    read = torch.where(used[..., None], norm(prompts), 0).sum(1)
    first = output if output.ndim == 2 else output[:, 0]
    mean = (first + read) / (1 + used.sum(1, keepdim=True))
    mean = mean.to(output.dtype)
    return mean if output.ndim == 2 else torch.cat([mean[:, None], output[:, 1:]], 1)


def _count_cached(state: PromptState, cache: Cache, stack: nn.Module, kwargs: dict[str, Any]) -> str:
    """Account for cached prompts in mask and positions.

    Returns the reason if that is impossible, else "".
    """
    assert state.cache is not None
    prompts, mask = state.cache, state.mask
    counts = {prompts.count.get(depth, 0) for depth in range(len(cache.layers))}
    if any(cache.is_sliding) and len(counts) > 1:
        return "Prompts in some blocks only do not go with a cache of sliding windows; pass use_cache=False."
    given = kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"]
    start = text_length(cache, prompts)
    end = start + given.shape[1]
    if "position_ids" not in parameter_names(type(stack).forward):
        # Such a stack may also make a mask of that length by itself.
        if kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = given.new_ones(given.shape[0], end)
    elif not state.positions_given:
        # The stack would count the cached prompts as positions, and prompts take none.
        offset = position_offset(stack)
        positions = torch.arange(start, end, device=given.device)[None] + offset
        if mask is not None and mask.shape[1] == end and prompts.counted and needs_count(mask):
            positions = counted(mask, offset)[:, start:]
        kwargs["position_ids"] = positions
    # The stack sizes its mask by the first layer with full attention.
    measured, mask = prompts.count.get(find_first_full_attention_index(cache), 0), kwargs.get("attention_mask")
    if measured and mask is not None and mask.ndim == 2:
        kwargs["attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], measured), mask], 1)
    return ""


def text_length(cache: Cache, prompts: CachedPrompts) -> int:
    """Number of tokens in a KV cache without the prompts."""
    # A cache measures its length in its first layer with attention.
    first = next(index for index, layer in enumerate(cache.layers) if isinstance(layer, CacheLayerMixin))
    return max(Cache.get_seq_length(cache, first) - prompts.count.get(first, 0), 0)


def report_text_length(cache: Any) -> bool:
    """Let a KV cache report its length without prompts to a caller that names no layer.

    So callers ask who count tokens or positions: `generate`, and stacks that take no positions. Those who want the
    number of entries in a layer name it. A cache belongs to one call at a time. Returns whether it holds prompts.
    """
    prompts = getattr(self_attention_cache(cache), CACHED_PROMPTS, None)
    if prompts is not None:
        text, whole = text_length(self_attention_cache(cache), prompts), cache.get_seq_length
        cache.get_seq_length = lambda layer_idx=None: text if layer_idx is None else whole(layer_idx)
    return prompts is not None


def report_whole_length(cache: Any) -> None:
    """Undo `report_text_length`."""
    if isinstance(cache, Cache):
        vars(cache).pop("get_seq_length", None)


def _is_packed(position_ids: Tensor | None, mask: Tensor | None) -> bool:
    """Test whether a row holds several sequences, each with positions from 0."""
    if position_ids is None or position_ids.ndim != 2:
        return False
    # Positions that go back within the text start another sequence; at padding they mean nothing.
    anew = position_ids.diff(dim=1) < 0
    if mask is not None and mask.shape == position_ids.shape:
        anew = anew & mask[:, 1:] & mask[:, :-1]
    return bool(anew.any())


def outer_cache(kwargs: dict[str, Any]) -> Any:
    """KV cache among the arguments of a model, stack or block, whatever its name there.

    transformers 5.24 renamed `past_key_values` to `cache`; some blocks have names of their own.
    """
    return next((kwargs[name] for name in _CACHE_NAMES if kwargs.get(name) is not None), None)


def self_attention_cache(cache: Any) -> Any:
    """Cache of self-attention, also of an encoder-decoder's cache."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def given_cache(kwargs: dict[str, Any]) -> Any:
    """Cache of self-attention among the arguments of a stack or block."""
    return self_attention_cache(outer_cache(kwargs))
