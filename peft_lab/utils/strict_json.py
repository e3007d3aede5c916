"""JSON text without NaN and infinity, which JSON does not have.

Imports nothing heavy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def finite(value: Any) -> Any:
    """Copy of `value` with None for every number that is not finite.

    Numbers of numpy and torch become Python's, sets become sorted lists; everything else stays as it is.
    """
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, set | frozenset):  # their order differs from process to process
        return sorted((finite(item) for item in value), key=str)
    # a scalar of numpy or torch has a shape, and no dimension in it
    if getattr(value, "shape", None) == ():
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def dumps(value: Any, indent: int | None = None) -> str:
    """JSON text of a value, with null for numbers that are not finite.

    A value that JSON cannot hold, such as a dtype in a method's config, is written as its text, because a finished run
    must not be lost for it.
    """
    return json.dumps(finite(value), indent=indent, ensure_ascii=False, allow_nan=False, default=str)
