"""Prompt tokens in the sequence of a frozen backbone.

Each wrapped block inserts the prompts, runs, and takes them out again. Between the blocks only the text or image tokens
travel; what a block made of the prompts is kept in the `PromptState` and goes into the next block, unless that one
writes prompts of its own. So the pooler, the final norm, the head and every reader of hidden states see the tokens
alone. The prompts have no position: learned position tables do not see them, and under rotary positions they stand at
that of their row's first token, so text keeps the positions it has without them, and padding changes nothing
(`text_positions`, `relative_bias`). Masks, rotary positions and biases, which the stack makes for the tokens alone, are
extended on the way into each block (`attention_inputs`).

With a KV cache the prompts are written at prefill and stay in the cache; later tokens, one or several, only count them.
Blocks that attend within windows are treated in `window_attention`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from peft_lab.errors import ConfigError
from peft_lab.tuners.layer import AdapterLayer
from peft_lab.tuners.mixed_batch import BASE, RowAdapters, current_row_adapters
from peft_lab.tuners.sequence import key_values, relative_bias, window_attention
from peft_lab.tuners.sequence.attention_inputs import (
    align_bias,
    align_keys,
    extend_bias,
    extend_mask,
    extend_queries,
    extend_rotary,
)
from peft_lab.tuners.sequence.instruction import instruction_tokens
from peft_lab.tuners.sequence.prompt_state import (
    CACHED_PROMPTS,
    HEAD_LOGITS,
    READOUT,
    CachedPrompts,
    PromptState,
    given_cache,
)
from peft_lab.tuners.sequence.stack import StackInfo
from peft_lab.tuners.sequence.supported_models import explained
from peft_lab.tuners.sequence.text_positions import at_first_token, first_tokens
from peft_lab.tuners.tokens import insert, parameter_names, split

#: Arguments of a decoder's block for its attention to the encoder's text.
_OF_OTHER_TEXT = {"encoder_attention_mask", "encoder_decoder_position_bias"}


class SequenceLayer(AdapterLayer):
    """Block of a stack that takes prompt tokens.

    A method supplies `initial_values` and `prompts`.

    Attributes:
        depth: index of the block in its stack.
        stack: facts of the stack.
        downsample: module that merges patches right before this block, and its name in that module; None if none does.
    """

    depth: int
    stack: StackInfo
    downsample: tuple[nn.Module, str] | None
    #: True if the method also has a meaning where a block attends within windows, each of which holds the prompts.
    in_windows: ClassVar[bool] = True
    general_forms: ClassVar[Mapping[str, str]] = {"mixed": "prompts"}

    @property
    def num_blocks(self) -> int:
        """Number of blocks of the stack."""
        return len(self.stack.widths)

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        return self.stack.widths[self.depth]

    def read_base(self, name: str) -> None:
        base = self.base_layer
        self._names = parameter_names(type(base).forward)
        self._windowed = window_attention.has_windows(base)
        if self._windowed and not (self.in_windows and window_attention.can_hook(base)):
            raise ConfigError(
                f'Method "{self.info.name}" cannot put prompts into the windows of {type(base).__name__} ("{name}").'
            )
        self._biases = [m for m in base.modules() if type(m).__name__.endswith("RelativePositionBias")]
        self._row_biases = relative_bias.wrap_biases(base)
        if self._windowed:
            window_attention.hook(base)
            return
        for module in self._biases:
            module.register_forward_hook(_extend_own_bias, with_kwargs=True)

    def instruction(self, tokens: Tensor, state: PromptState) -> Tensor | None:
        """Mask of the instruction tokens, bool (batch, tokens); None for all.

        A prompt may depend on these tokens alone. See `peft_lab.tuners.sequence.instruction`.

        Raises:
            ConfigError: a row has no such token, or `instruction_mask` is not of the batch's shape.
        """
        return instruction_tokens(self, self.stack.causal, tokens, state)

    # What a method supplies -------------------------------------------------------------------------------------

    def prompts(self, adapter: str, tokens: Tensor, state: PromptState) -> Tensor | None:
        """Prompts (batch, prompts, dim) written before this block.

        `tokens` are the hidden states (batch, tokens, dim). None leaves the prompts as the block before made them.
        """
        raise NotImplementedError

    def position(self, adapter: str) -> int:
        """Number of tokens before the prompts."""
        return 0

    def logits(self, adapter: str, prompts: Tensor) -> Tensor:
        """Class logits (batch, classes) from the last block's prompts.

        `prompts` are the hidden states (batch, prompts, dim) at the prompts. For a method that sets `produces_logits`;
        the model's own loss gets them in place of the head's.
        """
        raise NotImplementedError

    def key_values(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Trained keys and values (prompts, width of keys) of this block.

        For a config with `key_value_tokens`; they stand where attention would make its own of the prompts.
        """
        raise NotImplementedError

    def prepare_block(self, active: Sequence[str], rows: RowAdapters | None, state: PromptState, at: int) -> None:
        """Prepare the method's hooks inside the block; prompts stand at `at`."""

    # What is the same for all -----------------------------------------------------------------------------------

    @property
    def in_use(self) -> bool:
        """True if an adapter puts prompts before this block in this call."""
        active, rows = self._adapters(None)
        return bool(active) or rows is not None

    def _all_available_adapter_names(self) -> list[str]:
        # peft's own goes by parameters, which a block that only hands prompts on does not have
        return sorted(self.configs)

    def forward(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
        """Run the block with prompts and return the tokens' output."""
        active, rows = self._adapters(adapter_names)
        state = PromptState.current()
        if state is not None and state.cache is not None and not state.prefill:
            state.cache.check_adapters(_in_batch(active, rows))
        if not active and rows is None:
            return self.base_layer(*args, **kwargs)
        if state is None:
            raise ConfigError("A block with prompts was called without its backbone; call the whole model.")
        if state.refused:
            raise ConfigError(state.refused)
        positional = self._names[: len(args)]
        kwargs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        tokens = kwargs.pop("hidden_states" if "hidden_states" in kwargs else self._names[0])
        state.depth += 1
        state.batch = tokens.shape[0]
        # A decoding step finds the prompts in the cache and writes none.
        if not state.prefill:
            return self._run(tokens, positional, self._decode(state, tokens, kwargs))
        self._write(active, rows, tokens, state)
        # No block so far has written prompts: the block runs as it is, and the cache records that.
        if state.states is None:
            self._enter_cache(state, given_cache(kwargs), 0)
            return self._run(tokens, positional, kwargs)
        at = self._position(active if rows is None else rows.names)
        out = self._run_with_prompts(active, rows, tokens, positional, kwargs, state, at)
        hidden = out[0] if isinstance(out, tuple | list) else out
        kept, state.states = split(hidden, state.states.shape[1], at)
        if self.depth == self.num_blocks - 1:
            self._leave_stack(active, rows, state)
        key_values.drop(self, active, rows, state)
        return type(out)((kept, *out[1:])) if isinstance(out, tuple | list) else kept

    def _adapters(self, adapter_names: Any) -> tuple[list[str], RowAdapters | None]:
        """Active adapters of this block, and those by row if mixed."""
        if self.disable_adapters:
            return [], None
        rows = current_row_adapters() if adapter_names is None else RowAdapters.of(adapter_names)
        return [name for name in self.active_adapters if name in self.configs], rows

    def _adds_keys(self) -> bool:
        """Test whether an adapter of this call has trained keys and values."""
        active, rows = self._adapters(None)
        return any(
            self.configs[name].key_value_tokens for name in (rows.names if rows else active) if name in self.configs
        )

    def text_shift(self, batch: int, device: torch.device) -> int | Tensor:
        """Number of positions before the text in this call, for all rows or int64 (batch, 1)."""
        active, rows = self._adapters(None)
        names = active if rows is None else rows.names
        shifts = [self.configs[name].key_value_tokens if name in self.configs else 0 for name in names]
        if rows is None or not any(shifts):
            return max(shifts, default=0)
        return torch.tensor(shifts, device=device)[rows.index(batch, device)][:, None]

    def _run(self, hidden: Tensor, positional: Sequence[str], kwargs: dict[str, Any]) -> Any:
        """Run the block itself.

        Arguments given by position are passed on by position, because checkpointing cuts the graph at them alone.
        """
        by_name = {name: value for name, value in kwargs.items() if name not in positional}
        with explained(self.stack.settings.model_type):
            return self.base_layer(hidden, *(kwargs[name] for name in positional[1:]), **by_name)

    def _run_with_prompts(
        self,
        active: Sequence[str],
        rows: RowAdapters | None,
        tokens: Tensor,
        positional: Sequence[str],
        kwargs: dict[str, Any],
        state: PromptState,
        at: int,
    ) -> Any:
        """Run the block with the prompts of `state` at position `at`."""
        assert state.states is not None
        if self._windowed:
            prompts = window_attention.Prompts(state.states.shape[1], at, state.unused)
            block = partial(self._run, positional=positional, kwargs=kwargs)
            return window_attention.run(self.base_layer, prompts, block, insert(tokens, state.states, at))
        kwargs = self._prefill(state, tokens, kwargs, at)
        key_values.place(self, active, rows, state, at)
        self.prepare_block(active, rows, state, at)
        return self._run(insert(tokens, state.states, at), positional, kwargs)

    def normed(self, role: str, hidden: Tensor) -> Tensor:
        """Apply a norm of the stack; identity if there is none."""
        norms = self.stack.norms
        return getattr(*norms[role])(hidden) if role in norms else hidden

    # Writing ----------------------------------------------------------------------------------------------------

    def _write(self, active: list[str], rows: RowAdapters | None, tokens: Tensor, state: PromptState) -> None:
        """Write the prompts of this block into the state."""
        # Patches were merged between the stages, so prompts of the stage before have another width.
        if self.downsample is not None and state.states is not None:
            state.states = window_attention.merge(getattr(*self.downsample), state.states)
        if rows is not None:
            self._write_rows(rows, tokens, state)
            return
        if len(active) > 1:
            raise ConfigError(
                f'Method "{self.info.name}" has one adapter active at a time, not {", ".join(active)}: '
                "its prompts take each other's place; call set_adapter with one name."
            )
        new = self.prompts(active[0], tokens, state)
        if new is not None:
            state.states = new.to(tokens.dtype)

    def _write_rows(self, rows: RowAdapters, tokens: Tensor, state: PromptState) -> None:
        """Write each row's own prompts. This general form runs once per adapter."""
        written: dict[str, Tensor] = {}
        indices: dict[str, Tensor] = {}
        batch, dim = tokens.shape[0], tokens.shape[-1]
        for name in rows.names:
            if name != BASE and name in self.configs:
                index = rows.of_adapter(name, batch, tokens.device)
                new = self.prompts(name, tokens[index], state.for_rows(index))
                if new is not None:
                    written[name], indices[name] = new.to(tokens.dtype), index
        if not written:
            return
        # Adapters differ in their number of prompts: all rows get the largest one, padded at the left.
        count = max(new.shape[1] for new in written.values())
        states = tokens.new_zeros(batch, count, dim)
        counts = torch.zeros(batch, dtype=torch.long, device=tokens.device)
        writes = torch.zeros(batch, dtype=torch.bool, device=tokens.device)
        for name, new in written.items():
            padded = pad(new, (0, 0, count - new.shape[1], 0))
            states = states.index_copy(0, indices[name], padded)
            counts[indices[name]], writes[indices[name]] = new.shape[1], True
        state.merge_rows(states, counts, writes)

    def _position(self, names: Sequence[str]) -> int:
        """Position of the prompts, common to all adapters of a batch."""
        found = {self.position(name) for name in names if name in self.configs}
        if len(found) > 1:
            raise ConfigError(f"Adapters {', '.join(names)} put their prompts at different places: not in one batch.")
        return found.pop()

    # Leaving the stack ------------------------------------------------------------------------------------------

    def _leave_stack(self, active: list[str], rows: RowAdapters | None, state: PromptState) -> None:
        """Share the last block's prompts, or their logits, with the head."""
        assert state.states is not None
        readout = self._readout(active, rows, state)
        if readout is not None:
            state.context.shared[READOUT] = readout
        if self.config_cls.produces_logits:
            state.context.shared[HEAD_LOGITS] = self._head_logits(active, rows, state.states, state.unused)

    def _head_logits(
        self, active: list[str], rows: RowAdapters | None, prompts: Tensor, unused: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Class logits (batch, classes) from the prompts, and their rows.

        Rows are bool (batch,); None for all.
        """
        if rows is None:
            return self.logits(active[0], prompts), None
        # Rows without an adapter keep the logits of the head.
        out = prompts.new_zeros(prompts.shape[0], self.stack.classes, dtype=torch.float32)
        scored = torch.zeros(prompts.shape[0], dtype=torch.bool, device=prompts.device)
        for name in rows.names:
            if name != BASE and name in self.configs:
                index = rows.of_adapter(name, len(prompts), prompts.device)
                # The rows of one adapter have the same prompts, at the right of those that they do not have.
                first = 0 if unused is None else int(unused[index[0]].sum())
                out = out.index_copy(0, index, self.logits(name, prompts[index, first:]).to(out.dtype))
                scored[index] = True
        return out, scored

    def _readout(self, active: list[str], rows: RowAdapters | None, state: PromptState) -> tuple[Tensor, Tensor] | None:
        """Prompts for the head's readout, and a mask of used ones.

        Used ones are bool (batch, prompts); None if no adapter reads prompts.
        """
        names = active if rows is None else rows.names
        own = [name for name in names if name in self.configs]
        reading = [name for name in own if self.configs[name].reads_out()]
        if not reading or state.states is None:
            return None
        used = state.states.new_ones(state.states.shape[:2], dtype=torch.bool)
        # In a mixed batch the rows of other adapters keep the class token alone.
        if rows is not None:
            used = torch.zeros_like(used)
            for name in reading:
                used[rows.of_adapter(name, len(used), used.device)] = True
        return state.states, used if state.unused is None else used & ~state.unused

    # The block's arguments --------------------------------------------------------------------------------------

    def _prefill(self, state: PromptState, tokens: Tensor, kwargs: dict[str, Any], at: int) -> dict[str, Any]:
        """Arguments of the block beside the hidden states, for tokens with prompts."""
        assert state.states is not None
        count, length = state.states.shape[1], tokens.shape[1]
        state.length, state.position = length, at
        if not self.stack.attends[self.depth] and state.mask is not None and not bool(state.mask[:, 0].all()):
            raise ConfigError(
                f"{type(self.base_layer).__name__} has no attention, and would carry prompts on through padding at the "
                "left: give texts of equal length, or one at a time."
            )
        if "attention_mask" in kwargs or state.unused is not None:
            mask = kwargs.get("attention_mask")
            # The text tower of CLIP says only in the call that it is causal.
            causal = self.stack.causal or bool(kwargs.get("is_causal"))
            kwargs["attention_mask"] = extend_mask(mask, tokens, count, at, causal, state.unused, state.first)
        if "position_embeddings" in kwargs:
            # Trained keys are not rotated, wherever the text begins.
            first = None if self._adds_keys() else state.first
            # Families whose blocks made them once get them as sines and cosines since transformers 5.24.
            kwargs["position_embeddings"] = extend_rotary(
                kwargs["position_embeddings"], length, count, at, first, sines_first=self.stack.rotary_in_block
            )
        for name in self.stack.position_biases:
            if kwargs.get(name) is not None:
                kwargs[name] = extend_bias(kwargs[name], length, count, at)
        for name in _OF_OTHER_TEXT & kwargs.keys():
            kwargs[name] = extend_queries(kwargs[name], length, count, at)
        if kwargs.get("position_ids") is not None:
            ids = kwargs["position_ids"]
            # Blocks that make no rotary positions read the ids only to find packed sequences.
            if self.stack.rotary_in_block:
                start = at_first_token(ids, state.first, 1)
                ids = insert(ids.expand(start.shape[0], -1), start.expand(-1, count), at)
            kwargs["position_ids"] = ids if self.stack.rotary_in_block else None
        # A bias that the block makes for itself is extended by `_extend_own_bias`, which reads the position here.
        for module in self._biases:
            module.prompts_at = at
        relative_bias.share(state.context, self._row_biases, state.first, at + count)
        self._enter_cache(state, given_cache(kwargs), count)
        return kwargs

    def _enter_cache(self, state: PromptState, cache: Any, count: int) -> None:
        """Record the number of prompts that this block leaves in the cache."""
        if cache is None:
            return
        if state.cache is None:
            state.cache = CachedPrompts(_in_batch(*self._adapters(None)), state.counted)
            setattr(cache, CACHED_PROMPTS, state.cache)
        state.cache.count[self.depth] = count
        if state.unused is not None:
            state.cache.unused[self.depth] = state.unused

    def _decode(self, state: PromptState, tokens: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the block beside the hidden states, for a decoding step."""
        cache = given_cache(kwargs)
        if state.cache is None:
            raise ConfigError("The KV cache was not filled with these prompts; let generate() make a cache of its own.")
        if cache is not None:
            self._check_window(state.cache, cache, tokens.shape[1])
            keys = cache.get_mask_sizes(tokens.shape[1], self.depth)[0]
            unused = state.cache.unused.get(self.depth)
            first, count = first_tokens(state.mask), state.cache.count.get(self.depth, 0)
            relative_bias.share(state.context, self._row_biases, first, count)
            kwargs["attention_mask"] = align_keys(kwargs.get("attention_mask"), keys, tokens, unused)
            for name in self.stack.position_biases:
                if name in kwargs:
                    kwargs[name] = align_bias(kwargs[name], keys)
        return kwargs

    def _check_window(self, prompts: CachedPrompts, cache: Any, new: int) -> None:
        """Refuse a step whose sliding window does not hold all earlier entries.

        The prompts, which come first, would leave the window.
        """
        window, count = getattr(self.stack.settings, "sliding_window", None), prompts.count.get(self.depth, 0)
        if count and window and cache.is_sliding[self.depth] and cache.get_seq_length(self.depth) + new > window:
            raise ConfigError(
                f"{cache.get_seq_length(self.depth) + new - count} tokens and {count} prompts do not fit into the "
                f"sliding window of {window} that the cache keeps: the prompts would leave it; pass use_cache=False."
            )


def _in_batch(active: Sequence[str], rows: RowAdapters | None) -> tuple[str, ...]:
    """Names of a batch's adapters: one for all rows, or one for each."""
    if rows is None:
        return tuple(active)
    return rows.per_row if len(rows.names) > 1 else rows.names


def _extend_own_bias(module: nn.Module, args: Any, kwargs: dict[str, Any], bias: Tensor) -> Tensor:
    """Hook that extends a bias which the block makes for itself (BEiT).

    The bias is for the tokens; the rest of `dim_size` are prompts.
    """
    tokens = bias.shape[-1]
    count, at = kwargs.get("dim_size", tokens) - tokens, cast(int, module.prompts_at)
    return cast(Tensor, extend_bias(bias, tokens, count, at)) if count > 0 else bias
