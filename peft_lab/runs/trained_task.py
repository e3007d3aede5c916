"""Task that a saved adapter was trained on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from peft_lab.adapter_files import safe_files
from peft_lab.data.task_registry import list_tasks, load_task
from peft_lab.errors import ConfigError, TaskError, did_you_mean
from peft_lab.runs import run_folder

if TYPE_CHECKING:
    from peft_lab.data.task_schema import Task


def trained_task(
    folder: Path, origin: Mapping[str, str], task: str | Task | None = None, download: bool = False
) -> Task:
    """Return the task asked for, else the one of the run.

    That is a built-in one by its name, else the copy in the folder.

    A task file of your own is followed to its place at training time if it is still the same as the copy in the folder,
    so that its data are found beside it. Otherwise the copy is taken, and reads only data in the folder itself.

    Args:
        folder: folder of the adapter.
        origin: the result of `run_folder.read_origin`.
        task: the task asked for, if any.
        download: True if the folder comes from the Hub: then no file of this machine is followed.

    Raises:
        ConfigError: neither is there.
        TaskError: the task is not known, or its file names code to run.
    """
    if task is not None:
        return load_task(task)
    named, copy = origin.get("task"), folder / run_folder.TASK
    if named and named in list_tasks():
        return load_task(named)
    # A file of the user's own: found where it was, or its copy.
    if copy.is_file():
        # the folder may be a stranger's, so the size is checked before the file is parsed
        safe_files.check_size(copy, safe_files.MAX_JSON_BYTES)
        if named and not download and _is_same_file(Path(named), copy):
            return load_task(Path(named))
        return _confined(load_task(copy))
    if named:
        raise TaskError(f'Unknown task "{named}".{did_you_mean(named, list_tasks())} Name one with --task.')
    raise ConfigError(f'"{folder}" does not say which task it was trained on; name one.')


def _is_same_file(path: Path, copy: Path) -> bool:
    return path.is_file() and path.stat().st_size == copy.stat().st_size and path.read_bytes() == copy.read_bytes()


def _confined(task: Task) -> Task:
    """Return the task without data files outside its folder.

    A folder from elsewhere must not open them.
    """
    names = [name for group in task.data.files.values() for name in group]
    inside = all(not Path(name).is_absolute() and ".." not in Path(name).parts and "$" not in name for name in names)
    # A metric by path would be run.
    for metric in task.metrics:
        if metric.endswith(".py") or "/" in metric or os.sep in metric:
            raise TaskError(
                f'The task file beside the adapter names a metric to run, "{metric}"; name a task with --task.'
            )
    # the task stays usable where no rows are needed; reading them fails with a name that explains itself
    files = task.data.files if inside else {split: (f"{split} data of {task.name}",) for split in task.data.files}
    return task.model_copy(update={"data": task.data.model_copy(update={"files": files})})
