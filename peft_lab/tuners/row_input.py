"""Declaration of a method's row inputs: arguments of the model's forward with a value for each row of the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_lab.errors import ConfigError


@dataclass(frozen=True)
class RowInput:
    """Declaration of a forward argument with one value per row.

    Attributes:
        name: keyword of the forward.
        dtype: "int64", "bool", "float32" or "" for any; other numbers of the same sort are cast.
        per_token: shape (batch, tokens) instead of (batch,).
        shape: sizes behind the batch, None for any: (None, 3) for points in space.
        column: the data set's column that it is bound to; its absence is then an error that names the column.
        compute: function of the model's arguments that gives the value where the call does not; None for no value.
    """

    name: str
    dtype: str = ""
    per_token: bool = False
    column: str | None = None
    compute: Callable[[Mapping[str, Any]], Tensor] | None = None
    shape: tuple[int | None, ...] = ()

    def check(self, value: Any, rows: int | None = None) -> Tensor:
        """Check a given value and cast it to the declared dtype.

        Args:
            value: the value.
            rows: number of rows of the batch; None if it is not known.

        Raises:
            ConfigError: the value is no tensor of the declared sort, with one entry for each row.
        """
        if not isinstance(value, Tensor):
            raise ConfigError(f"{self.name} must be a tensor, got {type(value).__name__}.")
        # Only numbers of the same sort are cast, so a float is never rounded to an id.
        wanted = getattr(torch, self.dtype) if self.dtype else value.dtype
        shape = (None,) if self.per_token else self.shape
        sizes = [size is None or size == given for size, given in zip(shape, value.shape[1:], strict=False)]
        fits = value.ndim == 1 + len(shape) and all(sizes)
        if value.is_floating_point() != wanted.is_floating_point or not fits or rows not in (None, len(value)):
            one = "row of tokens" if self.per_token else "number" if wanted.is_floating_point else "integer"
            if self.shape:
                one = f"array of shape ({', '.join('any' if size is None else str(size) for size in self.shape)})"
            raise ConfigError(
                f"{self.name} has shape {list(value.shape)} and dtype {value.dtype}, expected one {one} for each of "
                f"{'the' if rows is None else rows} rows."
            )
        return value.to(wanted)
