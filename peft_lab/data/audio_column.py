"""Columns of sounds: what is in their files, and the faults of their rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peft_lab.data.file_column import file_name, file_states, is_missing
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
    return open_sound(value, 0, file_name(value, "a sound"))


def sound_traits(dataset: Dataset) -> list[dict[str, Any]]:
    """Traits of the sound of each row, from all of its samples.

    They are `error` (the reason why it cannot be read, else ""), `rate`, `frames`, `channels`, `peak` (largest absolute
    value) and `finite`; `rate` is -1 without a sound. They are kept for a later run.
    """
    check_soundfile()
    sounds = dataset.select_columns(["audio"])
    rows = map_rows(
        sounds, _traits, [_VERSION, file_states(sounds, ["audio"])], remove_columns=["audio"], desc="Reading sounds"
    )
    return list(rows)


def _traits(row: Mapping[str, Any]) -> dict[str, Any]:
    import numpy as np

    found = {"error": "", "rate": -1, "frames": 0, "channels": 0, "peak": 0.0, "finite": True}
    value = row["audio"]
    if is_missing(value):
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
