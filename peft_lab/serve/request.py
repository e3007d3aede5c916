"""One request of many adapters: which row of the batch uses which row of which bank, and the modules that read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_lab.errors import ConfigError, did_you_mean
from peft_lab.serve.parameter_banks import Bank, Field, Layout, Span
from peft_lab.tuners.mixed_batch import BASE, RowLayer
from peft_lab.tuners.operations import StandIn

#: Owner of the banks that hold `modules_to_save`.
HEADS = "modules_to_save"
#: Entries of one head's weight above which rows are not given copies of it, but taken adapter by adapter.
_LARGE_HEAD = 2**20


@dataclass(frozen=True)
class Part:
    """What one method has at one module: its arithmetic, and the banks that hold parameters for this module."""

    layer: RowLayer | HeadRows
    layouts: tuple[Layout, ...]


@dataclass(frozen=True)
class Snapshot:
    """All adapters at one moment. A request keeps the one it began with.

    Attributes:
        places: adapter name -> the layouts of its banks.
        banks: the banks themselves.
        modules: module path -> its parts: deltas of the weight first, then transforms of the output, then the head.
    """

    places: Mapping[str, tuple[Layout, ...]] = field(default_factory=dict)
    banks: Mapping[Layout, Bank] = field(default_factory=dict)
    modules: Mapping[str, tuple[Part, ...]] = field(default_factory=dict)


class Request:
    """One adapter name per row of a batch, looked up once for all layers.

    Raises:
        ConfigError: there is no adapter of a name.
    """

    def __init__(self, snapshot: Snapshot, names: Sequence[str], exact: bool = True) -> None:
        if isinstance(names, str) or not len(names):
            raise ConfigError(f"adapter_names={names!r} must be a list with one adapter name per row of the batch.")
        self.snapshot, self.count, self.exact = snapshot, len(names), exact
        self._picks: dict[Layout, tuple[list[int], list[int]]] = {}
        for row, name in enumerate(names):
            if name == BASE:
                continue
            if name not in snapshot.places:
                hint = did_you_mean(name, snapshot.places)
                raise ConfigError(f'Row {row} asks for adapter "{name}", which is not loaded.{hint}')
            for layout in snapshot.places[name]:
                rows, slots = self._picks.setdefault(layout, ([], []))
                rows.append(row)
                slots.append(snapshot.banks[layout].slots[name])
        self._indices: dict[tuple[Layout, int], tuple[Tensor | None, Tensor]] = {}

    def check(self, given: int) -> None:
        """Raise `ConfigError` where the batch has not one row per name."""
        if given != self.count and self.exact:
            raise ConfigError(
                f"adapter_names has {self.count} names, but the batch has {given} rows; pass one name per row "
                "(and call generate of the tenants, which repeats them for beams)."
            )

    def output(self, path: str, base: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output of a module for this batch."""
        parts = [(part, [layout for layout in part.layouts if layout in self._picks]) for part in self._parts(path)]
        parts = [(part, layouts) for part, layouts in parts if layouts]
        if not parts:
            return base(x, *args, **kwargs)
        if x.shape[0] == 1 and self.count > 1:
            x = x.expand(self.count, *x.shape[1:])  # one input for all rows, such as positions
        if x.shape[0] % self.count:
            raise ConfigError(
                f'adapter_names has {self.count} names, but module "{path}" received {x.shape[0]} rows; '
                "pass one name per row of the batch."
            )
        # A layer may see several rows per row of the batch (windows, beams); they lie next to each other.
        repeat = x.shape[0] // self.count
        out: Tensor | None = None
        for part, layouts in parts:
            if isinstance(part.layer, HeadRows):
                groups = [(*self._index(layout, repeat), self._bank(layout, path)) for layout in layouts]
                out = part.layer.rows_output(x, groups, out)
            else:
                values = self._values(path, layouts, part.layer.row_fields, repeat, x.device)
                out = part.layer.rows_output(x, values, out, *args, **kwargs)
        assert out is not None
        return out

    def _parts(self, path: str) -> tuple[Part, ...]:
        return self.snapshot.modules.get(path, ())

    def _bank(self, layout: Layout, path: str) -> tuple[Tensor, Span]:
        span = layout.spans[path]
        return self.snapshot.banks[layout].rows[:, span.start : span.start + span.width], span

    def _index(self, layout: Layout, repeat: int) -> tuple[Tensor | None, Tensor]:
        """Rows of the layer's input that use this bank (None: all of them), and the row of the bank for each."""
        key = (layout, repeat)
        if key not in self._indices:
            rows, slots = (
                torch.tensor(numbers, device=self.snapshot.banks[layout].rows.device) for numbers in self._picks[layout]
            )
            if repeat > 1:
                within = torch.arange(repeat, device=rows.device)
                rows, slots = (rows[:, None] * repeat + within).flatten(), slots.repeat_interleave(repeat)
            whole = len(self._picks[layout][0]) == self.count
            self._indices[key] = (None if whole else rows, slots)
        return self._indices[key]

    def _values(
        self, path: str, layouts: Sequence[Layout], neutral: Mapping[str, float], repeat: int, device: torch.device
    ) -> dict[str, Tensor]:
        """Each field of a module with one entry per row, (rows, *shape), neutral on rows of other adapters."""
        found: list[tuple[Tensor | None, Field, Tensor]] = []
        for layout in layouts:
            rows, slots = self._index(layout, repeat)
            part, span = self._bank(layout, path)
            # An embedding look-up is the fastest gather of rows on CPUs, by 5 to 20 times on wide banks.
            gathered = F.embedding(slots, part).to(device, torch.promote_types(part.dtype, torch.float32))
            found += [(rows, piece, piece.of(gathered)) for piece in span.fields]
        if all(rows is None for rows, _, _ in found):
            return {piece.name: value for _, piece, value in found}
        full: dict[str, Tensor] = {}
        for name in dict.fromkeys(piece.name for _, piece, _ in found):
            same = [(rows, piece.shape, value) for rows, piece, value in found if piece.name == name]
            largest = [max(sides) for sides in zip(*(shape for _, shape, _ in same), strict=True)]
            size = self.count * repeat
            full[name] = same[0][2].new_full((size, *largest), neutral[name])
            for rows, shape, value in same:
                assert rows is not None
                inside: Any = (rows.to(device), *(slice(side) for side in shape))
                full[name][inside] = value
        return full


class ServedModule(StandIn):
    """A module of the base whose output depends on the request that the calling thread is in; without one, the base."""

    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module, path: str, request: ContextVar[Request | None]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.path, self._request = path, request

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        request = self._request.get()
        if request is None:
            return self.base_layer(x, *args, **kwargs)
        return request.output(self.path, self.base_layer, x, *args, **kwargs)


class HeadRows:
    """A Linear or LayerNorm within a head that each adapter has of its own, applied by row.

    Heads may have different numbers of outputs; the columns that a row's head lacks are -inf, so that neither argmax
    nor softmax sees them.

    Raises:
        ConfigError: the module is of another kind.
    """

    def __init__(self, base_layer: nn.Module, path: str) -> None:
        if type(base_layer) not in (nn.Linear, nn.LayerNorm):
            raise ConfigError(
                f'"{path}" is trained in full and is a {type(base_layer).__name__}; only Linear and LayerNorm can '
                "differ by row. Load this adapter with PeftModel instead."
            )
        self.base_layer: Any = base_layer

    def rows_output(
        self, x: Tensor, groups: Sequence[tuple[Tensor | None, Tensor, tuple[Tensor, Span]]], out: Tensor | None
    ) -> Tensor:
        """`out` with the rows of each group of equal heads replaced by what their heads give."""
        if groups[0][0] is None:
            return self._of_group(x, *groups[0][1:])
        found = [(rows, self._of_group(x[rows], slots, bank)) for rows, slots, bank in groups]
        covered = sum(rows.numel() for rows, _ in found if rows is not None)
        if out is None and covered < x.shape[0]:
            out = self.base_layer(x)
        outputs = max([part.shape[-1] for _, part in found] + ([] if out is None else [out.shape[-1]]))
        full = found[0][1].new_full((*x.shape[:-1], outputs), -torch.inf)
        if out is not None:
            full[..., : out.shape[-1]] = out
        for rows, part in found:
            full[rows] = F.pad(part, (0, outputs - part.shape[-1]), value=-torch.inf)
        return full

    def _of_group(self, x: Tensor, slots: Tensor, bank: tuple[Tensor, Span]) -> Tensor:
        part, span = bank
        sizes = {piece.name: piece for piece in span.fields}
        if isinstance(self.base_layer, nn.Linear) and span.width > _LARGE_HEAD:
            out = x.new_empty(*x.shape[:-1], sizes["weight"].shape[0])
            for slot in slots.unique():
                own = slots == slot
                values = {name: piece.of(part[slot][None])[0].to(x.dtype) for name, piece in sizes.items()}
                out[own] = F.linear(x[own], values["weight"], values.get("bias"))
            return out
        gathered = F.embedding(slots, part).to(x.dtype)
        values = {name: piece.of(gathered) for name, piece in sizes.items()}
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        if isinstance(self.base_layer, nn.Linear):
            out = tokens @ values["weight"].transpose(1, 2)
        else:
            base = self.base_layer
            out = F.layer_norm(tokens, base.normalized_shape, None, None, base.eps) * values["weight"][:, None]
        if "bias" in values:
            out = out + values["bias"][:, None]
        return out.reshape(*x.shape[:-1], out.shape[-1])
