"""Request: the adapter of each row of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_lab.errors import ConfigError, did_you_mean
from peft_lab.serve.parameter_banks import ModuleSlice, ParameterBank, RowLayout
from peft_lab.tuners.mixed_batch import BASE, RowLayer
from peft_lab.tuners.operations import StandIn

#: Owner of the banks that hold `modules_to_save`.
HEADS = "modules_to_save"
#: Entries of one head's weight above which rows are not given copies of it, but taken adapter by adapter.
_LARGE_HEAD = 2**20


@dataclass(frozen=True)
class MethodAtModule:
    """One method at one module.

    Attributes:
        layer: its arithmetic there.
        layouts: the layouts of the banks that hold its parameters.
    """

    layer: RowLayer | PerRowHead
    layouts: tuple[RowLayout, ...]


@dataclass(frozen=True)
class Snapshot:
    """Snapshot of all adapters; a request keeps the one it began with.

    Attributes:
        layouts: adapter name -> the layouts of its banks.
        banks: layout -> bank.
        modules: module path -> the methods there: deltas of the weight first, then transforms of the output, then the
            head.
    """

    layouts: Mapping[str, tuple[RowLayout, ...]] = field(default_factory=dict)
    banks: Mapping[RowLayout, ParameterBank] = field(default_factory=dict)
    modules: Mapping[str, tuple[MethodAtModule, ...]] = field(default_factory=dict)


class Request:
    """Adapters of a batch, one per row, looked up once.

    Args:
        snapshot: the adapters at the start of the request.
        names: one adapter name per row, `BASE` for rows without one.
        exact: True if a batch must have one row per name; generation repeats the rows for beams.

    Raises:
        ConfigError: there is no adapter of a name.
    """

    def __init__(self, snapshot: Snapshot, names: Sequence[str], exact: bool = True) -> None:
        # a single text is a sequence too, and its letters would pass as names
        if isinstance(names, str) or not len(names):
            raise ConfigError(f"adapter_names={names!r} must be a list with one adapter name per row of the batch.")
        self.snapshot, self.count, self.exact = snapshot, len(names), exact
        # layout -> the rows of the batch that use its bank, and the row of the bank for each
        self._selected: dict[RowLayout, tuple[list[int], list[int]]] = {}
        for row, name in enumerate(names):
            if name == BASE:
                continue
            if name not in snapshot.layouts:
                hint = did_you_mean(name, snapshot.layouts)
                raise ConfigError(f'Row {row} asks for adapter "{name}", which is not loaded.{hint}')
            for layout in snapshot.layouts[name]:
                batch_rows, bank_rows = self._selected.setdefault(layout, ([], []))
                batch_rows.append(row)
                bank_rows.append(snapshot.banks[layout].row_of[name])
        self._indices: dict[tuple[RowLayout, int], tuple[Tensor | None, Tensor]] = {}

    def check(self, given: int) -> None:
        """Raise `ConfigError` if the batch has not one row per name."""
        if given != self.count and self.exact:
            raise ConfigError(
                f"adapter_names has {self.count} names, but the batch has {given} rows; pass one name per row "
                "(and call generate of the tenants, which repeats them for beams)."
            )

    def output(self, path: str, base: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Output of a module for this batch.

        Args:
            path: the module's path.
            base: the module of the base.
            x: its input, (rows, ...): one row for all, or the same number of rows for each row of the batch.
            args, kwargs: its further arguments.

        Raises:
            ConfigError: the rows of `x` do not fit the names.
        """
        methods = self._methods_at(path)
        if not methods:
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
        for layer, layouts in methods:
            if isinstance(layer, PerRowHead):
                groups = [(*self._row_indices(layout, repeat), self._bank(layout, path)) for layout in layouts]
                out = layer.rows_output(x, groups, out)
            else:
                values = self._gathered(path, layouts, layer.row_fields, repeat, x.device)
                out = layer.rows_output(x, values, out, *args, **kwargs)
        assert out is not None
        return out

    def _methods_at(self, path: str) -> list[tuple[RowLayer | PerRowHead, list[RowLayout]]]:
        """Layers at a module that this batch uses, with their layouts."""
        found = []
        for method in self.snapshot.modules.get(path, ()):
            used = [layout for layout in method.layouts if layout in self._selected]
            if used:
                found.append((method.layer, used))
        return found

    def _bank(self, layout: RowLayout, path: str) -> tuple[Tensor, ModuleSlice]:
        """Rows of a bank for one module, (capacity, width), with their slice."""
        module = layout.modules[path]
        return self.snapshot.banks[layout].rows[:, module.start : module.start + module.width], module

    def _row_indices(self, layout: RowLayout, repeat: int) -> tuple[Tensor | None, Tensor]:
        """Input rows that use a bank, and their rows in the bank.

        Both are int64 indices; the first is None if all rows use it. `repeat` counts the input rows of each row of the
        batch.
        """
        key = (layout, repeat)
        # kept, because all layers with this layout ask for the same indices
        if key not in self._indices:
            device = self.snapshot.banks[layout].rows.device
            rows, bank_rows = (torch.tensor(numbers, device=device) for numbers in self._selected[layout])
            if repeat > 1:
                within = torch.arange(repeat, device=device)
                rows, bank_rows = (rows[:, None] * repeat + within).flatten(), bank_rows.repeat_interleave(repeat)
            whole = len(self._selected[layout][0]) == self.count
            self._indices[key] = (None if whole else rows, bank_rows)
        return self._indices[key]

    def _gathered(
        self, path: str, layouts: Sequence[RowLayout], neutral: Mapping[str, float], repeat: int, device: torch.device
    ) -> dict[str, Tensor]:
        """Gather the parameters of a module for each row, (rows, *shape).

        Rows of other adapters have the neutral values.
        """
        # parameter -> for each bank: the rows that use it, and their values
        found: dict[str, list[tuple[Tensor | None, Tensor]]] = {}
        for layout in layouts:
            rows, bank_rows = self._row_indices(layout, repeat)
            module_rows, module = self._bank(layout, path)
            # An embedding look-up is the fastest gather of rows on CPUs, by 5 to 20 times on wide banks.
            gathered = F.embedding(bank_rows, module_rows)
            gathered = gathered.to(device, torch.promote_types(gathered.dtype, torch.float32))
            for parameter in module.parameters:
                found.setdefault(parameter.name, []).append((rows, parameter.view(gathered)))
        size = self.count * repeat
        return {name: _join_rows(parts, size, neutral[name], device) for name, parts in found.items()}


def _join_rows(
    parts: Sequence[tuple[Tensor | None, Tensor]], size: int, neutral: float, device: torch.device
) -> Tensor:
    """Join groups of rows to (size, *largest shape), filled with `neutral`."""
    if parts[0][0] is None:  # one bank serves all rows
        return parts[0][1]
    shapes = [values.shape[1:] for _, values in parts]
    largest = [max(sides) for sides in zip(*shapes, strict=True)]
    joined = parts[0][1].new_full((size, *largest), neutral)
    for rows, values in parts:
        assert rows is not None
        inside: Any = (rows.to(device), *(slice(side) for side in values.shape[1:]))
        joined[inside] = values
    return joined


class ServedModule(StandIn):
    """Module of the base with the adapters of the calling thread's request.

    Without a request its output is that of the base.
    """

    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module, path: str, request: ContextVar[Request | None]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.path, self._request = path, request

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Output of the module for the request of this thread."""
        request = self._request.get()
        if request is None:
            return self.base_layer(x, *args, **kwargs)
        return request.output(self.path, self.base_layer, x, *args, **kwargs)


class PerRowHead:
    """Linear or LayerNorm of a task head, with parameters for each row.

    Heads may have different numbers of outputs; the columns that a row's head lacks are -inf, so that neither argmax
    nor softmax sees them.

    Raises:
        ConfigError: the module is of another class.
    """

    def __init__(self, base_layer: nn.Module, path: str) -> None:
        # the exact class, because a subclass may compute something else
        if type(base_layer) not in (nn.Linear, nn.LayerNorm):
            raise ConfigError(
                f'"{path}" is trained in full and is a {type(base_layer).__name__}; only Linear and LayerNorm can '
                "differ by row. Load this adapter with PeftModel instead."
            )
        self.base_layer: Any = base_layer

    def rows_output(
        self, x: Tensor, groups: Sequence[tuple[Tensor | None, Tensor, tuple[Tensor, ModuleSlice]]], out: Tensor | None
    ) -> Tensor:
        """Output with the rows of each group taken from their heads.

        Args:
            x: input, (rows, ..., features).
            groups: for each bank its rows of `x` (None: all), the bank's row for each, and the bank.
            out: what other methods made of the output so far; None if the base has not run yet.
        """
        if groups[0][0] is None:
            return self._of_group(x, *groups[0][1:])
        found = [(rows, self._of_group(x[rows], bank_rows, bank)) for rows, bank_rows, bank in groups]
        covered = sum(len(values) for _, values in found)
        if out is None and covered < x.shape[0]:  # rows without a head of their own have the base's
            out = self.base_layer(x)
        outputs = max(values.shape[-1] for _, values in found)
        if out is not None:
            outputs = max(outputs, out.shape[-1])
        full = found[0][1].new_full((*x.shape[:-1], outputs), -torch.inf)
        if out is not None:
            full[..., : out.shape[-1]] = out
        for rows, values in found:
            full[rows] = F.pad(values, (0, outputs - values.shape[-1]), value=-torch.inf)
        return full

    def _of_group(self, x: Tensor, bank_rows: Tensor, bank: tuple[Tensor, ModuleSlice]) -> Tensor:
        """Output of the heads in one bank, (rows, ..., outputs)."""
        module_rows, module = bank
        if isinstance(self.base_layer, nn.Linear) and module.width > _LARGE_HEAD:
            return self._by_adapter(x, bank_rows, module_rows, module)
        gathered = F.embedding(bank_rows, module_rows).to(x.dtype)
        values = {parameter.name: parameter.view(gathered) for parameter in module.parameters}
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        if isinstance(self.base_layer, nn.Linear):
            out = tokens @ values["weight"].transpose(1, 2)
        else:
            base = self.base_layer
            # normalising is the same for all rows; only scale and shift differ
            out = F.layer_norm(tokens, base.normalized_shape, None, None, base.eps) * values["weight"][:, None]
        if "bias" in values:
            out = out + values["bias"][:, None]
        return out.reshape(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def _by_adapter(x: Tensor, bank_rows: Tensor, module_rows: Tensor, module: ModuleSlice) -> Tensor:
        """Output of large heads, computed adapter by adapter.

        A copy of the weight for each row would take too much memory.
        """
        sizes = {parameter.name: parameter.shape for parameter in module.parameters}
        out = x.new_empty(*x.shape[:-1], sizes["weight"][0])
        for bank_row in bank_rows.unique():
            own = bank_rows == bank_row
            weights = module_rows[bank_row][None]
            values = {parameter.name: parameter.view(weights)[0].to(x.dtype) for parameter in module.parameters}
            out[own] = F.linear(x[own], values["weight"], values.get("bias"))
        return out
