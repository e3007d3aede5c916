"""Files and folders written beside their place and renamed, and refusals of the disk in one sentence.

A reader, a killed process or a full disk finds what was there before or all of what is new.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft_lab.errors import PeftLabError, WriteError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_PERMISSIONS = ("opened", "change its permissions, or name another folder")
#: Refusals of the system -> what cannot be done, and the mend. Other errors, such as a missing file, are not refusals.
_REFUSALS = {
    **dict.fromkeys(_NO_ROOM, ("written", "make room, and repeat the command")),
    errno.EFBIG: ("written", "name a folder on a disk that holds larger files"),
    errno.EROFS: ("written", "name a folder that can be written"),
    errno.EIO: ("used", "its disk fails; name a folder on another one"),
    errno.EACCES: _PERMISSIONS,
    errno.EPERM: _PERMISSIONS,
    errno.ENAMETOOLONG: ("made", "name a shorter one"),
    errno.ENOTDIR: ("used as a folder", "remove that file, or name another folder"),
    errno.EEXIST: ("made", "remove what is in its place, or name another folder"),
    errno.ENOTEMPTY: ("replaced", "remove what it holds, or name another folder"),
    errno.EISDIR: ("written as a file", "remove that folder, or name another file"),
    errno.ELOOP: ("opened", "it is a symbolic link; remove it"),
}
#: What libraries that write in other languages say instead of an OSError: safetensors names the system's number, and
#: torch's writer of archives tells no more than that it was cut short.
_SYSTEM_NUMBER = re.compile(r"\(os error (\d+)\)")
_CUT_SHORT = ("PytorchStreamWriter failed", "unexpected pos")
#: Bytes below which a disk counts as full.
_FULL_BELOW = 1 << 16


@contextmanager
def write_errors(target: str | Path, mend: str = "") -> Iterator[None]:
    """Raise what the disk refuses as a `WriteError` of one sentence.

    Args:
        target: what is written, named where the error names nothing.
        mend: what can be done about a full disk, instead of repeating the command.
    """
    try:
        yield
    except PeftLabError:
        raise
    except Exception as error:
        found = _refusal(error)
        if found is None:
            raise
        raise WriteError(_sentence(*found, Path(target), mend)) from error


def _refusal(error: BaseException | None) -> tuple[int, str | None] | None:
    """Number of the system's error and the path it names; None for an error of another kind."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _REFUSALS:
            name = error.filename2 or error.filename
            return error.errno, os.fsdecode(name) if isinstance(name, str | bytes | os.PathLike) else None
        said = str(error)
        number = _SYSTEM_NUMBER.search(said)
        if number and int(number[1]) in _REFUSALS:
            return int(number[1]), None
        if isinstance(error, RuntimeError) and any(words in said for words in _CUT_SHORT):
            return errno.ENOSPC, None
        # datasets, for one, raises an error of its own from that of the disk
        error = error.__cause__
    return None


def _sentence(number: int, named: str | None, target: Path, mend: str) -> str:
    undone, usual = _REFUSALS[number]
    if number in _NO_ROOM:
        # what is full may be the disk of the caches or of temporary files, which the error does not name
        place = named or _full_disk() or target
        return f'"{place}" cannot be written: no space is left on its disk; {mend or usual}.'
    reason = os.strerror(number)
    return f'"{named or target}" cannot be {undone}: {reason[0].lower()}{reason[1:]}; {usual}.'


def _full_disk() -> str | None:
    """Folder of temporary files or of a cache whose disk is full."""
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser())
    for place in (Path(tempfile.gettempdir()), home):
        if place.is_dir() and shutil.disk_usage(place).free < _FULL_BELOW:
            return str(place)
    return None


def check_can_be_made(target: str | Path) -> None:
    """Check that a file or folder can be made, before work is spent on it.

    Nothing is written.

    Raises:
        WriteError: a file or a link to nothing is in the way, a name is too long, or the folder cannot be written.
    """
    target = Path(os.path.abspath(Path(target).expanduser()))
    there = target
    # False also for a path below a file, and for a name that is too long
    while not os.path.lexists(there):
        there = there.parent
    with write_errors(target):
        if not there.exists():
            raise OSError(errno.ELOOP, "", str(there))
        if there != target and not there.is_dir():
            raise OSError(errno.ENOTDIR, "", str(there))
        longest = os.pathconf(there, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
        for part in target.relative_to(there).parts:
            if len(os.fsencode(part)) > longest:
                raise OSError(errno.ENAMETOOLONG, "", str(target))
        folder = there if there.is_dir() else there.parent
        if not os.access(folder, os.W_OK | os.X_OK):
            read_only = hasattr(os, "statvfs") and os.statvfs(folder).f_flag & os.ST_RDONLY
            raise OSError(errno.EROFS if read_only else errno.EACCES, "", str(folder))


@contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """Give a folder to write into, which becomes `target` at the end.

    After an error it is removed, with the parents that were made for it. A `target` that is there already keeps what
    it holds, and gets the new files in one step each: they are written into a hidden folder inside it.

    Raises:
        WriteError: the disk refuses.
    """
    check_can_be_made(target)
    target = Path(os.path.realpath(Path(target).expanduser()))
    inside = target.is_dir()
    made = [] if inside else [folder for folder in target.parents if not folder.exists()]
    place = (target if inside else target.parent) / _partial_name(target)
    with write_errors(target):
        try:
            place.mkdir(parents=True)
            yield place
            if inside:
                _move_into(place, target)
            else:
                os.rename(place, target)
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            _remove_empty(made)
            raise


@contextmanager
def new_file(target: str | Path) -> Iterator[Path]:
    """Give a file to write, which replaces `target` at the end.

    After an error it is removed, with the parents that were made for it. A device or pipe is written as it is.

    Raises:
        WriteError: the disk refuses.
    """
    target = Path(os.path.realpath(Path(target).expanduser()))
    made = [folder for folder in target.parents if not folder.exists()]
    with write_errors(target):
        if target.exists() and not target.is_file() and not target.is_dir():
            yield target
            return
        # the suffix stays, because some libraries take the format from it
        partial = target.with_name(f"{_partial_name(target)}{target.suffix[-16:]}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            os.replace(partial, target)
        except BaseException:
            partial.unlink(missing_ok=True)
            _remove_empty(made)
            raise


def write_text(target: str | Path, text: str) -> None:
    """Write a text file in UTF-8, all of it or nothing.

    Raises:
        WriteError: the disk refuses.
    """
    with new_file(target) as partial:
        partial.write_text(text, encoding="utf-8")


def _move_into(source: Path, target: Path) -> None:
    """Move the files of a folder to the same places in another one."""
    for path in sorted(source.rglob("*")):
        if not path.is_dir():
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, place)
    shutil.rmtree(source)


def _partial_name(target: Path) -> str:
    """Hidden name of what is being written; no two processes share one."""
    return f".{target.name[:32]}.partial-{uuid.uuid4().hex[:12]}"


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders that were made for a file that failed, innermost first."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            # another process has put something there, or it was never made
            return
