"""Look-up of tasks and kinds of task.

A *kind* (text classification, ...) is a Python file of `peft_lab.tasks` with a module-level `KIND`; a *task* is a YAML
file there, or anywhere a user keeps one. Third parties add both by the entry-point group `peft_lab.tasks`: an entry
point names a module; its `KIND`, if it has one, is a kind, and the `*.yaml` files beside it are tasks. Nothing here
imports torch or datasets, so a typo in a YAML file is answered at once.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from peft_lab.data import foreign_files
from peft_lab.data.data_source import FOLDER_BUILDERS
from peft_lab.data.prompt_template import Template
from peft_lab.data.task_schema import SPLITS, DataSource, Task, build, builtin_folders
from peft_lab.errors import ConfigError, TaskError, did_you_mean
from peft_lab.registry import TASK_ENTRY_POINTS, kind_info
from peft_lab.utils import plain_yaml
from peft_lab.utils.data_root import DATA_PREFIX, DATA_VARIABLE, below_data

logger = logging.getLogger("peft_lab")

__all__ = [
    "SPLITS",
    "DataSource",
    "Task",
    "Template",
    "check_split",
    "data_files",
    "kind",
    "list_tasks",
    "load_task",
    "parse_task",
    "validate_task",
]


def check_split(split: str) -> None:
    """Raise `ConfigError` if `split` is not the name of a split."""
    if split not in SPLITS:
        raise ConfigError(f'Unknown split "{split}".{did_you_mean(split, SPLITS)} Splits: {", ".join(SPLITS)}.')


def list_tasks() -> dict[str, Task]:
    """Every built-in and third-party task by name."""
    return dict(sorted(_installed_tasks().items()))


def load_task(name_or_path: str | os.PathLike[str] | Task) -> Task:
    """The task of that name, or of that YAML file.

    Raises:
        TaskError: no such task or file, or the file is not a valid task.
    """
    if isinstance(name_or_path, Task):
        return name_or_path
    text = os.fspath(name_or_path)
    if text.endswith((".yaml", ".yml")) or os.sep in text or isinstance(name_or_path, Path):
        return _read(Path(text))
    known = list_tasks()
    if text not in known:
        raise TaskError(f'Unknown task "{text}".{did_you_mean(text, known)} `peft-lab tasks` lists them all.')
    return known[text]


def validate_task(path_or_mapping: str | os.PathLike[str] | Mapping[str, Any]) -> Task:
    """Check a task without reading its data, and return it.

    On top of what `load_task` checks, local files must exist (those below `${PEFT_LAB_DATA}` if that is set).

    Raises:
        TaskError: names the file, the key, the value and the mend.
    """
    task = parse_task(path_or_mapping) if isinstance(path_or_mapping, Mapping) else load_task(path_or_mapping)
    # the form of a task can be checked on a machine that has no data
    if task.where != f"${DATA_VARIABLE}" or os.environ.get(DATA_VARIABLE):
        for split in task.data.files:
            data_files(task, split)
    return task


@lru_cache(maxsize=256)
def kind(name: str) -> Any:
    """Runtime of a kind of task: an object of its card's class.

    Raises:
        TaskError: there is no kind of that name, or its module cannot be imported.
    """
    info = kind_info(name)
    try:
        return getattr(importlib.import_module(info.module), info.runtime)()
    except (ImportError, AttributeError) as error:
        raise TaskError(f'The kind of task "{name}" of {info.module} cannot be loaded: {error}') from error


def data_files(task: Task, split: str) -> list[str]:
    """Files of one split, as absolute paths.

    Wildcards are expanded in sorted order.

    Raises:
        TaskError: `${PEFT_LAB_DATA}` is needed and not set, or a file does not exist.
    """
    found: list[str] = []
    if task.foreign:
        foreign_files.check_names(task, task.data.files[split])
    for name in task.data.files[split]:
        path = _expand(task, name)
        # the order of files in a folder differs between machines, and the fingerprint depends on it
        matches = sorted(path.parent.glob(path.name)) if "*" in path.name else [path] * path.exists()
        if not matches:
            mend = " Name your own task file with --task." if task.foreign else ""
            raise TaskError(f'Task "{task.name}": the {split} file {path} does not exist.{mend}')
        builder = task.data.builder
        if builder in FOLDER_BUILDERS and not matches[0].is_dir():
            raise TaskError(f'Task "{task.name}": builder {builder} wants a folder for {split}, {path} is a file.')
        found += [str(match) for match in matches]
    return found


def parse_task(mapping: Mapping[str, Any], origin: Path | None = None) -> Task:
    """Build a task from the mapping that a YAML file holds.

    `origin` names the file in messages and anchors its paths.

    Raises:
        TaskError: unknown key, wrong type, or values that do not fit together.
    """
    try:
        task = build(mapping, origin)
        kind(task.kind).check(task)
        return task
    except TaskError as error:
        raise TaskError(f"{origin}: {error}" if origin else str(error)) from error


def _expand(task: Task, name: str) -> Path:
    if not name.startswith(DATA_PREFIX):
        return (task.folder / name).absolute()
    return below_data(name, f'Task "{task.name}"', TaskError)


def _read(path: Path) -> Task:
    if not path.exists():
        raise TaskError(f'Task file "{path}" does not exist; `peft-lab tasks` lists the built-in tasks.')
    return parse_task(plain_yaml.read_file(path, TaskError), path.absolute())


@lru_cache(maxsize=1)
def _installed_tasks() -> dict[str, Task]:
    found: dict[str, Task] = {}
    for folder in builtin_folders():
        for file in sorted(folder.glob("*.yaml")):
            task = _read(file)
            # `peft-lab tasks` shows names, and people look for a file of that name
            if task.name != file.stem:
                raise TaskError(f'{file}: the name "{task.name}" must be the name of the file.')
            found[task.name] = task
    # built-in tasks come first, so that no plug-in can take the name of one
    for entry, folder in _third_party_folders():
        for file in sorted(folder.glob("*.yaml")):
            try:
                task = _read(file)
            except TaskError as error:  # a broken plug-in must not hide the other tasks
                logger.warning("Task file of entry point %s is left out: %s", entry, error)
                continue
            if task.name in found:
                logger.warning('Task "%s" of entry point %s is left out: the name is taken.', task.name, entry)
                continue
            found[task.name] = task
    return found


def _third_party_folders() -> list[tuple[str, Path]]:
    """Folders whose YAML files are tasks, found without running the plug-in's module."""
    found = []
    for entry in importlib.metadata.entry_points(group=TASK_ENTRY_POINTS):
        try:
            spec = importlib.util.find_spec(entry.module)
        except (ImportError, ValueError) as error:
            logger.warning("Entry point %s of group %s is left out: %s", entry.name, TASK_ENTRY_POINTS, error)
            continue
        if spec is None or not spec.origin:
            logger.warning("Entry point %s of group %s: no module %s.", entry.name, TASK_ENTRY_POINTS, entry.module)
            continue
        found.append((entry.name, Path(spec.origin).parent))
    return found
