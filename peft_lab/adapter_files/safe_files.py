"""Checks on files that may come from anywhere, made before anything large is read. Imports nothing heavy."""

from __future__ import annotations

import importlib
import json
import math
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from peft_lab.errors import ConfigError

ADAPTER_WEIGHTS, WEIGHTS_INDEX = "adapter_model.safetensors", "model.safetensors.index.json"
#: Weights that are unpickled when they are read.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

MAX_JSON_BYTES = 64 * 2**20
MAX_DEPTH = 32
MAX_NAMES = 20_000
MAX_TEXT = 1_000
MAX_REGEX = 200_000
_MAX_FILES = 10_000
_MAX_TENSORS = 100_000
_MAX_DIMS = 8
#: Most steps that a regex may need on one module name of about 64 characters, by `_cost`.
_MAX_STEPS = 5 * 10**7
_LONG_NAME = 64

#: Bits of one value, by the names that safetensors gives to dtypes.
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E5M2FNUZ", "F8_E4M3FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
#: Files of a folder in which `auto_map` would name Python code.
_WITH_CODE = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")


# Folders ------------------------------------------------------------------------------------------------------------


def check_folder(folder: Path) -> None:
    """Make sure that a folder holds plain files of its own, no code, and no weights that are only there as pickles.

    Raises:
        ConfigError: a link that leads out, a pipe or device, too many files, remote code, or pickled weights alone.
    """
    entries = list(_entries(folder))
    names = {path.name for path in entries}
    home = folder.resolve()
    # A snapshot in the cache of the Hub is made of links to the blobs of the same repository.
    homes = [home, *([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])]
    for path in entries:
        if path.is_symlink() and not any(path.resolve().is_relative_to(allowed) for allowed in homes):
            raise ConfigError(f'"{path}" is a link that leads out of its folder; replace it by the file itself.')
        mode = path.stat().st_mode if path.exists() else 0
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise ConfigError(f'"{path}" is not a plain file; remove it.')
    if not any(name.endswith(".safetensors") for name in names):
        pickled = sorted(name for name in names if name.endswith(PICKLES) and name.startswith(("adapter", "pytorch")))
        if pickled:
            raise ConfigError(
                f'"{folder}" has its weights only in {pickled[0]}, which can run code when it is read; save them as '
                "safetensors."
            )
    for name in _WITH_CODE:
        if name in names and "auto_map" in read_json(folder / name):
            raise ConfigError(f'"{folder / name}" names Python code by "auto_map", which is never run; remove the key.')
    if WEIGHTS_INDEX in names:
        parts = read_json(folder / WEIGHTS_INDEX).get("weight_map")
        for part in parts.values() if isinstance(parts, dict) else [parts]:
            if not isinstance(part, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", part):
                raise ConfigError(f'"{folder / WEIGHTS_INDEX}" names {part!r}, which is no safetensors file beside it.')


def _entries(folder: Path) -> Iterator[Path]:
    for count, path in enumerate(folder.iterdir()):
        if count >= _MAX_FILES:
            raise ConfigError(f'"{folder}" holds more than {_MAX_FILES} files; an adapter has a few.')
        yield path


def check_size(path: Path, most: int) -> None:
    """Raise `ConfigError` if a file is larger than `most` bytes."""
    size = path.stat().st_size
    if size > most:
        raise ConfigError(f'"{path}" has {size:,} bytes, more than the {most:,} that can belong to it.')


# JSON ---------------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """A JSON mapping; {} if there is no such file.

    Raises:
        ConfigError: not a mapping, not JSON, too large or too deep, a key twice, or a number that is not finite.
    """
    if not path.is_file():
        return {}
    check_size(path, MAX_JSON_BYTES)
    try:
        return parse_json(path.read_bytes(), f'"{path}"')
    except OSError as error:
        raise ConfigError(f'"{path}" cannot be read: {error}.') from error


def parse_json(data: bytes, what: str) -> dict[str, Any]:
    """The mapping in some bytes of JSON; `what` names them in errors, which are those of `read_json`."""
    try:
        values = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_not_finite)
        _check_depth(values)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{what} is not readable JSON: {_first_line(error)}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{what} must hold a JSON mapping.")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f'the key "{twice[:MAX_TEXT]}" is given twice')
    return values


def _not_finite(text: str) -> Any:
    raise ValueError(f"{text} is not a number of JSON")


def _check_depth(values: Any) -> None:
    level: list[Any] = [values]
    for _ in range(MAX_DEPTH):
        level = [v for part in level for v in (part.values() if isinstance(part, dict) else part)]
        level = [v for v in level if isinstance(v, dict | list)]
        if not level:
            return
    raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


# Weights ------------------------------------------------------------------------------------------------------------


def read_header(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Dtype and shape of every tensor of a safetensors file, by name; no tensor is read.

    Raises:
        ConfigError: the header does not describe exactly the bytes that the file has.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_JSON_BYTES):
            raise ConfigError(f'"{path}" is no safetensors file: its header would have {length:,} of {size:,} bytes.')
        header = parse_json(file.read(length), f'The header of "{path}"')
    header.pop("__metadata__", None)
    if len(header) > _MAX_TENSORS:
        raise ConfigError(f'"{path}" declares {len(header):,} tensors; at most {_MAX_TENSORS:,} are read.')
    found, spans = {}, []
    for name, entry in header.items():
        kind, shape, span = _tensor(path, name, entry)
        found[name] = (kind, shape)
        spans.append(span)
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise ConfigError(f'"{path}" is damaged: its tensors overlap or leave a gap at byte {min(start, end)}.')
        end = stop
    if end != size - 8 - length:
        raise ConfigError(
            f'"{path}" is cut short or too long: its tensors need {end:,} of {size - 8 - length:,} bytes.'
        )
    return found


def _tensor(path: Path, name: str, entry: Any) -> tuple[str, list[int], tuple[int, int]]:
    entry = entry if isinstance(entry, dict) else {}
    kind, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if (
        len(name) <= MAX_TEXT
        and isinstance(kind, str)
        and kind in _BITS
        and _naturals(shape)
        and len(shape) <= _MAX_DIMS
        and _naturals(span)
        and len(span) == 2
        and math.prod(shape) * _BITS[kind] == 8 * (span[1] - span[0])
    ):
        return kind, shape, (span[0], span[1])
    raise ConfigError(f'"{path}" is damaged: dtype, shape and place of its tensor "{name[:MAX_TEXT]}" do not agree.')


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**48 for v in values)


def check_fingerprints(values: Any, what: str) -> None:
    """Make sure that a record of base weights has the form that `peft_lab.adapter_files.base_fingerprint` writes.

    Raises:
        ConfigError: naming the module whose entry has not.
    """
    for name, entry in values.items() if isinstance(values, dict) else [("", None)]:
        if not isinstance(name, str) or not isinstance(entry, dict) or not _is_fingerprint(entry):
            raise ConfigError(
                f'The fingerprint of module "{str(name)[:MAX_TEXT]}" in {what} is not one that was saved.'
            )


def _is_fingerprint(entry: dict[str, Any]) -> bool:
    probe, shape = entry.get("probe"), entry.get("shape")
    return (
        {*entry} <= {"shape", "dtype", "sha256", "probe", "role", "layer", "nth"}
        and isinstance(shape, list)
        and len(shape) <= _MAX_DIMS
        and _naturals(shape)
        and all(isinstance(entry.get(key), str) and len(entry[key]) <= 64 for key in ("dtype", "sha256"))
        and isinstance(probe, list)
        and len(probe) <= 64
        and all(type(value) in (int, float) and abs(value) < 1e40 for value in probe)
        and isinstance(entry.get("role", ""), str)
        and all(type(entry[key]) in (int, type(None)) for key in ("layer", "nth") if key in entry)
    )


# Regular expressions ------------------------------------------------------------------------------------------------


def check_regex(name: str, pattern: str) -> None:
    """Make sure that a regex compiles and answers fast on every module name, whatever the name is.

    Refused are repeats whose body can match in several ways (`(a+)+`), back-references and look-behinds, and patterns
    with so many open ends in a row that backtracking would take long.

    Raises:
        ConfigError: naming the field and what is wrong with its pattern.
    """
    shown = pattern if len(pattern) <= 80 else f"{pattern[:80]}..."
    if len(pattern) > MAX_REGEX:
        raise ConfigError(f"{name} is a regular expression of {len(pattern):,} characters; at most {MAX_REGEX:,}.")
    parser = getattr(re, "_parser", None) or importlib.import_module("sre_parse")
    try:
        re.compile(pattern)
        steps = _cost(parser.parse(pattern))
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"{name}={shown!r} is not a valid regular expression: {_first_line(error)}.") from error
    except _Refused as error:
        raise ConfigError(f"{name}={shown!r} may take for ever: {error}; write it without.") from error
    if steps > _MAX_STEPS:
        raise ConfigError(f"{name}={shown!r} may take for ever: too many repeats or choices follow each other.")


class _Refused(Exception):
    """A construct that a downloaded pattern has no need of."""


def _cost(items: Iterable[Any]) -> int:
    """Most ways in which a parsed pattern can be tried on one name of `_LONG_NAME` characters."""
    total = 1
    for op, argument in items:
        total = min(total * _cost_of(str(op), argument), _MAX_STEPS**2)
    return total


def _cost_of(op: str, argument: Any) -> int:
    if op in ("LITERAL", "NOT_LITERAL", "ANY", "IN", "AT"):
        return 1
    if op == "SUBPATTERN":
        return _cost(argument[-1])
    if op in ("ASSERT", "ASSERT_NOT"):
        if argument[0] < 0:
            raise _Refused("it looks behind")
        return 1 + _cost(argument[1])
    if op == "BRANCH":
        return sum(_cost(branch) for branch in argument[1])
    if op == "ATOMIC_GROUP":
        return _cost(argument)
    if op in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        low, high, body = argument
        inside = _cost(body)
        if high == 1:
            return inside + (low == 0)
        if inside > 1 or not len(body):
            raise _Refused("it repeats something that can match in several ways")
        narrow = [str(o) for o, _ in body] == ["IN"] and _only_digits(body[0][1])
        return 4 if narrow else max(2, min(_LONG_NAME, int(high) - int(low) + 1))
    raise _Refused(f"it uses {op.lower().replace('_', ' ')}")


def _only_digits(choices: list[Any]) -> bool:
    """Whether a class of characters is \\d or [0-9], of which names hold short runs only."""
    return all(
        (str(op), str(value)) == ("CATEGORY", "CATEGORY_DIGIT") or (str(op), value) == ("RANGE", (48, 57))
        for op, value in choices
    )
