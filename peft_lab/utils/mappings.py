"""Choices of keys from rows, which are mappings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def without(row: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """Copy of a row without some of its keys."""
    return {name: value for name, value in row.items() if name not in keys}


def attributes(value: Any, names: Iterable[str]) -> dict[str, Any]:
    """Attributes of an object by name."""
    return {name: getattr(value, name) for name in names}


def pick(row: Sequence[Any], places: Iterable[int]) -> tuple[Any, ...]:
    """Values of a row at some places, in their order."""
    return tuple(row[place] for place in places)
