"""Prompts in the sequence of a frozen backbone: each wrapped block puts slots in, runs, and takes them out again.

Between the blocks only tokens travel; what a block made of the slots is kept in the `Call` and goes into the next
block, unless that one writes prompts of its own. So the pooler, the final norm, the head and whoever reads hidden
states see the tokens alone. The slots have no position: learned position tables do not see them, and under rotary
positions they stand at position 0, so text keeps the positions it has without them. Masks, rotary positions and biases,
which the stack makes for the tokens alone, are extended on the way into each block (`peft_lab.slots`).

What belongs to one forward call is in its `Call`, which a pre-hook of the stack makes and a post-hook drops, and not on
a module: two forwards before one backward, recomputed blocks and threads share nothing. A hook and not a wrapper,
because the stack may be the whole model (`AutoModel`), which nothing could wrap.

With a KV cache the slots are filled at prefill and stay in the cache; a step of decoding only counts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.masking_utils import find_first_full_attention_index

from peft_lab.errors import ConfigError
from peft_lab.layer import AdapterLayer
from peft_lab.rows import BASE, Rows
from peft_lab.slots import align_keys, extend_bias, extend_mask, extend_rotary, insert, parameter_names, split

#: Arguments of blocks that hold a bias for each pair of positions.
_BIASES = ("position_bias", "relative_pos")
#: Vision transformers whose sequence is of patches alone.
_NO_CLASS_TOKEN = ("siglip_vision_model", "siglip2_vision_model")


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
        cache: what the KV cache holds of slots; None without a cache.
        prefill: whether slots are to be filled; False for a step of decoding.
        depth: number of blocks that have run.
        states: the slots as the block before left them (batch, slots, dim).
        unused: bool (batch, slots), the slots of `states` that a row does not have; None if every row has all.
        shared: what an earlier block of this call hands on to later ones, by a key of the method's choice.
        length, position: number of tokens, and where among them the slots stand.
    """

    stack: nn.Module
    mask: Tensor | None = None
    instruction: Tensor | None = None
    labels: Tensor | None = None
    cache: CacheSlots | None = None
    prefill: bool = True
    depth: int = 0
    states: Tensor | None = None
    unused: Tensor | None = None
    shared: dict[Any, Any] = field(default_factory=dict)
    length: int = 0
    position: int = 0
    token: Token[Call | None] | None = None

    def of_rows(self, index: Tensor, batch: int) -> Call:
        """The call as rows of a batch of this size see it; `shared` stays the same."""
        mask, instruction, labels = (
            None if value is None or len(value) != batch else value[index]
            for value in (self.mask, self.instruction, self.labels)
        )
        return Call(self.stack, mask, instruction, labels, depth=self.depth, shared=self.shared)


_CALL: ContextVar[Call | None] = ContextVar("peft_lab_call", default=None)
_INPUTS: ContextVar[dict[str, Any] | None] = ContextVar("peft_lab_inputs", default=None)
_CACHES: WeakKeyDictionary[Cache, CacheSlots] = WeakKeyDictionary()


def begin(stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
    """Pre-hook of a stack: make the `Call`, and count the slots that a cache holds into mask and positions.

    Raises:
        ConfigError: a cache or a mask that prompts do not go with.
    """
    names = parameter_names(type(stack).forward)
    kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    cache, mask = _own(kwargs.get("past_key_values")), kwargs.get("attention_mask")
    if getattr(cache, "is_compileable", False):
        raise ConfigError("Prompts in the sequence need a cache that grows; leave out cache_implementation='static'.")
    given, inputs = kwargs.pop("instruction_mask", None), _INPUTS.get() or {}
    call = Call(
        stack,
        mask=mask.bool() if mask is not None and mask.ndim == 2 else None,
        instruction=inputs.get("instruction_mask") if given is None else given,
        labels=inputs.get("labels"),
    )
    past = int(cache.get_seq_length()) if cache is not None else 0
    if past:
        call.prefill = False
        call.cache = _CACHES.get(cache)
        if call.cache is not None:
            _count_cached(call.cache, cache, past, kwargs, names)
    else:
        _refuse_packed(kwargs.get("position_ids"))
    call.token = _CALL.set(call)
    return (), kwargs


def end(stack: nn.Module, args: Any, output: Any) -> Any:
    """Post-hook of a stack, called after errors too: drop the `Call`, and take the slots out of what was recorded."""
    call = _CALL.get()
    if call is None or call.stack is not stack or call.token is None:
        return output
    _CALL.reset(call.token)
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
    """Pre-hook of the whole model: keep what tells the instruction from the answer."""
    _INPUTS.set({"labels": kwargs.get("labels"), "instruction_mask": kwargs.pop("instruction_mask", None)})
    return args, kwargs


def drop_inputs(model: nn.Module, args: Any, output: Any) -> Any:
    """Post-hook of the whole model, called after errors too."""
    _INPUTS.set(None)
    return output


def _count_cached(slots: CacheSlots, cache: Cache, past: int, kwargs: dict[str, Any], names: tuple[str, ...]) -> None:
    if any(cache.is_sliding) and len({slots.count.get(depth, 0) for depth in range(len(cache.layers))}) > 1:
        raise ConfigError(
            "Prompts in some blocks only do not go with a cache of sliding windows; pass use_cache=False."
        )
    given = kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"]
    if given.shape[1] > 1:
        raise ConfigError(
            f"A KV cache with prompts in it goes on by one token at a time, got {given.shape[1]}: leave out "
            "prefill_chunk_size and assistant_model, and give the whole text where a conversation goes on."
        )
    mask = kwargs.get("attention_mask")
    measured = slots.count.get(find_first_full_attention_index(cache), 0)  # the layer that the stack sizes the mask by
    if measured and mask is not None and mask.ndim == 2:
        kwargs["attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], measured), mask], 1)
    if kwargs.get("position_ids") is None and "position_ids" in names:
        kwargs["position_ids"] = torch.full((1, 1), past - slots.count.get(0, 0), device=given.device)


def _refuse_packed(position_ids: Tensor | None) -> None:
    if position_ids is not None and position_ids.ndim == 2 and bool((position_ids.diff(dim=1) < 0).any()):
        raise ConfigError("Packed sequences have no place for prompts: pass one sequence per row of the batch.")


def _own(cache: Any) -> Any:
    """The cache of self-attention."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


class SequenceLayer(AdapterLayer):
    """A block of a stack with room for prompts. A method supplies `initial_values` and `prompts`.

    Attributes:
        depth, depths: index of the block in its stack, and the number of blocks there.
        settings: config of the stack.
    """

    depth: int
    depths: int
    settings: Any

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        return int(self.settings.hidden_size)

    @property
    def prefix_tokens(self) -> int:
        """Class and register tokens of a vision transformer, which stand before the patches; 0 for text."""
        settings = self.settings
        if getattr(settings, "patch_size", None) is None or settings.model_type in _NO_CLASS_TOKEN:
            return 0
        distilled = 1 if settings.model_type == "deit" else 0
        return 1 + distilled + (getattr(settings, "num_register_tokens", 0) or 0)

    def read_base(self, name: str) -> None:
        base = self.base_layer
        self._names = parameter_names(type(base).forward)
        if "input_dimensions" in self._names:
            raise ConfigError(
                f'Method "{self.info.name}" cannot put prompts into the windows of {type(base).__name__} ("{name}").'
            )
        self._causal = any(getattr(module, "is_causal", False) for module in base.modules())
        self._biases = [m for m in base.modules() if type(m).__name__.endswith("RelativePositionBias")]
        for module in self._biases:
            module.register_forward_hook(_extend_own_bias, with_kwargs=True)

    def instruction(self, tokens: Tensor, call: Call) -> Tensor | None:
        """The tokens that a prompt may depend on, bool (batch, tokens); None for all.

        They are neither padding nor answer: as `instruction_mask` gives them, else, in a stack that continues a text,
        those without a label.

        Raises:
            ConfigError: a row has no such token, or `instruction_mask` is not of the batch's shape.
        """
        given, labels = call.instruction, call.labels
        if given is not None and given.shape != tokens.shape[:2]:
            raise ConfigError(
                f"instruction_mask has shape {list(given.shape)}, expected {list(tokens.shape[:2])} as the tokens have."
            )
        if given is None and self._causal and labels is not None and labels.shape == tokens.shape[:2]:
            given = labels == -100
        if given is None:
            return call.mask
        chosen = given.bool() if call.mask is None else given.bool() & call.mask
        if not bool(chosen.any(1).all()):
            raise ConfigError(
                f'Method "{self.info.name}" makes its prompts from the instruction, and a row of the batch has none: '
                "labels must be -100 there, or pass instruction_mask."
            )
        return chosen

    # What a method supplies -------------------------------------------------------------------------------------

    def prompts(self, adapter: str, tokens: Tensor, call: Call) -> Tensor | None:
        """The prompts written before this block (batch, slots, dim) for hidden states (batch, tokens, dim).

        None leaves the slots as the block before made them.
        """
        raise NotImplementedError

    def position(self, adapter: str) -> int:
        """Where in the sequence the slots stand: the number of tokens before them."""
        return 0

    def after(self, adapter: str, slots: Tensor, call: Call) -> None:
        """See what the block made of the slots (batch, slots, dim)."""

    # What is the same for all -----------------------------------------------------------------------------------

    def _all_available_adapter_names(self) -> list[str]:
        # peft's own goes by parameters, which a block has not that only hands slots on
        return sorted(self.configs)

    def forward(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
        """The block on tokens with prompts; what it returns has the tokens alone."""
        active = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.configs]
        rows = None if adapter_names is None or self.disable_adapters else Rows.of(adapter_names)
        if not active and rows is None:
            return self.base_layer(*args, **kwargs)
        call = _CALL.get()
        if call is None:
            raise ConfigError("A block with prompts was called without its backbone; call the whole model.")
        positional = self._names[: len(args)]
        kwargs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        tokens = kwargs.pop("hidden_states" if "hidden_states" in kwargs else self._names[0])
        call.depth += 1
        if not call.prefill:
            return self._run(tokens, positional, self._decode(call, tokens, kwargs))
        if rows is None:
            self._write(active, tokens, call)
        else:
            self._write_rows(rows, tokens, call)
        if call.states is None:
            self._enter_cache(call, _own(kwargs.get("past_key_values")), 0, tokens.shape[1])
            return self._run(tokens, positional, kwargs)
        at = self._position(active if rows is None else rows.names)
        out = self._run(insert(tokens, call.states, at), positional, self._prefill(call, tokens, kwargs, at))
        hidden = out[0] if isinstance(out, tuple) else out
        kept, call.states = split(hidden, call.states.shape[1], at)
        return (kept, *out[1:]) if isinstance(out, tuple) else kept

    def _run(self, hidden: Tensor, positional: Sequence[str], kwargs: dict[str, Any]) -> Any:
        """The block itself. What came by position goes on so: checkpointing cuts the graph at those arguments alone."""
        return self.base_layer(hidden, *(kwargs.pop(name) for name in positional[1:]), **kwargs)

    def _position(self, names: Sequence[str]) -> int:
        found = {self.position(name) for name in names if name in self.configs}
        if len(found) > 1:
            raise ConfigError(f"Adapters {', '.join(names)} put their prompts at different places: not in one batch.")
        return found.pop()

    def _write(self, active: list[str], tokens: Tensor, call: Call) -> None:
        if len(active) > 1:
            raise ConfigError(
                f'Method "{self.info.name}" has one adapter active at a time, not {", ".join(active)}: '
                "its prompts take each other's place; call set_adapter with one name."
            )
        new = self.prompts(active[0], tokens, call)
        if new is not None:
            call.states = new.to(tokens.dtype)

    def _write_rows(self, rows: Rows, tokens: Tensor, call: Call) -> None:
        """Write each row's own prompts."""
        written: dict[str, Tensor] = {}
        indices: dict[str, Tensor] = {}
        batch, dim = tokens.shape[0], tokens.shape[-1]
        for name in rows.names:
            if name != BASE and name in self.configs:
                index = rows.of_adapter(name, batch, tokens.device)
                new = self.prompts(name, tokens[index], call.of_rows(index, batch))
                if new is not None:
                    written[name], indices[name] = new.to(tokens.dtype), index
        if not written:
            return
        count = max(new.shape[1] for new in written.values())
        states = tokens.new_zeros(batch, count, dim)
        counts = torch.zeros(batch, dtype=torch.long, device=tokens.device)
        writes = torch.zeros(batch, dtype=torch.bool, device=tokens.device)
        for name, new in written.items():
            padded = torch.nn.functional.pad(new, (0, 0, count - new.shape[1], 0))
            states = states.index_copy(0, indices[name], padded)
            counts[indices[name]], writes[indices[name]] = new.shape[1], True
        self._merge(call, states, counts, writes)

    @staticmethod
    def _merge(call: Call, states: Tensor, counts: Tensor, writes: Tensor) -> None:
        """Put new slots (batch, slots, dim) where a row writes, and keep the others.

        Slots stand at the right of those that a row does not have.

        Args:
            counts: how many slots each row writes.
            writes: whether a row writes at all.
        """
        if call.states is not None:
            before = call.states.shape[1]
            missing = states.shape[1] - before
            old = torch.nn.functional.pad(call.states, (0, 0, max(missing, 0), 0))
            states = torch.nn.functional.pad(states, (0, 0, max(-missing, 0), 0))
            states = torch.where(writes[:, None, None], states, old)
            had = torch.full_like(counts, before) if call.unused is None else (~call.unused).sum(1)
            counts = torch.where(writes, counts, had)
        size = states.shape[1]
        unused = torch.arange(size, device=states.device) < (size - counts)[:, None]
        call.states, call.unused = states, unused if bool(unused.any()) else None

    def _prefill(self, call: Call, tokens: Tensor, kwargs: dict[str, Any], at: int) -> dict[str, Any]:
        """The block's arguments beside the hidden states, for tokens with slots."""
        assert call.states is not None
        count, length = call.states.shape[1], tokens.shape[1]
        call.length, call.position = length, at
        if "attention_mask" in kwargs or call.unused is not None:
            mask = kwargs.get("attention_mask")
            kwargs["attention_mask"] = extend_mask(mask, tokens, count, at, self._causal, call.unused)
        if "position_embeddings" in kwargs:
            kwargs["position_embeddings"] = extend_rotary(kwargs["position_embeddings"], length, count, at)
        for name in _BIASES:
            if kwargs.get(name) is not None:
                kwargs[name] = extend_bias(kwargs[name], length, count, at)
        if "position_ids" in kwargs:
            kwargs["position_ids"] = None  # attention reads them only to find packed sequences
        for module in self._biases:
            module.slots_at = at
        self._enter_cache(call, _own(kwargs.get("past_key_values")), count, length)
        return kwargs

    def _enter_cache(self, call: Call, cache: Any, count: int, length: int) -> None:
        """Record what this block leaves in the cache."""
        if cache is None:
            return
        if call.cache is None:
            call.cache = _CACHES[cache] = CacheSlots()
        call.cache.count[self.depth] = count
        if call.unused is not None:
            call.cache.unused[self.depth] = call.unused
        window = getattr(self.settings, "sliding_window", None)
        if count and window and cache.is_sliding[self.depth] and length + count >= window:
            raise ConfigError(
                f"{length} tokens and {count} prompts do not fit into the sliding window of {window} that the cache "
                "keeps: the prompts would leave it; pass use_cache=False."
            )

    def _decode(self, call: Call, tokens: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The block's arguments beside the hidden states, for a step on a cache that holds the slots."""
        cache = _own(kwargs.get("past_key_values"))
        if call.cache is None:
            raise ConfigError("The KV cache was not filled with these prompts; let generate() make a cache of its own.")
        if cache is not None:
            keys = cache.get_mask_sizes(tokens.shape[1], self.depth)[0]
            unused = call.cache.unused.get(self.depth)
            kwargs["attention_mask"] = align_keys(kwargs.get("attention_mask"), keys, tokens, unused)
        return kwargs


def _extend_own_bias(module: nn.Module, args: Any, kwargs: dict[str, Any], bias: Tensor) -> Tensor:
    """Hook of a bias that a block makes for itself, for its tokens (BEiT): the rest of `dim_size` are slots."""
    tokens = bias.shape[-1]
    count = kwargs.get("dim_size", tokens) - tokens
    return extend_bias(bias, tokens, count, module.slots_at) if count > 0 else bias
