"""Checks of untrusted files before anything large is read.

Imports nothing heavy.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from peft_lab.errors import ConfigError
from peft_lab.utils.bounded_files import check_size, parse_json, read_json
from peft_lab.utils.safetensors_header import MAX_DIMS, read_header
from peft_lab.utils.schema import Schema

__all__ = [
    "check_fingerprints",
    "check_folder",
    "check_size",
    "parse_json",
    "read_header",
    "read_json",
]

WEIGHTS_INDEX = "model.safetensors.index.json"
#: Weights that are unpickled when they are read.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

MAX_NAMES = 20_000
MAX_TEXT = 1_000
MAX_REGEX = 200_000
_MAX_FILES = 20_000
#: Files of a folder in which `auto_map` would name Python code.
_WITH_CODE = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")


# Folders ------------------------------------------------------------------------------------------------------------


def check_folder(folder: Path) -> None:
    """Check that a folder holds plain files and no code, its sub-folders included.

    There must be weights that are not pickled.

    Raises:
        ConfigError: a link that leads out, a pipe or device, too many or too large files, remote code, or pickled
            weights alone.
    """
    home = folder.resolve()
    # a snapshot in the cache of the Hub is made of links to the blobs of the same repository
    homes = [home, *([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])]
    for path in _entries(folder):
        if path.is_symlink() and not any(path.resolve().is_relative_to(allowed) for allowed in homes):
            raise ConfigError(f'"{path}" is a link that leads out of its folder; replace it by the file itself.')
        # a link to nothing has no mode, and is refused like a pipe
        mode = path.stat().st_mode if path.exists() else 0
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise ConfigError(f'"{path}" is not a plain file; remove it.')
    names = {path.name for path in folder.iterdir()}
    # pickled weights do no harm beside safetensors, which are read in their place
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
            # a name with a path in it could lead out of the folder
            if not isinstance(part, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", part):
                raise ConfigError(f'"{folder / WEIGHTS_INDEX}" names {part!r}, which is no safetensors file beside it.')


def _entries(folder: Path) -> Iterator[Path]:
    """All that lies below a folder, without following links."""
    count, left = 0, [folder]
    while left:
        with os.scandir(left.pop()) as entries:
            for entry in entries:
                count += 1
                if count > _MAX_FILES:
                    raise ConfigError(f'"{folder}" holds more than {_MAX_FILES:,} files; an adapter has a few.')
                if entry.is_dir(follow_symlinks=False):
                    left.append(Path(entry.path))
                yield Path(entry.path)


# Records of base weights ----------------------------------------------------------------------------------------------


class _Fingerprint(Schema):
    """Form of the record of one base weight."""

    shape: list[Annotated[int, Field(ge=0, lt=2**48)]] = Field(max_length=MAX_DIMS)
    dtype: str = Field(max_length=64)
    sha256: str = Field(max_length=64)
    probe: list[Annotated[float, Field(gt=-1e40, lt=1e40)]] = Field(max_length=64)
    role: str = ""
    layer: int | None = None
    nth: int | None = None
    quantization: str = Field(default="", max_length=64)
    rms: float | None = Field(default=None, ge=0, lt=1e40)


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
