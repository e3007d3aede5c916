"""Checkpoints of a run: the last complete one, and removal."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import zipfile
from pathlib import Path


def last_complete_checkpoint(output_dir: str | Path, world_size: int = 1) -> str | None:
    """Newest complete checkpoint; None if there is none.

    Trainer writes `trainer_state.json` last on the first process, and each process its own random state: a checkpoint
    without them is what a killed run left behind.

    Args:
        output_dir: folder of the run.
        world_size: number of processes that train.
    """
    random_states = ["rng_state.pth"] if world_size == 1 else [f"rng_state_{i}.pth" for i in range(world_size)]
    for _, path in sorted(_numbered(output_dir), reverse=True):
        # a random state is a zip file whose directory is written last, so a cut one is recognised
        if _is_json(path / "trainer_state.json") and all(zipfile.is_zipfile(path / name) for name in random_states):
            return str(path)
    return None


def remove_checkpoints(output_dir: str | Path, after: str | None = None) -> None:
    """Remove the checkpoints of a run.

    Args:
        output_dir: folder of the run.
        after: a checkpoint; only newer ones are removed, which a killed run left half done.
    """
    newest = int(Path(after).name.rpartition("-")[2]) if after else -1
    for step, path in _numbered(output_dir):
        if step > newest:
            shutil.rmtree(path)


def order_times(output_dir: str | Path) -> None:
    """Set the times of a run's checkpoints back where they are not in the order of steps, or lie in the future."""
    limit = time.time()
    for _, path in sorted(_numbered(output_dir), reverse=True):
        changed = path.stat().st_mtime
        # two seconds, because Trainer takes times within one second for unreliable
        limit = min(changed, limit - 2)
        if changed > limit:
            os.utime(path, (limit, limit))


def _numbered(output_dir: str | Path) -> list[tuple[int, Path]]:
    """Checkpoint folders of Trainer with their step.

    Folders of other names, such as checkpoint-best, are left alone.
    """
    found = []
    for path in Path(output_dir).glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match:
            found.append((int(match[1]), path))
    return found


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
