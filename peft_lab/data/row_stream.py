"""Streamed rows: checked, encoded and preprocessed while they are read."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count, islice
from typing import TYPE_CHECKING, Any

from torch.utils.data import IterableDataset

from peft_lab.data import read_files
from peft_lab.data.row_checks import name_rows
from peft_lab.data.row_preparation import canonical, check_columns, faulty
from peft_lab.data.sources import Part, identity, open_parts, take
from peft_lab.data.task_registry import kind
from peft_lab.data.task_schema import PROMPT_IDS, Task
from peft_lab.errors import TaskError

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger("peft_lab")

#: Rows that are checked and tokenised together. `datasets` needs some milliseconds for each call.
CHUNK = 512
#: Rows that are read before the training, to refuse what is wrong with all rows.
_FIRST = 8

#: A row, and what messages call it.
_Named = tuple[str, dict[str, Any]]


class RowStream(IterableDataset):
    """Endless stream of training rows.

    Each pass over the files has another order, drawn from the seed. Rows are checked as those of a whole data set are;
    a fault names file and row.

    Attributes:
        labels, prompt_values: as of `Splits`.
        identity: values that name the rows without reading them.
    """

    def __init__(self, task: Task, parts: Sequence[Part], features: Any, labels: tuple[str, ...] | None) -> None:
        from datasets import IterableDataset as Stream

        self.task, self.features, self.labels = task, features, labels
        self.prompt_values = task.prompt_values or None
        self.identity = [identity(task, "train"), [part.start for part in parts], task.shuffle_buffer_size]
        self._rows = Stream.from_generator(_named_rows, gen_kwargs={"parts": list(parts)})
        self._prepare: Callable[[Dataset], Dataset] | None = None
        self._said: Counter[str] = Counter()

    def shuffled(self, seed: int) -> RowStream:
        """Stream whose order is drawn from a seed: that of the files, and of rows within the buffer."""
        return self._with(_rows=self._rows.shuffle(seed=seed, buffer_size=self.task.shuffle_buffer_size))

    def of_process(self, index: int, processes: int) -> RowStream:
        """Rows of one process: whole files where their number allows it, else every so many-th row."""
        from datasets.distributed import split_dataset_by_node

        return self._with(_rows=split_dataset_by_node(self._rows, index, processes))

    def preprocessed(self, prepare: Callable[[Dataset], Dataset]) -> RowStream:
        """Stream whose rows a function prepares for the model, some hundreds at a time."""
        return self._with(_prepare=prepare)

    def _with(self, **changes: Any) -> RowStream:
        found = copy.copy(self)
        vars(found).update(changes)
        return found

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for passed in count():
            self._rows.set_epoch(passed)
            rows, read, given = iter(self._rows), 0, 0
            while chunk := [(row["place"], row["row"]) for row in islice(rows, CHUNK)]:
                read += len(chunk)
                for row in self._prepared(chunk):
                    given += 1
                    yield row
            if not read:  # a worker without a file of its own
                return
            if not given:
                raise TaskError(f'Task "{self.task.name}": no row of the train data is left.')

    def _prepared(self, chunk: Sequence[_Named]) -> Sequence[dict[str, Any]]:
        with _quiet(self._said):
            rows, names = as_rows(self.task, "train", chunk, self.features, self.labels)
            if not names or self._prepare is None:
                return rows
            return self._prepare(name_rows(rows, names))


def open_stream(task: Task) -> tuple[RowStream, dict[str, Dataset]]:
    """Stream of the training rows of a task, and its validation and test rows, which are read now.

    Raises:
        TaskError: the data cannot be had, a column or the names of the labels are missing, or a row has a fault.
    """
    parts, features = open_parts(task, "train")
    if PROMPT_IDS in task.columns and not task.prompt_values:
        raise TaskError(f'Task "{task.name}": a stream does not know all values of its rows; list "prompt_values".')
    read: dict[str, tuple[list[_Named], Any]] = {}
    # test rows first, and even if nobody asks: train must be the same with and without them
    for split, number in (("test", task.test_rows), ("validation", task.validation_rows)):
        if split in task.splits:
            own, own_features = open_parts(task, split)
            read[split] = take(own, number)[0], own_features
        elif number is not None:
            rows, parts = take(parts, number)
            read[split] = rows, features
    first, _ = take(parts, _FIRST)
    if not first:
        raise TaskError(
            f'Task "{task.name}": the train data has no rows beside those of validation and test; lower '
            '"validation_rows" or "test_rows".'
        )
    # the rows themselves are checked once they are trained on
    labels = _labels(task, canonical(task, "train", data_set(task, "train", first, features)))
    found = {split: as_rows(task, split, *rows, labels)[0] for split, rows in read.items()}
    for split, rows_of_split in found.items():
        if len(rows_of_split) == 0:
            raise TaskError(f'Task "{task.name}": no row of the {split} data is left.')
    _warn_of_classes(task, found["validation"], labels)
    return RowStream(task, parts, features, labels), found


def as_rows(
    task: Task, split: str, chunk: Sequence[_Named], features: Any, labels: tuple[str, ...] | None
) -> tuple[Dataset, list[str]]:
    """Checked rows with encoded labels, and their names.

    Raises:
        TaskError: a row has a fault, and the task does not say what to do about it.
    """
    names = [name for name, _ in chunk]
    rows = name_rows(data_set(task, split, chunk, features), names)
    rows = name_rows(canonical(task, split, rows), names)
    dropped = faulty(task, split, rows)
    rows = kind(task.kind).encode_labels(task, split, rows, labels, dropped)
    kept = [row for row in range(len(rows)) if row not in dropped]
    return rows.select(kept), [names[row] for row in kept]


def _named_rows(parts: Sequence[Part]) -> Iterator[dict[str, Any]]:
    for part in parts:
        for name, row in part.rows():
            yield {"place": name, "row": row}


def data_set(task: Task, split: str, chunk: Sequence[_Named], features: Any) -> Dataset:
    """Data set of the task's columns of some rows of a stream.

    `features` are those of the source; None where every cell is a text.
    """
    from datasets import Dataset

    rows, columns = [row for _, row in chunk], sorted(set(task.columns.values()))
    if features is None:
        check_columns(task, split, read_files.column_names(rows))
        return read_files.in_memory(rows, columns)
    check_columns(task, split, list(features))
    cells: dict[str, list[Any]] = {}
    types: dict[str, Any] = {}
    for name in columns:
        cells[name] = [row[name] for row in rows]
        types[name] = features[name]
    return Dataset.from_dict(cells, features=type(features)(types))


def _labels(task: Task, first: Dataset) -> tuple[str, ...] | None:
    from datasets import ClassLabel

    declared = "label" in first.column_names and isinstance(first.features["label"], ClassLabel)
    if task.has_classes and not declared and not task.labels:
        raise TaskError(f'Task "{task.name}": a stream does not know all labels of its rows; list them in "labels".')
    return kind(task.kind).class_names(task, first)


def _warn_of_classes(task: Task, validation: Dataset, labels: tuple[str, ...] | None) -> None:
    if labels is None or not task.has_classes:
        return
    there = len(set(validation["label"][:]))
    if there < len(labels):
        logger.warning(
            'Task "%s": the %d validation rows have %d of the %d classes; they are the first of the data, which may be '
            "sorted: shuffle the files.",
            task.name,
            len(validation),
            there,
            len(labels),
        )


@contextmanager
def _quiet(said: Counter[str]) -> Iterator[None]:
    """Say a warning of a chunk at its 1st, 2nd, 4th, 8th, ... time alone, and show no bar for each chunk."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    def wanted(record: logging.LogRecord) -> bool:
        said[str(record.msg)] += 1
        times = said[str(record.msg)]
        return times & (times - 1) == 0

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)
        if shown:
            enable_progress_bars()
