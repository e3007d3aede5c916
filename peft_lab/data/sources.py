"""Sources of a task's rows: local files or the Hub, read whole or as a stream."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from peft_lab.data import foreign_files, read_files
from peft_lab.data.data_source import FOLDER_BUILDERS
from peft_lab.data.file_folders import read_folders
from peft_lab.data.row_preparation import check_columns
from peft_lab.data.task_registry import data_files
from peft_lab.data.task_schema import Task
from peft_lab.errors import TaskError

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

#: Builders whose cells are read here and not by `datasets`.
_OWN = ("csv", "json", "text")


@dataclass(frozen=True)
class Part:
    """Part of the rows of a stream, which one process or worker reads.

    Attributes:
        task, split: whose rows they are.
        name: file, or shard of a data set, as messages call it.
        source: path of a file, or a shard that `datasets` streams.
        start: number of its first rows that are left out.
    """

    task: Task
    split: str
    name: str
    source: Any
    start: int = 0

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Rows with their names, such as `17 of reviews.csv`; numbers count from 1."""
        data = self.task.data
        with _reading(self.task, self.split):
            local = isinstance(self.source, str)
            rows = read_files.stream_rows(data.builder, self.source, data.options) if local else iter(self.source)
            for number, row in enumerate(islice(rows, self.start, None), start=self.start + 1):
                yield f"{number} of {self.name}", row


def open_parts(task: Task, split: str) -> tuple[list[Part], Features | None]:
    """Parts of a split that is streamed, and the features of its rows; None where every cell is a text.

    Raises:
        TaskError: the data cannot be had.
    """
    import datasets

    data = task.data
    with _reading(task, split):
        if data.path:
            _check_hub_name(task)
            revision = data.revision or None
            source = task.splits[split]
            return _shards(
                task,
                split,
                datasets.load_dataset(data.path, data.name or None, revision=revision, split=source, streaming=True),
            )
        files = _files(task, split)
        if data.builder == "webdataset":
            found = datasets.load_dataset("webdataset", data_files={split: files}, split=split, streaming=True)
            return _shards(task, split, found)
        parts = [Part(task, split, os.path.basename(file), file) for file in files]
        return parts, None if data.builder in _OWN else _parquet_features(files[0])


def _shards(task: Task, split: str, stream: IterableDataset) -> tuple[list[Part], Features | None]:
    from datasets import Audio, Image

    if stream.features is None:
        stream = stream._resolve_features()
    features = stream.features
    check_columns(task, split, list(features))
    columns = sorted(set(task.columns.values()))
    stream = stream.select_columns(columns)
    for name in columns:
        # a file is not decoded until it is used, because the rows wait in the shuffle buffer
        if isinstance(features[name], Image | Audio):
            stream = stream.cast_column(name, type(features[name])(decode=False))
    count = stream.num_shards
    files = task.data.files.get(split, ())
    whole = files[0] if len(files) == 1 else ""
    names = [os.path.basename(whole) if whole and count == 1 else f"shard {index + 1}" for index in range(count)]
    parts = [Part(task, split, name, stream.shard(count, index)) for index, name in enumerate(names)]
    return parts, type(features)({name: features[name] for name in columns})


def take(parts: list[Part], count: int | None) -> tuple[list[tuple[str, dict[str, Any]]], list[Part]]:
    """First rows of parts, with their names, and the parts without these rows; all rows without a count."""
    taken: list[tuple[str, dict[str, Any]]] = []
    for position, part in enumerate(parts):
        left = None if count is None else count - len(taken)
        rows = list(islice(part.rows(), left))
        taken += rows
        if left is not None and len(rows) == left:
            return taken, [replace(part, start=part.start + left), *parts[position + 1 :]]
    return taken, []


def identity(task: Task, split: str) -> list[Any]:
    """Values that name the rows of a stream without reading them: files with their sizes, or a data set of the Hub."""
    data = task.data
    if data.path:
        return [data.path, data.name, data.revision, task.splits[split]]
    files = data_files(task, split)
    return [data.builder, dict(data.options), [[os.path.basename(file), os.path.getsize(file)] for file in files]]


def _parquet_features(file: str) -> Features:
    import pyarrow.parquet as pq
    from datasets import Features

    return Features.from_arrow_schema(pq.read_schema(file))


def _files(task: Task, split: str) -> list[str]:
    files = data_files(task, split)
    if task.foreign:
        foreign_files.check_files(task, files)
    return files


@contextmanager
def _reading(task: Task, split: str) -> Iterator[None]:
    """Turn errors of a reader into a `TaskError`."""
    import datasets

    try:
        yield
    # a TaskError is a ValueError too, and says already what is wrong
    except TaskError:
        raise
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        data = task.data
        where = f'"{data.path}" of the Hub' if data.path else f"the {data.builder} files"
        # datasets wraps the error of its reader, which names the cause
        reason = " ".join(str(error.__cause__ or error).split())
        raise TaskError(f'Task "{task.name}": the {split} data cannot be read from {where}: {reason}') from error


def read(task: Task, split: str) -> Dataset:
    """All rows of one split, with the columns of the source.

    Raises:
        TaskError: the data cannot be had.
    """
    import datasets

    data, source = task.data, task.splits[split]
    with _reading(task, split):
        if data.path:
            _check_hub_name(task)
            return datasets.load_dataset(data.path, data.name or None, revision=data.revision or None, split=source)
        files = _files(task, split)
        if data.builder in _OWN:
            rows = read_files.read_rows(data.builder, files, data.options)
            names = read_files.column_names(rows)
            if not rows:
                raise TaskError(
                    f'Task "{task.name}": "{files[0]}" has no rows of the {split} data; fill it, or name another.'
                )
            check_columns(task, split, names)
            return read_files.as_dataset(rows, sorted(set(task.columns.values())))
        if data.builder in FOLDER_BUILDERS:
            return read_folders(data.builder, files, split)
        return datasets.load_dataset(data.builder, data_files={split: files}, split=split, **data.options)


def _check_hub_name(task: Task) -> None:
    """Refuse the name of a data set that `datasets` would find in the working directory.

    It looks for a folder of that name first, and takes the name of one of its builders for the builder.
    """
    name = task.data.path
    is_builder = name.isidentifier() and importlib.util.find_spec(f"datasets.packaged_modules.{name}") is not None
    if os.path.exists(name) or is_builder:
        raise TaskError(
            f'Task "{task.name}": "{name}" stands for a data set of the Hub, but means a builder or a folder of the '
            'working directory here; work in another folder, or give "builder" and "files" for local files.'
        )
