"""Lists of labels, one for each row: columns of lists, and texts of names with a separator between them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from peft_lab.data.labels import MAX_LABELS
from peft_lab.data.row_checks import RowFault, numbered, source_rows
from peft_lab.data.row_maps import map_rows
from peft_lab.errors import TaskError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset

    from peft_lab.data.task_schema import Task

#: Canonical column, also the argument of a model's forward.
COLUMN = "labels"

_WHOLE = re.compile(r"-?(0|[1-9][0-9]*)")
#: Counts up when the same cells are read otherwise, because `datasets` keeps what was read.
_VERSION = 1
#: Separators that a message proposes, if a cell has them.
_SEPARATORS = (";", "|", ",")


def cast(dataset: Dataset, task: Task, separator: str) -> Dataset:
    """Cast the column to lists of names; a missing cell stays None, and an empty text is an empty list.

    Args:
        dataset: rows with the canonical column.
        task: their task; where it lists its labels, whole numbers are positions among them, unless labels are numbers.
        separator: between the names of a cell of text; empty for columns of lists.

    Raises:
        TaskError: the column holds something else, or texts without a separator to part them at.
    """
    from datasets import Sequence as ListOf
    from datasets import Value

    feature = dataset.features[COLUMN]
    entry = getattr(feature, "feature", None)
    named = _split_at(dataset, task, feature, separator) if entry is None else _names_of_entries(task, entry, separator)

    def names(values: list[Any]) -> dict[str, list[Any]]:
        return {COLUMN: [None if value is None else named(value) for value in values]}

    features = dataset.features.copy()
    features[COLUMN] = ListOf(Value("string"))
    reads = [_VERSION, separator, list(task.labels), str(feature)]
    return map_rows(dataset, names, reads, input_columns=COLUMN, batched=True, features=features, desc="Labels")


def _split_at(dataset: Dataset, task: Task, feature: Any, separator: str) -> Callable[[Any], list[Any]]:
    """Function from a cell of text to the names in it."""
    source, held = task.columns[COLUMN], str(getattr(feature, "dtype", type(feature).__name__))
    if not held.startswith(("string", "large_string", "null")):
        raise TaskError(
            f'Task "{task.name}": the column "{source}" holds {held}; the labels of a row are a list of names, or one '
            "text with a separator between the names."
        )
    if not separator:
        cells = "".join(cell for cell in dataset[COLUMN][:1000] if cell)
        seen = next((mark for mark in _SEPARATORS if mark in cells), ";")
        raise TaskError(
            f'Task "{task.name}": the column "{source}" holds texts, and not lists; say what stands between the names '
            f"of a cell, such as \"label_separator: '{seen}'\"."
        )

    positions = _positions(task)

    def split(cell: str) -> list[str]:
        names = [name.strip() for name in cell.split(separator)] if cell.strip() else []
        return [positions.get(name, name) for name in names]

    return split


def _names_of_entries(task: Task, entry: Any, separator: str) -> Callable[[Any], list[Any]]:
    """Function from a list of a cell to names."""
    from datasets import ClassLabel

    source, held = task.columns[COLUMN], str(getattr(entry, "dtype", type(entry).__name__))
    if separator:
        raise TaskError(
            f'Task "{task.name}": the column "{source}" holds lists, in which "label_separator" has no meaning; '
            "remove it."
        )
    if not held.startswith(("string", "large_string", "int", "uint", "null")):
        raise TaskError(f'Task "{task.name}": the lists in column "{source}" hold {held}, not names.')
    declared = dict(enumerate(entry.names)) if isinstance(entry, ClassLabel) else _positions(task)

    def named(values: list[Any]) -> list[str | None]:
        return [None if value is None else declared.get(value, str(value)) for value in values]

    return named


def _positions(task: Task) -> dict[Any, str]:
    """Label of each position, as a number and as a text; empty where a label is a whole number itself."""
    if any(_WHOLE.fullmatch(label) for label in task.labels):
        return {}
    numbers = dict(enumerate(task.labels))
    return numbers | {str(number): label for number, label in numbers.items()}


def faults(dataset: Dataset, task: Task) -> list[RowFault]:
    """Rows without a list or with a blank name in it; those that are empty or name a label twice are a remark."""
    source, column = task.columns[COLUMN], dataset[COLUMN][:]
    there = [(row, names) for row, names in enumerate(column) if names is not None]
    return [
        RowFault(f'have no value in column "{source}"', [row for row, names in enumerate(column) if names is None]),
        RowFault(f'have a blank label in column "{source}"', [row for row, names in there if _has_blank(names)]),
        RowFault(f'have no label in column "{source}"', [row for row, names in there if not names], "remark"),
        RowFault(
            f'name a label twice in column "{source}", which counts once',
            [row for row, names in there if len(set(names)) < len(names)],
            "remark",
        ),
    ]


def _has_blank(names: Sequence[str | None]) -> bool:
    return any(name is None or not name.strip() for name in names)


def names_of(task: Task, train: Dataset, skip: Collection[int] = ()) -> tuple[str, ...]:
    """Label names in the order of the model's outputs: those of the task, else of the train rows, sorted.

    Names that are all whole numbers are sorted by size.

    Args:
        task: the task.
        train: all rows of train, cast.
        skip: positions of rows that do not count.

    Raises:
        TaskError: there are fewer than two, or so many that the column is one of texts.
    """
    if task.labels:
        return task.labels
    if task.streaming:
        raise TaskError(f'Task "{task.name}": a stream does not know all labels of its rows; list them in "labels".')
    found: set[str] = set()
    for row, names in enumerate(train[COLUMN][:]):
        if row not in skip:
            found.update(names)
    if not 2 <= len(found) <= MAX_LABELS:
        raise TaskError(
            f'Task "{task.name}": the column "{task.columns[COLUMN]}" has {len(found)} different labels; name another '
            'column, or list the names in "labels" if they are meant.'
        )
    spaced = sorted(name for name in found if name != name.strip())
    if spaced:
        raise TaskError(
            f'Task "{task.name}": the label "{spaced[0]}" of the train rows has a space at its edge; remove the '
            'spaces, or list the names in "labels" if they are meant.'
        )
    whole = all(_WHOLE.fullmatch(name) for name in found)
    return tuple(sorted(found, key=int if whole else None))


def encode(task: Task, split: str, dataset: Dataset, labels: Sequence[str], skip: Collection[int]) -> Dataset:
    """Data set whose lists hold numbers of `labels` as `ClassLabel`, sorted, each once.

    Rows in `skip` are going to be dropped, and get an empty list.

    Raises:
        TaskError: a name is not one of `labels`.
    """
    from datasets import ClassLabel
    from datasets import Sequence as ListOf

    number = {name: index for index, name in enumerate(labels)}
    wrong: dict[int, str] = {}
    for row, names in enumerate(dataset[COLUMN][:]):
        unknown = next((name for name in names or () if name not in number), None)
        if unknown is not None and row not in skip:
            wrong[row] = unknown
    if wrong:
        _refuse(task, split, dataset, wrong, labels)

    def numbers(values: list[Any]) -> dict[str, list[Any]]:
        sets = [set(names or ()) & number.keys() for names in values]
        return {COLUMN: [sorted(map(number.__getitem__, names)) for names in sets]}

    features = dataset.features.copy()
    features[COLUMN] = ListOf(ClassLabel(names=list(labels)))
    options = {"input_columns": COLUMN, "batched": True, "features": features, "desc": f"Labels of {split}"}
    return map_rows(dataset, numbers, list(labels), **options)


def _refuse(task: Task, split: str, dataset: Dataset, wrong: dict[int, str], labels: Sequence[str]) -> None:
    first, rows = next(iter(wrong.values())), source_rows(dataset, list(wrong))
    shown = ", ".join(labels[:12]) + (", ..." if len(labels) > 12 else "")
    raise TaskError(
        f'Task "{task.name}": label "{first}" of the {split} rows is not one of {shown} ({len(wrong)} of '
        f"{len(dataset)} rows: {numbered(rows)}).{did_you_mean(first, labels)}"
    )


def most_frequent(lists: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Set of labels that most rows have; of equally frequent ones the first in order."""
    counts = Counter(tuple(sorted(names)) for names in lists)
    return min(counts, key=lambda names: (-counts[names], names))
