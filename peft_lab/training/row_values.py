"""A value of each training row that travels with it into the batch, such as its weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset as TorchDataset

from peft_lab.errors import ConfigError


class RowValues(TorchDataset):
    """Preprocessed rows with a further value of each.

    Args:
        rows: the preprocessed rows.
        name: key of the value in a row.
        values: one a row, in order.
        option: option of the run that they come from, for the error.
        constants: keys of a row with the value that replaces its own in each row.

    Raises:
        ConfigError: there is another number of values than of rows.
    """

    def __init__(
        self, rows: Any, name: str, values: Sequence[Any], option: str, constants: Mapping[str, Any] | None = None
    ) -> None:
        if len(rows) != len(values):
            raise ConfigError(
                f"{option} gives {len(values)} values, but the kind of task makes {len(rows)} rows of them; "
                "leave it out."
            )
        self.rows, self.name, self.values, self.constants = rows, name, values, dict(constants or {})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> dict[str, Any]:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        """Rows at these positions; a loader asks for a batch by this name."""
        rows = self.rows.__getitems__(list(positions))
        pairs = zip(rows, positions, strict=True)
        return [{**row, **self.constants, self.name: self.values[position]} for row, position in pairs]


class RowValueCollator:
    """Collator that leaves the values of `RowValues` out of the inner one, and adds them as a tensor (n,)."""

    def __init__(self, collator: Callable[[list[Any]], dict[str, Any]], name: str, dtype: torch.dtype) -> None:
        self.collator, self.name, self.dtype = collator, name, dtype

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        values = [row[self.name] for row in rows if self.name in row]
        plain = [{name: value for name, value in row.items() if name != self.name} for row in rows]
        batch = dict(self.collator(plain))
        # rows of an evaluation have no values
        return batch | ({self.name: torch.tensor(values, dtype=self.dtype)} if values else {})

    def set_epoch(self, epoch: int) -> None:
        """Tell the inner collator which epoch begins, if it draws at random."""
        if hasattr(self.collator, "set_epoch"):
            self.collator.set_epoch(epoch)
