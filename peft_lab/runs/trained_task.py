"""Task that a saved adapter was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from peft_lab.data.task_registry import list_tasks, load_task
from peft_lab.errors import ConfigError, TaskError, did_you_mean
from peft_lab.metrics import METRICS
from peft_lab.registry import kind_info
from peft_lab.runs import own_tasks, run_folder
from peft_lab.utils.patterns import may_take_for_ever

if TYPE_CHECKING:
    from peft_lab.data.task_schema import Task


def trained_task(
    folder: Path, origin: Mapping[str, str], task: str | Task | None = None, download: bool = False
) -> Task:
    """Return the task asked for, else the one of the run.

    That is a built-in one by its name, else the copy in the folder.

    A task file of your own is followed to its place at training time if you trained on it here and it is still the same
    as the copy in the folder, so that its data are found beside it. Otherwise the copy is taken, and reads only data in
    the folder itself.

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
        place = own_tasks.find(named, origin.get("task_file"), copy) if named and not download else None
        if place is not None:
            return load_task(place)
        return _foreign(load_task(copy))
    if named:
        raise TaskError(f'Unknown task "{named}".{did_you_mean(named, list_tasks())} Name one with --task.')
    raise ConfigError(f'"{folder}" does not say which task it was trained on; name one.')


def check_metrics(task: Task) -> None:
    """Check that a task that came in a folder has no metrics but those that ship with peft-lab.

    Raises:
        TaskError: the code of one would be fetched and run.
    """
    known = (*METRICS, *kind_info(task.kind).metrics_for(task.problem_type))
    other = next((metric for metric in task.metrics if metric not in known), None)
    if task.foreign and other is not None:
        raise TaskError(
            f'The task file beside the adapter names the metric "{other}", whose code would be fetched and run; name a '
            "task file of your own with --task."
        )


def _foreign(task: Task) -> Task:
    """Return the task as one that came in a folder from anywhere.

    It reads plain files of that folder alone, and runs no code.

    Raises:
        TaskError: it names a metric's file, which would be run, or a pattern that may take for ever.
    """
    for metric in task.metrics:
        if Path(metric).is_absolute():
            raise TaskError(
                f'The task file beside the adapter names a metric to run, "{metric}"; name a task with --task.'
            )
    for pattern in (task.template.extract, task.template.required) if task.template else ():
        if may_take_for_ever(pattern):
            raise TaskError(
                f"The task file beside the adapter has the pattern {pattern[:80]!r}, which may take for ever as a "
                "regular expression; name a task with --task."
            )
    return task.as_foreign()
