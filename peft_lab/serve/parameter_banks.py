"""Parameter banks: parameters of many adapters as rows of shared tensors.

A `ParameterBank` is a value: adding and removing give another one. Rows are only ever appended behind those that any
earlier bank knows, and a removed row is left as it is until the live rows move to a smaller tensor, so whoever holds a
bank sees the same numbers for as long as it holds it. No reference is counted by hand: the old tensor goes with its
last holder.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

#: Parameters of one adapter: module path -> parameter -> tensor.
Values = Mapping[str, Mapping[str, Tensor]]

#: One row in this many may be free or unused: 6.25% of slack, and each change copies 16 rows on average.
_SLACK = 16


@dataclass(frozen=True)
class ParameterSlice:
    """Position of a parameter within its module's slice of a row.

    Attributes:
        name: the parameter's name.
        start: index of its first number within the module's slice.
        shape: its shape, without that of the rows.
    """

    name: str
    start: int
    shape: tuple[int, ...]

    def view(self, module_rows: Tensor) -> Tensor:
        """View of the parameter, (rows, *shape), in the module's rows, (rows, width)."""
        return module_rows[:, self.start : self.start + math.prod(self.shape)].view(-1, *self.shape)


@dataclass(frozen=True)
class ModuleSlice:
    """Position of a module's parameters within a row.

    Attributes:
        start: index of the first number.
        width: count of numbers.
        parameters: the slices of its parameters.
    """

    start: int
    width: int
    parameters: tuple[ParameterSlice, ...]


# without eq, layouts are hashed by identity, because a mapping of modules has no hash
@dataclass(frozen=True, eq=False)
class RowLayout:
    """Layout of a bank's rows: modules, parameters, shapes and dtype.

    Adapters of one method with the same layout share a bank.

    Attributes:
        owner: name of the method.
        modules: module path -> its slice of a row.
        width: count of numbers in a row.
        dtype: as in the adapter's file.
    """

    owner: str
    modules: Mapping[str, ModuleSlice]
    width: int
    dtype: torch.dtype

    @classmethod
    def of(cls, owner: str, values: Values) -> RowLayout:
        """Layout of one adapter's parameters."""
        modules, start, dtype = {}, 0, None
        for path, tensors in values.items():
            parameters, width = [], 0
            for name, tensor in tensors.items():
                parameters.append(ParameterSlice(name, width, tuple(tensor.shape)))
                width += tensor.numel()
                dtype = tensor.dtype if dtype is None else torch.promote_types(dtype, tensor.dtype)
            modules[path] = ModuleSlice(start, width, tuple(parameters))
            start += width
        return cls(owner, modules, start, dtype or torch.float32)

    def signature(self) -> Hashable:
        """Key that is equal for layouts whose rows can share a bank."""
        return self.owner, self.dtype, tuple((path, part.parameters) for path, part in self.modules.items())

    def row(self, values: Values) -> Tensor:
        """Row of one adapter's parameters, (width,)."""
        flat = []
        for path, module in self.modules.items():
            for parameter in module.parameters:
                flat.append(values[path][parameter.name].reshape(-1).to(self.dtype))
        return torch.cat(flat)


@dataclass(frozen=True)
class ParameterBank:
    """Rows of one layout.

    Attributes:
        layout: the layout of a row.
        rows: (capacity, width); only the rows in `row_of` hold an adapter.
        row_of: adapter name -> its row.
        used: count of rows that this bank or an earlier one gave out; those behind are free.
    """

    layout: RowLayout
    rows: Tensor
    row_of: Mapping[str, int]
    used: int

    @classmethod
    def empty(cls, layout: RowLayout, device: torch.device) -> ParameterBank:
        """Bank without an adapter."""
        return cls(layout, torch.empty(0, layout.width, dtype=layout.dtype, device=device), {}, 0)

    def with_adapter(self, name: str, row: Tensor) -> ParameterBank:
        """Bank with one more adapter.

        Only the newest bank of a line may be added to, by one thread at a time.
        """
        bank = self if self.used < self.rows.shape[0] else self._compacted(len(self.row_of) + 1)
        # the row lies behind those that earlier banks know, so writing it changes none of them
        bank.rows[bank.used].copy_(row)
        return ParameterBank(self.layout, bank.rows, {**bank.row_of, name: bank.used}, bank.used + 1)

    def without_adapter(self, name: str) -> ParameterBank:
        """Bank without an adapter, compacted if too many rows are unused."""
        row_of = {other: row for other, row in self.row_of.items() if other != name}
        bank = ParameterBank(self.layout, self.rows, row_of, self.used)
        unused = self.rows.shape[0] - len(row_of)
        return bank._compacted(len(row_of)) if unused > max(1, len(row_of)) // _SLACK else bank

    def _compacted(self, live: int) -> ParameterBank:
        """Copy of the bank with room for `live` rows and some slack."""
        with torch.inference_mode(False):  # a caller's inference mode must not make them read-only for later callers
            rows = self.rows.new_empty(live + live // _SLACK, self.layout.width)
        kept = torch.tensor(list(self.row_of.values()), dtype=torch.long, device=rows.device)
        torch.index_select(self.rows, 0, kept, out=rows[: len(self.row_of)])
        return ParameterBank(self.layout, rows, {name: i for i, name in enumerate(self.row_of)}, len(self.row_of))
