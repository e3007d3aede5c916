"""Task files that their user has trained on here, noted in the cache.

A run's folder names the task file that it was trained on. Whoever made the folder chose that name, so it is followed
only to a file that this user has trained on.
"""

from __future__ import annotations

import hashlib
import logging
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
        mark.touch()
    except OSError as error:
        logger.warning("The task file cannot be noted in %s (%s): later pass it by --task.", mark.parent, error)


def is_remembered(path: Path, copy: Path) -> bool:
    """Test whether a task file was trained on here and equals a copy."""
    try:
        return path.is_file() and _mark(path).exists() and read_bytes(path, MAX_BYTES) == read_bytes(copy, MAX_BYTES)
    except (PeftLabError, OSError, ValueError):
        return False  # a name that is no path, or a file that is none of a task


def _mark(path: Path) -> Path:
    digest = hashlib.sha256(str(path.resolve()).encode("utf-8", "surrogatepass") + b"\0" + read_bytes(path, MAX_BYTES))
    return cache_dir("own-tasks", digest.hexdigest())
