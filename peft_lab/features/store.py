"""Arrays of features on disk: stored by content hash, memory-mapped, bounded in total size.

An entry is a folder of npy files that is written beside its place and renamed, so that another process finds it whole
or not at all; of two processes that compute the same entry, the first to finish keeps its own. The entries used longest
ago are removed once all together are larger than the limit.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from peft_lab.errors import ConfigError
from peft_lab.utils.atomic_files import write_errors
from peft_lab.utils.cache import cache_dir

#: Variable with the most bytes that all entries together may take, and its value without one.
LIMIT = "PEFT_LAB_FEATURE_BYTES"
_LIMIT = 8 * 2**30
_ARRAYS = "*.npy"

Arrays = Mapping[str, np.ndarray]


def limit() -> int:
    """Most bytes of all entries together.

    Raises:
        ConfigError: the variable holds no whole number of at least 0.
    """
    text = os.environ.get(LIMIT, str(_LIMIT))
    if not text.isdecimal():
        raise ConfigError(f"{LIMIT}={text!r} must be a number of bytes.")
    return int(text)


def check_size(size: int) -> None:
    """Check that an entry of `size` bytes has room.

    Raises:
        ConfigError: it is larger than the limit of all entries.
    """
    if size > limit():
        raise ConfigError(
            f"The features take {size / 2**30:.2f} GiB, and {LIMIT} leaves {limit() / 2**30:.2f} GiB for them; raise "
            "it, or leave features=cached out."
        )


def is_stored(key: str) -> bool:
    """Test whether there is an entry."""
    return cache_dir("features", key).is_dir()


def stored(key: str, compute: Callable[[], Arrays]) -> dict[str, np.ndarray]:
    """Arrays of an entry by name, memory-mapped and read-only; computed and stored if there is none.

    Args:
        key: content hash of everything that the arrays depend on.
        compute: makes them.
    """
    folder = cache_dir("features", key)
    if not is_stored(key):
        _write(folder, compute())
    with contextlib.suppress(OSError):  # the time of use is of no account where the cache cannot be written
        os.utime(folder)
    found = {path.stem: np.load(path, mmap_mode="r", allow_pickle=False) for path in sorted(folder.glob(_ARRAYS))}
    _remove_oldest(folder)
    return found


def _write(folder: Path, arrays: Arrays) -> None:
    check_size(sum(array.nbytes for array in arrays.values()))
    beside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    with write_errors(folder):
        beside.mkdir(parents=True)
        try:
            for name, array in arrays.items():
                np.save(beside / f"{name}.npy", array, allow_pickle=False)
            try:
                beside.rename(folder)
            except OSError:
                # Another process may have been faster, and its arrays are the same.
                if not folder.is_dir():
                    raise
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def _remove_oldest(kept: Path) -> None:
    """Remove the entries used longest ago until all fit the limit; arrays that are mapped elsewhere stay readable."""
    entries = []
    for folder in kept.parent.iterdir():
        with contextlib.suppress(OSError):  # removed by another process meanwhile
            size = sum(path.stat().st_size for path in folder.glob(_ARRAYS))
            entries.append((folder.stat().st_mtime, size, folder))
    total = sum(size for _, size, _ in entries)
    for _, size, folder in sorted(entries):
        if total <= limit():
            return
        # A folder that is being written has a dot in front.
        if folder != kept and not folder.name.startswith("."):
            shutil.rmtree(folder, ignore_errors=True)
            total -= size
