"""Checks of untrusted files before anything large is read.

Imports nothing heavy.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from peft_lab.errors import ConfigError
from peft_lab.utils.schema import Schema

WEIGHTS_INDEX = "model.safetensors.index.json"
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
#: Files of a folder in which `auto_map` would name Python code.
_WITH_CODE = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")


# Folders ------------------------------------------------------------------------------------------------------------


def check_folder(folder: Path) -> None:
    """Check that a folder holds plain files and no code.

    There must be weights that are not pickled.

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
        # A link to nothing has no mode, and is refused like a pipe.
        mode = path.stat().st_mode if path.exists() else 0
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise ConfigError(f'"{path}" is not a plain file; remove it.')
    # Pickled weights do no harm beside safetensors, which are read in their place.
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
            # A name with a path in it could lead out of the folder.
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
    """Read a JSON mapping; {} if there is no such file.

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
    """Parse a mapping from bytes of JSON.

    `what` names them in errors, which are those of `read_json`.
    """
    try:
        values = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_not_finite)
        _check_depth(values)
    # Very deep nesting ends the parser itself, before the depth is counted.
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{what} is not readable JSON: {_first_line(error)}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{what} must hold a JSON mapping.")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    # Which value of a repeated key counts depends on the parser, so what was checked may not be what is used.
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f'the key "{twice[:MAX_TEXT]}" is given twice')
    return values


def _not_finite(text: str) -> Any:
    # Python's parser takes NaN and Infinity, which JSON does not have.
    raise ValueError(f"{text} is not a number of JSON")


def _check_depth(values: Any) -> None:
    # The depth is counted level by level because a recursion could itself run too deep.
    level: list[Any] = [values]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for part in level:
            below += part.values() if isinstance(part, dict) else part
        level = [value for value in below if isinstance(value, dict | list)]
        if not level:
            return
    raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


# Weights ------------------------------------------------------------------------------------------------------------


def read_header(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Return dtype and shape of every tensor of a safetensors file.

    No tensor is read.

    safetensors itself refuses a header that does not describe exactly the bytes of the file.

    Raises:
        ConfigError: it does, or there are more tensors, longer names or more dimensions than an adapter has.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, tuple[str, list[int]]] = {}
    try:
        # The reader for numpy needs no torch.
        with safe_open(path, framework="np") as file:
            names = list(file.keys())
            if len(names) > _MAX_TENSORS:
                raise ConfigError(f'"{path}" declares {len(names):,} tensors; at most {_MAX_TENSORS:,} are read.')
            for name in names:
                part = file.get_slice(name)
                found[name] = (str(part.get_dtype()), list(part.get_shape()))
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f'"{path}" is no safetensors file that can be read: it is damaged, cut short or too long '
            f"({_first_line(error)})."
        ) from error
    for name, (_, shape) in found.items():
        if len(name) > MAX_TEXT or len(shape) > _MAX_DIMS:
            raise ConfigError(f'"{path}" has a tensor "{name[:MAX_TEXT]}" of a name or shape that no adapter has.')
    return found


class _Fingerprint(Schema):
    """Form of the record of one base weight."""

    shape: list[Annotated[int, Field(ge=0, lt=2**48)]] = Field(max_length=_MAX_DIMS)
    dtype: str = Field(max_length=64)
    sha256: str = Field(max_length=64)
    probe: list[Annotated[float, Field(gt=-1e40, lt=1e40)]] = Field(max_length=64)
    role: str = ""
    layer: int | None = None
    nth: int | None = None


def check_fingerprints(values: Any, what: str) -> None:
    """Check the form of a record of base weights.

    Raises:
        ConfigError: naming the module whose entry has another form.
    """
    for name, entry in values.items() if isinstance(values, dict) else [("", None)]:
        try:
            _Fingerprint.model_validate(entry)
            valid = isinstance(name, str)
        except ValidationError:
            valid = False
        if not valid:
            raise ConfigError(
                f'The fingerprint of module "{str(name)[:MAX_TEXT]}" in {what} is not one that was saved.'
            )
