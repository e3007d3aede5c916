"""Which adapter each row of a mixed batch uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

#: peft's name for "no adapter on this row".
BASE = "__base__"


class Rows:
    """One adapter name per row, turned into indices once per call instead of once per layer.

    Attributes:
        names: the distinct names in order of first use.
    """

    def __init__(self, adapter_names: Sequence[str]) -> None:
        self.per_row = tuple(adapter_names)
        self.names = tuple(dict.fromkeys(self.per_row))
        self._positions = {name: i for i, name in enumerate(self.names)}
        self._index: dict[tuple[int, torch.device], Tensor] = {}

    @staticmethod
    @lru_cache(maxsize=8)
    def _cached(adapter_names: tuple[str, ...]) -> Rows:
        return Rows(adapter_names)

    @classmethod
    def of(cls, adapter_names: Rows | Sequence[str]) -> Rows:
        """Accept what peft passes (a list of names) as well as a `Rows`."""
        return adapter_names if isinstance(adapter_names, Rows) else cls._cached(tuple(adapter_names))

    def index(self, size: int, device: torch.device) -> Tensor:
        """Position in `names` for each of `size` rows, int64 (size,).

        A layer may see several rows per row of the batch (windows of Swin, beams); they lie next to each other.

        Raises:
            ValueError: `size` is not a multiple of the number of names.
        """
        key = (size, device)
        if key not in self._index:
            if size % len(self.per_row):
                raise ValueError(
                    f"adapter_names has {len(self.per_row)} names, but a layer received {size} rows; "
                    "pass one name per row of the batch."
                )
            with torch.inference_mode(False):  # what is made in that mode cannot be used in a training call later
                index = torch.tensor([self._positions[name] for name in self.per_row], device=device)
                self._index[key] = index.repeat_interleave(size // len(self.per_row))
        return self._index[key]

    def of_adapter(self, name: str, size: int, device: torch.device) -> Tensor:
        """Row numbers, int64, that use one adapter."""
        return (self.index(size, device) == self._positions[name]).nonzero(as_tuple=True)[0]


class RowLayer(Protocol):
    """What a method supplies at one module so that each row of a batch has its own adapter, without a loop over them.

    Made with the base module and its path. `peft_lab.tuners.layer` has it for methods of one's own; for a tuner of
    peft the method's file names such a class as `ROWS`.

    Attributes:
        row_fields: names of an adapter's tensors, each with the number that changes nothing. Smaller tensors are padded
            with it, and so are rows of other adapters.
    """

    row_fields: Mapping[str, float]

    def row_shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Shapes of an adapter's tensors here, by their names in the adapter's file.

        Raises:
            ConfigError: an adapter of this configuration cannot be served by row, with the reason.
        """
        ...

    def row_values(self, values: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
        """The tensors of the file as the fields of a row."""
        ...

    def rows_output(
        self, x: Tensor, values: Mapping[str, Tensor], out: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The module's output.

        Args:
            x: input of the base module, further arguments behind it.
            values: field -> (rows of x, *shape); a field that no row has may be absent.
            out: what other methods made of the module's output so far; None if the base has not run yet.
        """
        ...
