"""Parameters of many adapters as rows of shared tensors, which a request can go on reading while others change.

A `Bank` is a value: adding and removing give another one. Rows are only ever appended behind those that any earlier
bank knows, and a removed row is left as it is until the live rows move to a smaller tensor, so whoever holds a bank
sees the same numbers for as long as it holds it. Nothing needs counting: the old tensor goes with its last holder.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

#: Parameters of one adapter: module path -> field -> tensor.
Values = Mapping[str, Mapping[str, Tensor]]

#: One row in this many may be free or unused: 6.25% of slack, and each change copies 16 rows on average.
_SLACK = 16


@dataclass(frozen=True)
class Field:
    """Where a tensor of a module lies within the module's part of a row."""

    name: str
    start: int
    shape: tuple[int, ...]

    def of(self, part: Tensor) -> Tensor:
        """The tensor itself, (rows, *shape), as a view of that part of several rows."""
        return part[:, self.start : self.start + math.prod(self.shape)].view(-1, *self.shape)


@dataclass(frozen=True)
class Span:
    """A module's part of a row."""

    start: int
    width: int
    fields: tuple[Field, ...]


@dataclass(frozen=True, eq=False)
class Layout:
    """What the rows of one bank hold. Adapters of one method with the same modules, shapes and dtype share a bank.

    Attributes:
        owner: name of the method.
        spans: module path -> its part of a row.
        width: numbers in a row.
        dtype: as in the adapter's file.
    """

    owner: str
    spans: Mapping[str, Span]
    width: int
    dtype: torch.dtype

    @classmethod
    def of(cls, owner: str, values: Values) -> Layout:
        """The layout of one adapter's parameters."""
        spans, start, dtype = {}, 0, None
        for path, tensors in values.items():
            fields, width = [], 0
            for name, tensor in tensors.items():
                fields.append(Field(name, width, tuple(tensor.shape)))
                width += tensor.numel()
                dtype = tensor.dtype if dtype is None else torch.promote_types(dtype, tensor.dtype)
            spans[path] = Span(start, width, tuple(fields))
            start += width
        return cls(owner, spans, start, dtype or torch.float32)

    def signature(self) -> Hashable:
        """Equal for layouts whose rows can lie in one bank."""
        return self.owner, self.dtype, tuple((path, span.fields) for path, span in self.spans.items())

    def row(self, values: Values) -> Tensor:
        """One adapter's parameters as a row (width,)."""
        parts = [values[path][field.name].reshape(-1) for path, span in self.spans.items() for field in span.fields]
        return torch.cat([part.to(self.dtype) for part in parts])


@dataclass(frozen=True)
class Bank:
    """Rows of one layout.

    Attributes:
        layout: what a row holds.
        rows: (capacity, width); only the rows in `slots` mean anything.
        slots: adapter name -> its row.
        used: rows that this bank or an earlier one gave out; those behind are free.
    """

    layout: Layout
    rows: Tensor
    slots: Mapping[str, int]
    used: int

    @classmethod
    def empty(cls, layout: Layout, device: torch.device) -> Bank:
        return cls(layout, torch.empty(0, layout.width, dtype=layout.dtype, device=device), {}, 0)

    def added(self, name: str, row: Tensor) -> Bank:
        """This bank and one more adapter. Only the newest bank of a line may be added to, by one thread at a time."""
        bank = self if self.used < self.rows.shape[0] else self._moved(len(self.slots) + 1)
        bank.rows[bank.used].copy_(row)
        return Bank(self.layout, bank.rows, {**bank.slots, name: bank.used}, bank.used + 1)

    def removed(self, name: str) -> Bank:
        """This bank without an adapter, moved to less memory where too many rows are no longer used."""
        bank = Bank(self.layout, self.rows, {n: slot for n, slot in self.slots.items() if n != name}, self.used)
        live = len(bank.slots)
        return bank._moved(live) if self.rows.shape[0] - live > max(1, live) // _SLACK else bank

    def _moved(self, live: int) -> Bank:
        with torch.inference_mode(False):  # a caller's inference mode must not make them read-only for later callers
            rows = self.rows.new_empty(live + live // _SLACK, self.layout.width)
        slots = torch.tensor(list(self.slots.values()), dtype=torch.long, device=rows.device)
        torch.index_select(self.rows, 0, slots, out=rows[: len(self.slots)])
        return Bank(self.layout, rows, {name: i for i, name in enumerate(self.slots)}, len(self.slots))
