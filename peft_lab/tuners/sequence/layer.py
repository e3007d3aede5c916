"""Prompts in the sequence of a frozen backbone: each wrapped block puts slots in, runs, and takes them out again.

Between the blocks only tokens travel; what a block made of the slots is kept in the `Call` and goes into the next
block, unless that one writes prompts of its own. So the pooler, the final norm, the head and whoever reads hidden
states see the tokens alone. The slots have no position: learned position tables do not see them, and under rotary
positions they stand at position 0, so text keeps the positions it has without them. Masks, rotary positions and biases,
which the stack makes for the tokens alone, are extended on the way into each block (`attention_inputs`).

With a KV cache the slots are filled at prefill and stay in the cache; a step of decoding only counts them. Blocks that
attend within windows are the matter of `peft_lab.tuners.sequence.window_attention`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from peft_lab.errors import ConfigError
from peft_lab.tuners.forward_context import CACHE_SLOTS, CALL, CacheSlots, Call, own_cache
from peft_lab.tuners.layer import AdapterLayer
from peft_lab.tuners.mixed_batch import BASE, Rows
from peft_lab.tuners.sequence import window_attention
from peft_lab.tuners.sequence.attention_inputs import align_keys, extend_bias, extend_mask, extend_rotary
from peft_lab.tuners.sequence.supported_models import explained
from peft_lab.tuners.tokens import insert, parameter_names, split

_NO_INSTRUCTION = (
    'Method "{}" trains without labels or instruction_mask in the call, so its prompts see the answers too; label '
    "smoothing and a loss function of one's own take the labels out of it: then pass instruction_mask."
)
#: Arguments of blocks that hold a bias for each pair of positions.
_BIASES = ("position_bias", "relative_pos")
#: Families whose blocks make rotary positions for themselves.
_OWN_ROTARY = ("gptj", "codegen")


class SequenceLayer(AdapterLayer):
    """A block of a stack with room for prompts. A method supplies `initial_values` and `prompts`.

    Attributes:
        depth, depths: index of the block in its stack, and the number of blocks there.
        widths: width of the hidden states of each block of the stack.
        downsample: what merges patches right before this block, as a module and a name in it; None if nothing does.
        settings: config of the stack.
        norms: the norms before (`norm.stem`) and behind (`norm.final`) all blocks, as a module and a name in it: a norm
            may be wrapped later.
        classes: number of labels of the model.
        prefix_tokens: class and register tokens of a vision transformer, which stand before the patches; 0 for text.
        causal: whether no block of the stack lets a token see later ones.
        attends: whether this block has attention; a convolution or a recurrence has none.
    """

    depth: int
    depths: int
    widths: Sequence[int]
    downsample: tuple[nn.Module, str] | None
    settings: Any
    norms: dict[str, tuple[nn.Module, str]]
    classes: int
    prefix_tokens: int
    causal: bool
    attends: bool
    #: Whether the method also has a meaning where a block attends within windows, each of which holds the prompts.
    in_windows: ClassVar[bool] = True

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        return self.widths[self.depth]

    def read_base(self, name: str) -> None:
        base = self.base_layer
        self._names = parameter_names(type(base).forward)
        self._windowed = window_attention.has_windows(base)
        if self._windowed and not (self.in_windows and window_attention.can_hook(base)):
            raise ConfigError(
                f'Method "{self.info.name}" cannot put prompts into the windows of {type(base).__name__} ("{name}").'
            )
        self._biases = [m for m in base.modules() if type(m).__name__.endswith("RelativePositionBias")]
        if self._windowed:
            window_attention.hook(base)
            return
        for module in self._biases:
            module.register_forward_hook(_extend_own_bias, with_kwargs=True)

    def instruction(self, tokens: Tensor, call: Call) -> Tensor | None:
        """The tokens that a prompt may depend on, bool (batch, tokens); None for all.

        They are neither padding nor answer: as `instruction_mask` gives them, else, where a model continues a text,
        those before the first label of the row. What stands behind an answer, such as a further turn, has seen it.

        Raises:
            ConfigError: a row has no such token, or `instruction_mask` is not of the batch's shape.
        """
        given, labels = call.instruction, call.labels
        if given is not None and given.shape != tokens.shape[:2]:
            raise ConfigError(
                f"instruction_mask has shape {list(given.shape)}, expected {list(tokens.shape[:2])} as the tokens have."
            )
        continued = self.causal and call.continues
        if given is None and continued and labels is not None and labels.shape == tokens.shape[:2]:
            given = (labels != -100).cumsum(1) == 0
        if given is None:
            if continued and self.training:
                warnings.warn(_NO_INSTRUCTION.format(self.info.name), stacklevel=2)
            return call.mask
        chosen = given.bool() if call.mask is None else given.bool() & call.mask
        if not bool(chosen.any(1).all()):
            raise ConfigError(
                f'Method "{self.info.name}" makes its prompts from the instruction, and a row of the batch has none: '
                "labels must be -100 at its beginning, or pass instruction_mask."
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

    def logits(self, adapter: str, slots: Tensor) -> Tensor:
        """Class logits (batch, classes) from what the last block made of the slots (batch, slots, dim).

        For a method that declares `image_logits`; the model's own loss gets them in place of the head's.
        """
        raise NotImplementedError

    def arguments(self, active: list[str], rows: Rows | None, call: Call, at: int) -> dict[str, Any]:
        """Further arguments of the block, for hooks inside it that the method has put there; slots stand at `at`."""
        return {}

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
        call = CALL.get()
        if call is None:
            raise ConfigError("A block with prompts was called without its backbone; call the whole model.")
        if call.refused:
            raise ConfigError(call.refused)
        positional = self._names[: len(args)]
        kwargs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        tokens = kwargs.pop("hidden_states" if "hidden_states" in kwargs else self._names[0])
        call.depth += 1
        if not call.prefill:
            return self._run(tokens, positional, self._decode(call, tokens, kwargs))
        if self.downsample is not None and call.states is not None:
            call.states = window_attention.merge(getattr(*self.downsample), call.states)
        if rows is None:
            self._write(active, tokens, call)
        else:
            self._write_rows(rows, tokens, call)
        if call.states is None:
            self._enter_cache(call, _cache_of(kwargs), 0)
            return self._run(tokens, positional, kwargs)
        at = self._position(active if rows is None else rows.names)
        if self._windowed:
            slots = window_attention.Slots(call.states.shape[1], at, call.unused)
            block = partial(self._run, positional=positional, kwargs=kwargs)
            out = window_attention.run(self.base_layer, slots, block, insert(tokens, call.states, at))
        else:
            kwargs = self._prefill(call, tokens, kwargs, at) | self.arguments(active, rows, call, at)
            out = self._run(insert(tokens, call.states, at), positional, kwargs)
        hidden = out[0] if isinstance(out, tuple | list) else out
        kept, call.states = split(hidden, call.states.shape[1], at)
        if self.depth == self.depths - 1:
            call.readout = self._readout(active, rows, call)
            if self.info.can("image_logits"):
                call.logits = self._scored(active, rows, call.states)
        return type(out)((kept, *out[1:])) if isinstance(out, tuple | list) else kept

    def _run(self, hidden: Tensor, positional: Sequence[str], kwargs: dict[str, Any]) -> Any:
        """The block itself. What came by position goes on so: checkpointing cuts the graph at those arguments alone."""
        by_name = {name: value for name, value in kwargs.items() if name not in positional}
        with explained(self.settings.model_type):
            return self.base_layer(hidden, *(kwargs[name] for name in positional[1:]), **by_name)

    def normed(self, role: str, hidden: Tensor) -> Tensor:
        """Hidden states behind one of `norms`; as they are if the backbone has none there."""
        return getattr(*self.norms[role])(hidden) if role in self.norms else hidden

    def _scored(self, active: list[str], rows: Rows | None, slots: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """`Call.logits` from the slots of the last block."""
        if rows is None:
            return self.logits(active[0], slots), None
        out = slots.new_zeros(len(slots), self.classes, dtype=torch.float32)
        scored = torch.zeros(len(slots), dtype=torch.bool, device=slots.device)
        for name in rows.names:
            if name != BASE and name in self.configs:
                index = rows.of_adapter(name, len(slots), slots.device)
                out = out.index_copy(0, index, self.logits(name, slots[index]).to(out.dtype))
                scored[index] = True
        return out, scored

    def _readout(self, active: list[str], rows: Rows | None, call: Call) -> tuple[Tensor, Tensor] | None:
        """`Call.readout` from the slots of the last block."""
        names = [name for name in (active if rows is None else rows.names) if name in self.configs]
        reading = [name for name in names if self.configs[name].reads_out()]
        if not reading or call.states is None:
            return None
        used = call.states.new_ones(call.states.shape[:2], dtype=torch.bool)
        if rows is not None:
            used = torch.zeros_like(used)
            for name in reading:
                used[rows.of_adapter(name, len(used), used.device)] = True
        return call.states, used if call.unused is None else used & ~call.unused

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
        if not self.attends and call.mask is not None and not bool(call.mask[:, 0].all()):
            raise ConfigError(
                f"{type(self.base_layer).__name__} has no attention, and would carry prompts on through padding at the "
                "left: give texts of equal length, or one at a time."
            )
        if "attention_mask" in kwargs or call.unused is not None:
            mask = kwargs.get("attention_mask")
            kwargs["attention_mask"] = extend_mask(mask, tokens, count, at, self.causal, call.unused)
        if "position_embeddings" in kwargs:
            kwargs["position_embeddings"] = extend_rotary(kwargs["position_embeddings"], length, count, at)
        for name in _BIASES:
            if kwargs.get(name) is not None:
                kwargs[name] = extend_bias(kwargs[name], length, count, at)
        if kwargs.get("position_ids") is not None:
            ids = kwargs["position_ids"]
            own = self.settings.model_type in _OWN_ROTARY  # else attention reads them only to find packed sequences
            kwargs["position_ids"] = insert(ids, ids.new_zeros(len(ids), count), at) if own else None
        for module in self._biases:
            module.slots_at = at
        self._enter_cache(call, _cache_of(kwargs), count)
        return kwargs

    def _enter_cache(self, call: Call, cache: Any, count: int) -> None:
        """Record what this block leaves in the cache."""
        if cache is None:
            return
        if call.cache is None:
            call.cache = CacheSlots()
            setattr(cache, CACHE_SLOTS, call.cache)
        call.cache.count[self.depth] = count
        if call.unused is not None:
            call.cache.unused[self.depth] = call.unused

    def _decode(self, call: Call, tokens: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The block's arguments beside the hidden states, for a step on a cache that holds the slots."""
        cache = _cache_of(kwargs)
        if call.cache is None:
            raise ConfigError("The KV cache was not filled with these prompts; let generate() make a cache of its own.")
        if cache is not None:
            self._check_window(call.cache, cache, tokens.shape[1])
            keys = cache.get_mask_sizes(tokens.shape[1], self.depth)[0]
            unused = call.cache.unused.get(self.depth)
            kwargs["attention_mask"] = align_keys(kwargs.get("attention_mask"), keys, tokens, unused)
        return kwargs

    def _check_window(self, slots: CacheSlots, cache: Any, new: int) -> None:
        """Refuse a step for which a sliding window has no room for all that came before it, slots first."""
        window, count = getattr(self.settings, "sliding_window", None), slots.count.get(self.depth, 0)
        if count and window and cache.is_sliding[self.depth] and cache.get_seq_length(self.depth) + new > window:
            raise ConfigError(
                f"{cache.get_seq_length(self.depth) + new - count} tokens and {count} prompts do not fit into the "
                f"sliding window of {window} that the cache keeps: the prompts would leave it; pass use_cache=False."
            )


def _cache_of(kwargs: dict[str, Any]) -> Any:
    """The cache of self-attention that a block was given, by the name of its family."""
    return own_cache(kwargs.get("past_key_values", kwargs.get("layer_past")))


def _extend_own_bias(module: nn.Module, args: Any, kwargs: dict[str, Any], bias: Tensor) -> Tensor:
    """Hook of a bias that a block makes for itself, for its tokens (BEiT): the rest of `dim_size` are slots."""
    tokens = bias.shape[-1]
    count, at = kwargs.get("dim_size", tokens) - tokens, cast(int, module.slots_at)
    return cast(Tensor, extend_bias(bias, tokens, count, at)) if count > 0 else bias
