"""Checkpoints of a run: the last whole one, and removal."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

from peft_lab.errors import ConfigError
from peft_lab.training.checkpoint_manifest import MANIFEST, fault_of, read_state

logger = logging.getLogger("peft_lab")


def last_whole_checkpoint(output_dir: str | Path, world_size: int = 1) -> str | None:
    """Newest checkpoint that a run can go on from, else None.

    Each newer one that is passed over is logged with its fault.

    Args:
        output_dir: folder of the run.
        world_size: number of processes that train.
    """
    for path, fault in _judged(output_dir, world_size):
        if not fault:
            return str(path)
        logger.warning('"%s" is passed over: %s.', path, fault)
    return None


def checkpoint_to_resume(
    output_dir: str | Path, asked: str | bool | None, world_size: int = 1, *, overwrite: bool = False
) -> str | None:
    """Checkpoint to start from; None to start afresh.

    It is the one asked for, else the last whole one of the run.

    Args:
        output_dir: folder of the run.
        asked: `resume_from_checkpoint` of the run.
        world_size: number of processes that train.
        overwrite: True if the checkpoints in the folder are to be removed.

    Raises:
        ConfigError: the checkpoint asked for cannot be continued, or none of those that were complete once.
    """
    # the flag is a text on the command line, and may be a boolean in a file or in Python
    word = str(asked).lower()
    if asked is not None and word not in ("true", "false"):
        named = Path(str(asked)).expanduser()
        if overwrite and named.parent.resolve() == Path(output_dir).resolve():
            raise ConfigError(f'"{named}" would be removed by --overwrite_output_dir; name another --output_dir.')
        return _named_checkpoint(named, world_size)
    present = [] if overwrite else _numbered(output_dir)
    if word == "false" and present:
        raise ConfigError(f'"{output_dir}" holds checkpoints; to start afresh pass --overwrite_output_dir.')
    if word == "true" and not present:
        raise ConfigError(f'There is no complete checkpoint in "{output_dir}" to resume from.')
    if not present:
        return None
    own = last_whole_checkpoint(output_dir, world_size)
    if own is not None:
        if not (Path(own) / MANIFEST).is_file():
            logger.warning('"%s" has no manifest: whether data, base and options are the same is not checked.', own)
        return own
    # Trainer's state is the last file of a checkpoint: those without it are what a killed run left half done
    complete = [(path, fault) for path, fault in _judged(output_dir, world_size) if _was_complete(path)]
    if complete:
        path, fault = complete[0]
        raise ConfigError(
            f'No checkpoint in "{output_dir}" can be continued (of the newest, {path.name}: {fault}); restore it, or '
            "pass --overwrite_output_dir to start afresh."
        )
    if word == "true":
        raise ConfigError(f'There is no complete checkpoint in "{output_dir}" to resume from.')
    logger.warning('No checkpoint in "%s" was complete when the run was ended: it starts afresh.', output_dir)
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


def _named_checkpoint(path: Path, world_size: int) -> str:
    """Checkpoint that the user names, from this run or another program."""
    if not (path / "trainer_state.json").is_file():
        raise ConfigError(f'"{path}" is not a checkpoint folder of Trainer: it has no trainer_state.json.')
    # another number of processes is the user's choice here; it costs the random states alone
    fault = fault_of(path, len([*path.glob("rng_state*.pth")]))
    if fault:
        raise ConfigError(f'"{path}" cannot be continued: {fault}; name another checkpoint.')
    if len([*path.glob("rng_state*.pth")]) != world_size:
        logger.warning('Other processes wrote "%s" than train now, so random states start anew.', path)
    if not (path / MANIFEST).is_file():
        logger.warning('"%s" has no manifest: whether data, base and options are the same is not checked.', path)
    return str(path)


def _judged(output_dir: str | Path, world_size: int) -> list[tuple[Path, str]]:
    """Checkpoints and their faults, from the newest to the first whole one."""
    found, paths = [], [path for _, path in sorted(_numbered(output_dir), reverse=True)]
    for position, path in enumerate(paths):
        fault = fault_of(path, world_size)
        # a run that writes manifests was killed before this one; earlier versions wrote none at all
        older = [other for other in paths[position + 1 :] if (other / MANIFEST).is_file()]
        if not fault and older and not (path / MANIFEST).is_file():
            fault = f"it has no {MANIFEST}, which is written last"
        found.append((path, fault))
        if not fault:
            break
    return found


def _was_complete(path: Path) -> bool:
    return (path / MANIFEST).is_file() or bool(read_state(path))


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
