"""A branch on the residual stream between attention and MLP of a block: x + MLP(norm(x)) + branch(x).

That point lies inside the block's own forward, so hooks on its parts read and write it. What the branch needs travels
with the block's arguments, which go on to its attention and are kept where gradient checkpointing runs a block again:
nothing of a call is left on a module once the block is done.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_lab.errors import ConfigError
from peft_lab.tuners.forward_context import Call
from peft_lab.tuners.mixed_batch import BASE, Rows
from peft_lab.tuners.sequence.stored_prompts import StaticPrompts

#: The norm before the MLP, and what makes the summand of the residual connection behind it, as blocks name them: the
#: branch is no more scaled or dropped with the MLP than in the equation.
_NORMS = ("layernorm_after", "layer_norm2", "norm2")
_SUMMANDS = ("drop_path", "layer_scale2", "mlp")
_ARGUMENT = "peft_lab_branch"


@dataclass(frozen=True)
class Part:
    """What the branch of one adapter needs in one block.

    Attributes:
        adapter: its name.
        weights: tensors that the method gave for this block.
        rows: indices of the batch that it is for; None for all.
        at: number of tokens before the slots.
        unused, count: slots that these rows do not have, which come first, and those they have.
    """

    adapter: str
    weights: tuple[Tensor, ...]
    rows: Tensor | None
    at: int
    unused: int
    count: int


class BranchLayer(StaticPrompts):
    """A block with prompts and a branch. A method supplies `initial_values`, `branch_weights` and `branch`."""

    in_windows = False  # the branch is as wide as the first block of its group

    def branch_weights(self, adapter: str, call: Call) -> tuple[Tensor, ...] | None:
        """The tensors of this block's branch; None if there is none here."""
        raise NotImplementedError

    def branch(self, x: Tensor, part: Part) -> Tensor:
        """What is added to the stream x (rows, sequence, width), slots at `part.at` and none that are unused."""
        raise NotImplementedError

    def read_base(self, name: str) -> None:
        super().read_base(name)
        base = self.base_layer
        attention = [m for m in base.children() if hasattr(m, "q_proj")]
        norm, summand = (next((p for p in names if hasattr(base, p)), None) for names in (_NORMS, _SUMMANDS))
        if len(attention) != 1 or norm is None or summand is None:
            raise ConfigError(
                f'Method "{self.info.name}" has no place for its branch between attention and MLP of '
                f'{type(base).__name__} ("{name}").'
            )
        self._parts: list[Part] | None = None
        self._stream: Tensor | None = None
        attention[0].register_forward_pre_hook(self._enter, with_kwargs=True)
        getattr(base, norm).register_forward_pre_hook(self._read)
        getattr(base, summand).register_forward_hook(self._add)

    def arguments(self, active: list[str], rows: Rows | None, call: Call, at: int) -> dict[str, Any]:
        assert call.states is not None
        names, size = active if rows is None else rows.names, call.states.shape[1]
        parts = []
        for name in names:
            weights = None if name == BASE or name not in self.configs else self.branch_weights(name, call)
            if weights is not None:
                index = None if rows is None else rows.of_adapter(name, len(call.states), call.states.device)
                unused = 0 if call.unused is None or index is None else int(call.unused[index[0]].sum())
                parts.append(Part(name, weights, index, at, unused, size - unused))
        return {_ARGUMENT: parts} if parts else {}

    def _enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self._parts, self._stream = kwargs.pop(_ARGUMENT, None), None
        return args, kwargs

    def _read(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._stream = args[0] if self._parts else None

    def _add(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        parts, x = self._parts, self._stream
        if not parts or x is None:  # also where the same module makes the summand behind attention
            return out
        self._parts = self._stream = None
        for part in parts:
            if part.rows is None:
                return out + self._branched(x, part).to(out.dtype)
            out = out.index_add(0, part.rows, self._branched(x[part.rows], part).to(out.dtype))
        return out

    def _branched(self, x: Tensor, part: Part) -> Tensor:
        """The branch of rows, zero at slots that they do not have."""
        if not part.unused:
            return self.branch(x, part)
        kept, end = x.new_ones(x.shape[1], dtype=torch.bool), part.at + part.unused
        kept[part.at : end] = False
        added = self.branch(x[:, kept], part)
        return added.new_zeros(x.shape).index_copy(1, kept.nonzero().flatten(), added)
