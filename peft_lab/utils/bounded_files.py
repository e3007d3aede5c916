"""Reading of files of anybody: plain files alone, within limits of size, depth and number of values.

Every file of an adapter's, run's or comparison's folder is read through here. Imports nothing heavy.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any

from peft_lab.errors import ConfigError, PeftLabError

MAX_JSON_BYTES = 16 * 2**20
MAX_DEPTH = 32
#: Values of one file: one takes about 100 bytes of memory.
MAX_VALUES = 1_000_000
_MAX_DIGITS = 40


def read_bytes(path: Path, most: int, error: type[PeftLabError] = ConfigError) -> bytes:
    """Read a plain file of at most `most` bytes.

    Raises:
        PeftLabError: of the given class: it is no plain file, too large, or cannot be read.
    """
    try:
        # a pipe without a writer would block the reader for ever
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(handle, "rb") as file:
            state = os.fstat(handle)
            if not stat.S_ISREG(state.st_mode):
                raise error(f'"{path}" is not a plain file; replace it by one.')
            _check_size(path, state.st_size, most, error)
            data = file.read(most + 1)
    except OSError as failure:
        raise error(f'"{path}" cannot be read: {failure.strerror or failure}.') from failure
    # it may have grown meanwhile
    _check_size(path, len(data), most, error)
    return data


def check_size(path: Path, most: int) -> None:
    """Raise `ConfigError` if a file is larger than `most` bytes."""
    _check_size(path, path.stat().st_size, most, ConfigError)


def _check_size(path: Path, size: int, most: int, error: type[PeftLabError]) -> None:
    if size > most:
        raise error(f'"{path}" has {size:,} bytes, more than the {most:,} that can belong to it.')


def read_json(path: Path, most: int = MAX_JSON_BYTES, lenient: bool = False) -> dict[str, Any]:
    """Read a JSON mapping; {} if there is no such file.

    `lenient` is as for `parse_json`.

    Raises:
        ConfigError: not a mapping, not JSON, too large or too deep, a key twice, or a number that is not finite.
    """
    return parse_json(read_bytes(path, most), f'"{path}"', lenient) if path.exists() else {}


def parse_json(data: bytes, what: str, lenient: bool = False) -> dict[str, Any]:
    """Parse a mapping from bytes of JSON.

    Args:
        data: the bytes.
        what: their name in errors, which are those of `read_json`.
        lenient: take NaN and Infinity, which JSON does not have, and of a repeated key the last value.
    """
    # counted in the bytes, because parsed values take fifty times as much memory as some of them do here
    if sum(map(data.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise ConfigError(f"{what} holds more than {MAX_VALUES:,} values.")
    try:
        values = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=None if lenient else _unique,
            parse_constant=float if lenient else _not_finite,
            parse_float=float if lenient else _finite,
            parse_int=_integer,
        )
        _check_depth(values)
        # half of a pair of code units is no text that could be written again
        if re.search(rb"\\u[dD][89abAB]", data):
            json.dumps(values, ensure_ascii=False).encode("utf-8")
    # very deep nesting ends the parser itself, before the depth is counted
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{what} is not readable JSON: {first_line(error)}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{what} must hold a JSON mapping.")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    # which value of a repeated key counts depends on the parser, so what was checked may not be what is used
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f'the key "{twice[:1000]}" is given twice')
    return values


def _not_finite(text: str) -> Any:
    # Python's parser takes NaN and Infinity, which JSON does not have
    raise ValueError(f"{text} is not a number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:80]} is too large a number")
    return number


def _integer(text: str) -> int:
    # larger ones fit into no array and no float
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"{text[:80]} is too large a number")
    return int(text)


def _check_depth(values: Any) -> None:
    # the depth is counted level by level because a recursion could itself run too deep
    level: list[Any] = [values]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for part in level:
            below += part.values() if isinstance(part, dict) else part
        level = [value for value in below if isinstance(value, dict | list)]
        if not level:
            return
    raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")


def first_line(error: BaseException) -> str:
    """First line of an error's words, or its type."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
