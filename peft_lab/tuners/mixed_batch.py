"""Mixed batches: an adapter for each row of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from peft_lab.errors import ConfigError
from peft_lab.tuners.forward_context import expand_rows

#: peft's name for "no adapter on this row".
BASE = "__base__"


class RowAdapters:
    """Adapter names by row, turned into indices once per call.

    Layers share the indices, so that not every layer makes them anew.

    Attributes:
        names: the distinct names in order of first use.
    """

    def __init__(self, adapter_names: Sequence[str]) -> None:
        self.per_row = tuple(adapter_names)
        self.names = tuple(dict.fromkeys(self.per_row))
        self._positions = {name: i for i, name in enumerate(self.names)}
        self._index: dict[tuple[int, torch.device], Tensor] = {}

    # Layers that are given plain names call this for each forward; equal names give one object with its indices.
    @staticmethod
    @lru_cache(maxsize=8)
    def _cached(adapter_names: tuple[str, ...]) -> RowAdapters:
        return RowAdapters(adapter_names)

    @classmethod
    def of(cls, adapter_names: RowAdapters | Sequence[str]) -> RowAdapters:
        """Convert peft's list of names to a `RowAdapters`."""
        return adapter_names if isinstance(adapter_names, RowAdapters) else cls._cached(tuple(adapter_names))

    def index(self, size: int, device: torch.device) -> Tensor:
        """Position in `names` for each of `size` rows, int64 (size,).

        A layer may see several rows per row of the batch (windows of Swin, beams); they lie next to each other.

        Raises:
            ConfigError: `size` is not a multiple of the number of names.
        """
        key = (size, device)
        if key not in self._index:
            # A tensor made in inference mode could not be used in a training call later.
            with torch.inference_mode(False):
                index = torch.tensor([self._positions[name] for name in self.per_row], device=device)
                self._index[key] = expand_rows(index, size)
        return self._index[key]

    def of_adapter(self, name: str, size: int, device: torch.device) -> Tensor:
        """Row numbers, int64, that use one adapter."""
        return (self.index(size, device) == self._positions[name]).nonzero(as_tuple=True)[0]


#: Adapters of the running call's rows. A context variable, so that threads do not share it.
_CURRENT: ContextVar[RowAdapters | None] = ContextVar("peft_lab_row_adapters", default=None)


def current_row_adapters() -> RowAdapters | None:
    """Adapters by row of the running call.

    None if all rows have the active ones.
    """
    return _CURRENT.get()


@contextmanager
def mixed_batch(adapter_names: Sequence[str]) -> Iterator[None]:
    """Run every layer inside the block with one adapter per row."""
    token = _CURRENT.set(RowAdapters.of(adapter_names))
    try:
        yield
    finally:
        _CURRENT.reset(token)


#: Inputs of a model with one entry for each row of the batch, and the number of axes that they then have.
_BATCHED = {"input_ids": 2, "inputs_embeds": 3, "pixel_values": 4, "input_features": 3, "input_values": 2}


def batch_sizes(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, int]:
    """Number of rows of each input of a call of `forward` or `generate`, by the name of the input.

    Inputs of unusual shape are left out: where text and images are mixed, the latter may be counted through all rows. A
    model whose inputs have other names is taken to have the batch first in its first tensor.
    """
    main = getattr(model, "main_input_name", "input_ids")
    given = {**kwargs, **({main: args[0]} if args else {})}
    if isinstance(given.get("inputs"), Tensor):
        given[main] = given.pop("inputs")
    found = {}
    for name in dict.fromkeys((main, *_BATCHED)):
        value = given.get(name)
        if isinstance(value, Tensor) and value.dim() and (name == main or value.dim() == _BATCHED[name]):
            found[name] = len(value)
    if not found and not hasattr(model, "main_input_name"):
        tensors = [(name, value) for name, value in _named(args, kwargs) if isinstance(value, Tensor) and value.dim()]
        found = {name: len(value) for name, value in tensors[:1]}
    return found


def _named(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Arguments of a call with a name for messages."""
    return [*((f"argument {i}", value) for i, value in enumerate(args, 1)), *kwargs.items()]


def check_count(adapter_names: Sequence[str], rows: int, name: str = "the batch") -> None:
    """Check that a batch has as many rows as names.

    Raises:
        ConfigError: it has another number, with both counts.
    """
    if isinstance(adapter_names, str):
        raise ConfigError(f"adapter_names must be a list with one name per row, got {adapter_names!r}.")
    if len(adapter_names) != rows:
        raise ConfigError(
            f"Length of `adapter_names` should be the same as the number of inputs, but got {len(adapter_names)} and "
            f'{rows} ({name}); pass one name per row, "{BASE}" for rows without an adapter.'
        )


class RowLayer(Protocol):
    """Layer of one module in which each row has its own adapter.

    All rows run at once, without a loop over the adapters. Made with the base module and its path.
    `peft_lab.tuners.layer` has it for methods of one's own; for a tuner of peft the method's file names such a class as
    `ROWS`.

    Attributes:
        row_fields: names of an adapter's tensors, each with the number that changes nothing. Smaller tensors are padded
            with it, and so are rows of other adapters.
    """

    row_fields: Mapping[str, float]

    def row_shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Shapes of an adapter's tensors here, by name in the adapter's file.

        Raises:
            ConfigError: an adapter of this configuration cannot be served by row, with the reason.
        """
        ...

    def row_values(self, values: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
        """Convert the tensors of the file to the fields of a row."""
        ...

    def rows_output(
        self, x: Tensor, values: Mapping[str, Tensor], out: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Output of the module for rows with fields of their own.

        Args:
            x: input of the base module, further arguments behind it.
            values: field -> (rows of x, *shape); a field that no row has may be absent.
            out: what other methods made of the module's output so far; None if the base has not run yet.
        """
        ...
