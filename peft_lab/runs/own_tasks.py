"""Task files that their user has trained on here, noted in the cache.

A run's folder names the task file that it was trained on, by its path or by its digest here. Whoever made the folder
chose that name, so it is followed only to a file that this user has trained on.
"""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path

from peft_lab.errors import PeftLabError
from peft_lab.utils.bounded_files import read_bytes
from peft_lab.utils.cache import cache_dir
from peft_lab.utils.plain_yaml import MAX_BYTES

logger = logging.getLogger("peft_lab")


def remember(path: Path) -> None:
    """Note that a task file was trained on, by its place and content."""
    mark = _mark(path)
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(str(path.resolve()), encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        logger.warning("The task file cannot be noted in %s (%s): later pass it by --task.", mark.parent, error)


def find(name: str, noted: str | None, copy: Path) -> Path | None:
    """Task file that was trained on here and equals a copy.

    Args:
        name: its path, as far as it is known.
        noted: the `digest` of the file, if the run has it.
        copy: the copy in the run's folder.
    """
    path = Path(name).expanduser()
    if _is_remembered(path, copy):
        return path
    # it comes from a folder of anybody, and must not lead to another file of this machine
    if noted is None or not re.fullmatch("[0-9a-f]{64}", noted):
        return None
    mark = cache_dir("own-tasks", noted)
    place = Path(mark.read_text(encoding="utf-8", errors="surrogateescape")) if mark.is_file() else None
    return place if place is not None and _is_remembered(place, copy) else None


def _is_remembered(path: Path, copy: Path) -> bool:
    """Test whether a task file was trained on here and equals a copy."""
    try:
        return path.is_file() and _mark(path).exists() and read_bytes(path, MAX_BYTES) == read_bytes(copy, MAX_BYTES)
    except (PeftLabError, OSError, ValueError):
        return False  # a name that is no path, or a file that is none of a task


def digest(path: Path) -> str:
    """SHA-256 of a task file's place and content."""
    place = str(path.resolve()).encode("utf-8", "surrogatepass")
    return hashlib.sha256(place + b"\0" + read_bytes(path, MAX_BYTES)).hexdigest()


def _mark(path: Path) -> Path:
    return cache_dir("own-tasks", digest(path))
