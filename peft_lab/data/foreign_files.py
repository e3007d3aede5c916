"""Data files that a task of an adapter's folder names: plain ones of that folder, within limits.

The folder may be a stranger's. Files of the user's own tasks are not looked at here.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from peft_lab.data.task_schema import Task
from peft_lab.errors import ConfigError, TaskError
from peft_lab.utils.bounded_files import parse_json, read_bytes

#: Endings of the files that a builder may read. Archives, compressed files and parquet unfold into any size.
_ENDINGS = {
    "csv": (".csv", ".tsv", ".txt"),
    "json": (".json", ".jsonl"),
    "text": (".txt",),
    "imagefolder": (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp"),
    "maskfolder": (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp"),
    # FLAC packs silence to almost nothing, so a file of it may unfold into any size
    "audiofolder": (".wav",),
}
_ENCODINGS = ("", "utf-8", "utf8", "utf-8-sig", "utf-16", "ascii", "latin-1", "latin1", "iso-8859-1", "cp1252")
_MAX_BYTES, _MAX_COLUMNS, _MAX_PIXELS = 64 * 2**20, 1_000, 2**26
#: First bytes of gzip, zip, bzip2, xz, zstandard, LZ4, 7-Zip and RAR, whatever the file is called.
_PACKED = (b"\x1f\x8b", b"PK", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18", b"7z\xbc", b"Rar!")
#: A tar archive has its mark at this place.
_TAR = (257, b"ustar")


def check_names(task: Task, names: Sequence[str]) -> None:
    """Check that the names of data files lead into the task's folder.

    Raises:
        TaskError: one is absolute, goes up, or starts from a variable.
    """
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts or "$" in name:
            raise TaskError(_refusal(task, f'names the file "{name}", which lies outside of it'))


def check_files(task: Task, files: Sequence[str]) -> None:
    """Check data files before they are read.

    Raises:
        TaskError: a file is packed, of another kind, too large, or of a form that no rows have.
    """
    endings = _ENDINGS.get(task.data.builder)
    if endings is None:
        raise TaskError(_refusal(task, f"has data of the builder {task.data.builder}, which unfold into any size"))
    options = task.data.options
    if len(options.get("delimiter", ",")) != 1 or options.get("encoding", "").lower() not in _ENCODINGS:
        raise TaskError(_refusal(task, "sets a delimiter or an encoding that may take for ever to read"))
    found = [path for file in files for path in _below(Path(file))]
    left = _MAX_BYTES
    for path in found:
        if path.suffix.lower() not in endings:
            raise TaskError(_refusal(task, f'has the data file "{path.name}", which is none of {", ".join(endings)}'))
        if task.data.builder in ("imagefolder", "maskfolder"):
            _check_image(task, path)
            continue
        data = read_bytes(path, left, TaskError)
        left -= len(data)
        start, mark = _TAR
        if data.startswith(_PACKED) or data[start : start + len(mark)] == mark:
            raise TaskError(_refusal(task, f'has the data file "{path.name}", which is packed'))
        if task.data.builder == "json":
            _check_json(task, path, data)
        elif (
            task.data.builder == "csv"
            and data.partition(b"\n")[0].count(options.get("delimiter", ",").encode()) > _MAX_COLUMNS
        ):
            raise TaskError(_refusal(task, f'has the data file "{path.name}" with more than {_MAX_COLUMNS} columns'))


def _below(path: Path) -> list[Path]:
    return sorted(each for each in path.rglob("*") if not each.is_dir()) if path.is_dir() else [path]


def _check_json(task: Task, path: Path, data: bytes) -> None:
    """Check rows of JSON: a list of them, a mapping that holds it, or one in each line."""
    whole = data.lstrip()[:1] == b"[" or bool(task.data.options.get("field"))
    for part in [b'{"rows":' + data + b"}"] if whole else data.splitlines():
        if part.strip():
            try:
                rows = parse_json(part, f'A row of "{path}"', lenient=True)
            except ConfigError as error:
                raise TaskError(str(error)) from error
            if not whole and len(rows) > _MAX_COLUMNS:
                raise TaskError(_refusal(task, f'has "{path.name}" with more than {_MAX_COLUMNS} columns'))


def _check_image(task: Task, path: Path) -> None:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            # the size stands in the head of the file, and no pixel is read
            with Image.open(path) as image:
                pixels = image.width * image.height
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise TaskError(_refusal(task, f'has "{path.name}", which is no image that can be read')) from error
    if pixels > _MAX_PIXELS:
        raise TaskError(_refusal(task, f'has the image "{path.name}" with {pixels:,} pixels'))


def _refusal(task: Task, what: str) -> str:
    return (
        f'The task "{task.name}" came with the folder "{task.folder}" and {what}; name a task file of your own with '
        "--task."
    )
