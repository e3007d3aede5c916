"""Columns of sounds: files by path or by bytes, and the faults of their rows."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_lab.data.row_checks import RowFault
from peft_lab.data.row_maps import map_rows
from peft_lab.errors import TaskError
from peft_lab.utils.audio import Sound, check_soundfile, open_sound

if TYPE_CHECKING:
    from datasets import Dataset

#: Raise it when the same file is read otherwise, because what was found in a file is kept.
_VERSION = 1


def stored_sound(value: Mapping[str, Any]) -> Sound:
    """Sound of a stored file, a mapping of `bytes` and `path`.

    Raises `TaskError` for a file that cannot be read.
    """
    path, data = value["path"], value["bytes"]
    if data is not None:
        return open_sound(BytesIO(data), 0, path or f"a sound of {len(data)} bytes")
    return open_sound(path, 0, path)


def sound_traits(dataset: Dataset) -> list[dict[str, Any]]:
    """Traits of the sound of each row, from all of its samples.

    They are `error` (the reason why it cannot be read, else ""), `rate`, `frames`, `channels`, `peak` (largest absolute
    value) and `finite`; `rate` is -1 without a sound. They are kept for a later run.
    """
    check_soundfile()
    sounds = dataset.select_columns(["audio"])
    rows = map_rows(sounds, _traits, [_VERSION, _states(sounds)], remove_columns=["audio"], desc="Reading sounds")
    return list(rows)


def _states(sounds: Dataset) -> list[list[int]]:
    """Size and time of the files of a column, which may change while their names stay."""
    found = []
    for value in sounds["audio"][:]:
        if value is not None and value["bytes"] is None and value["path"] and os.path.isfile(value["path"]):
            state = os.stat(value["path"])
            found.append([state.st_size, state.st_mtime_ns])
    return found


def _traits(row: Mapping[str, Any]) -> dict[str, Any]:
    import numpy as np

    found = {"error": "", "rate": -1, "frames": 0, "channels": 0, "peak": 0.0, "finite": True}
    value = row["audio"]
    if value is None or (value["bytes"] is None and not value["path"]):
        return found
    try:
        sound = stored_sound(value)
    except TaskError as error:
        return {**found, "error": str(error).rstrip(".")}
    frames, channels = sound.samples.shape
    return {
        **{"error": "", "rate": sound.rate, "frames": frames, "channels": channels},
        "peak": float(np.abs(sound.samples).max(initial=0.0)),
        "finite": bool(np.isfinite(sound.samples).all()),
    }


def sound_faults(traits: Sequence[Mapping[str, Any]]) -> list[RowFault]:
    """Rows whose sound is missing, damaged, empty, not finite or silent."""
    unreadable = [row for row, found in enumerate(traits) if found["error"]]
    read = [(row, found) for row, found in enumerate(traits) if found["rate"] > 0]
    first = f": {traits[unreadable[0]]['error']}" if unreadable else ""
    return [
        RowFault("have no sound", [r for r, found in enumerate(traits) if found["rate"] < 0 and not found["error"]]),
        RowFault(f"have a sound that is not to be used{first}", unreadable),
        RowFault("have a sound without a sample", [row for row, found in read if not found["frames"]]),
        RowFault("have a sound with samples that are no numbers", [row for row, found in read if not found["finite"]]),
        RowFault(
            "have a silent sound", [row for row, found in read if found["frames"] and found["peak"] == 0], "empty"
        ),
    ]


def with_files(dataset: Dataset, column: str, folder: Path, inside: bool) -> Dataset:
    """Data set whose column of names of files holds their paths.

    Args:
        dataset: rows with a column of texts.
        column: its name.
        folder: where relative names start.
        inside: refuse names that lead out of the folder, because the data may be a stranger's.

    Raises:
        TaskError: naming the first name that leads out of the folder.
    """
    paths: list[str | None] = []
    for name in dataset[column][:]:
        path = Path(name).expanduser() if isinstance(name, str) and name.strip() else None
        if path is not None and inside and (path.is_absolute() or ".." in path.parts):
            raise TaskError(f'the file "{name}" lies outside of the folder of its table, which came with an adapter.')
        paths.append(None if path is None else str(folder / path))
    return stored_paths(dataset, column, paths)


def stored_paths(dataset: Dataset, column: str, paths: Sequence[str | None]) -> Dataset:
    """Data set whose column holds files by their paths."""
    files = [None if path is None else {"bytes": None, "path": path} for path in paths]
    return dataset.remove_columns(column).add_column(column, files, feature=_stored())


def as_stored(dataset: Dataset, column: str) -> Dataset:
    """Data set whose column holds files as they are stored.

    As a feature of `datasets` for sounds, it would be encoded and decoded by torchcodec.
    """
    return dataset.cast_column(column, _stored())


def _stored() -> dict[str, Any]:
    from datasets import Value

    return {"bytes": Value("binary"), "path": Value("string")}
