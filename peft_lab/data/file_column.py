"""Columns of files, such as sounds and masks: by path or by bytes, as they are stored."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_lab.data.task_registry import data_files
from peft_lab.errors import TaskError

if TYPE_CHECKING:
    from datasets import Dataset

    from peft_lab.data.task_schema import Task


def as_files(dataset: Dataset, task: Task, column: str, what: str, mend: str) -> Dataset:
    """Data set whose column holds files, mappings of `bytes` and `path`.

    As a feature of `datasets`, it would be decoded and encoded by other libraries. Names of files are relative to the
    table of the training rows, as in the folders of `datasets`.

    Args:
        dataset: rows with canonical columns.
        task: their task.
        column: canonical name of the column.
        what: what the files are, in the plural.
        mend: builder that a message recommends.

    Raises:
        TaskError: the column holds neither files nor names of files, or a stranger's table names one elsewhere.
    """
    from datasets import Value

    feature = dataset.features[column]
    if not isinstance(feature, Value):
        return dataset.cast_column(column, stored_feature())
    if feature.dtype not in ("string", "large_string"):
        raise TaskError(
            f'Task "{task.name}": the column "{task.columns[column]}" holds {feature.dtype}, not {what}; give names of '
            f"files, or use the builder {mend}."
        )
    table = data_files(task, "train")[0] if task.data.files else str(task.folder / "table")
    return stored_paths(dataset, column, _paths(dataset, task, column, Path(table).parent))


def stored_paths(dataset: Dataset, column: str, paths: Sequence[str | None]) -> Dataset:
    """Data set whose column holds files by their paths."""
    files = [None if path is None else {"bytes": None, "path": path} for path in paths]
    return dataset.remove_columns(column).add_column(column, files, feature=stored_feature())


def stored_feature() -> dict[str, Any]:
    """Feature of a column of files that `datasets` hands out as they are."""
    from datasets import Value

    return {"bytes": Value("binary"), "path": Value("string")}


def file_states(dataset: Dataset, columns: Sequence[str]) -> list[list[int]]:
    """Size and time of the files that columns name, which may change while their names stay."""
    found = []
    for column in columns:
        for value in dataset[column][:]:
            if value is not None and value["bytes"] is None and value["path"] and os.path.isfile(value["path"]):
                state = os.stat(value["path"])
                found.append([state.st_size, state.st_mtime_ns])
    return found


def is_missing(value: Any) -> bool:
    """Test whether a cell holds no file."""
    return value is None or (value["bytes"] is None and not value["path"])


def file_name(value: Any, what: str) -> str:
    """Name by which messages call a stored file."""
    return value["path"] or f"{what} of {len(value['bytes'])} bytes"


def _paths(dataset: Dataset, task: Task, column: str, folder: Path) -> list[str | None]:
    found: list[str | None] = []
    for name in dataset[column][:]:
        path = Path(name).expanduser() if isinstance(name, str) and name.strip() else None
        # the table may be a stranger's, and must not lead out of its folder
        if path is not None and task.foreign and (path.is_absolute() or ".." in path.parts):
            raise TaskError(f'Task "{task.name}": the file "{name}" lies outside of the folder that it came with.')
        found.append(None if path is None else str(folder / path))
    return found
