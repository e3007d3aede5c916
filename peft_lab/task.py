"""What a task is: one YAML file with a closed schema, and where tasks and kinds of task are found.

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
from typing import TYPE_CHECKING, Any

import yaml

from peft_lab import plain_yaml
from peft_lab.data_folder import DATA_PREFIX, DATA_VARIABLE, below_data
from peft_lab.errors import TaskError, did_you_mean
from peft_lab.task_schema import SPLITS, DataSource, Task, build, builtin_folders
from peft_lab.template import Template

if TYPE_CHECKING:
    from peft_lab.kind import Kind

logger = logging.getLogger("peft_lab")

__all__ = [
    "SPLITS",
    "DataSource",
    "Task",
    "Template",
    "data_files",
    "kind",
    "kinds",
    "load_task",
    "parse_task",
    "tasks",
    "validate_task",
]

ENTRY_POINTS = "peft_lab.tasks"


def tasks() -> dict[str, Task]:
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
    known = tasks()
    if text not in known:
        raise TaskError(f'Unknown task "{text}".{did_you_mean(text, known)} `peft-lab tasks` lists them all.')
    return known[text]


def validate_task(path_or_mapping: str | os.PathLike[str] | Mapping[str, Any]) -> Task:
    """Check a task as thoroughly as is possible without reading its data, and return it.

    On top of what `load_task` checks, local files must exist (those below `${PEFT_LAB_DATA}` if that is set).

    Raises:
        TaskError: names the file, the key, the value and the mend.
    """
    task = parse_task(path_or_mapping) if isinstance(path_or_mapping, Mapping) else load_task(path_or_mapping)
    if task.where != f"${DATA_VARIABLE}" or os.environ.get(DATA_VARIABLE):
        for split in task.data.files:
            data_files(task, split)
    return task


def kinds() -> dict[str, Kind]:
    """Every kind of task by name."""
    found = {file.stem: kind(file.stem) for folder in builtin_folders() for file in sorted(folder.glob("[!_]*.py"))}
    return {**_third_party_kinds(), **found}


def kind(name: str) -> Kind:
    """The kind of that name; raises `TaskError` with the nearest name if there is none."""
    builtin = {file.stem for folder in builtin_folders() for file in folder.glob("[!_]*.py")}
    if name in builtin:
        return importlib.import_module(f"peft_lab.tasks.{name}").KIND
    third = _third_party_kinds()
    if name not in third:
        known = sorted(builtin | set(third))
        raise TaskError(f'Unknown kind of task "{name}".{did_you_mean(name, known)} Kinds: {", ".join(known)}.')
    return third[name]


def data_files(task: Task, split: str) -> list[str]:
    """The files of one split as absolute paths, wildcards expanded in sorted order.

    Raises:
        TaskError: `${PEFT_LAB_DATA}` is needed and not set, or a file does not exist.
    """
    found: list[str] = []
    for name in task.data.files[split]:
        path = _expand(task, name)
        matches = sorted(path.parent.glob(path.name)) if "*" in path.name else [path] * path.exists()
        if not matches:
            raise TaskError(f'Task "{task.name}": the {split} file {path} does not exist.')
        if task.data.builder == "imagefolder" and not matches[0].is_dir():
            raise TaskError(f'Task "{task.name}": builder imagefolder wants a folder for {split}, {path} is a file.')
        found += [str(match) for match in matches]
    return found


def parse_task(mapping: Mapping[str, Any], origin: Path | None = None) -> Task:
    """Build a task from the mapping that a YAML file holds; `origin` names the file in messages and anchors its paths.

    Raises:
        TaskError: unknown key, wrong type, or values that do not fit together.
    """
    try:
        return build(mapping, origin, kind)
    except TaskError as error:
        raise TaskError(f"{origin}: {error}" if origin else str(error)) from error


def _expand(task: Task, name: str) -> Path:
    if not name.startswith(DATA_PREFIX):
        return (task.folder / name).absolute()
    return below_data(name, f'Task "{task.name}"', TaskError)


def _read(path: Path) -> Task:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise TaskError(f'Task file "{path}" does not exist; `peft-lab tasks` lists the built-in tasks.') from error
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f'Task file "{path}" cannot be read: {error}.') from error
    try:
        mapping = plain_yaml.read(text)
    except yaml.YAMLError as error:
        raise TaskError(f"{path} is not plain YAML: {' '.join(str(error).split())}.") from error
    except (RecursionError, ValueError) as error:
        raise TaskError(f"{path} is not a task file: {error}.") from error
    return parse_task(mapping, path.absolute())


@lru_cache(maxsize=1)
def _installed_tasks() -> dict[str, Task]:
    found: dict[str, Task] = {}
    for folder in builtin_folders():
        for file in sorted(folder.glob("*.yaml")):
            task = _read(file)
            if task.name != file.stem:
                raise TaskError(f'{file}: the name "{task.name}" must be the name of the file.')
            found[task.name] = task
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
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            spec = importlib.util.find_spec(entry.module)
        except (ImportError, ValueError) as error:
            logger.warning("Entry point %s of group %s is left out: %s", entry.name, ENTRY_POINTS, error)
            continue
        if spec is None or not spec.origin:
            logger.warning("Entry point %s of group %s: no module %s.", entry.name, ENTRY_POINTS, entry.module)
            continue
        found.append((entry.name, Path(spec.origin).parent))
    return found


@lru_cache(maxsize=1)
def _third_party_kinds() -> dict[str, Kind]:
    found: dict[str, Kind] = {}
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            kind_object = getattr(importlib.import_module(entry.module), entry.attr or "KIND", None)
        except Exception as error:  # whatever a plug-in raises, the built-in kinds stay usable
            logger.warning("Entry point %s of group %s cannot be imported: %s", entry.name, ENTRY_POINTS, error)
            continue
        if kind_object is not None:
            found[kind_object.name] = kind_object
    return found
