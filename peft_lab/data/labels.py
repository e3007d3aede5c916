"""Labels of rows: names and numbers of classes, values of a regression, and what is refused as neither."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peft_lab.data.data_source import FOLDER_BUILDERS
from peft_lab.data.row_checks import RowFault, numbered, source_rows
from peft_lab.data.row_maps import map_rows
from peft_lab.data.task_schema import Task
from peft_lab.errors import TaskError, did_you_mean
from peft_lab.registry import kind_info

if TYPE_CHECKING:
    from datasets import Dataset

#: More names than this, and the column is one of texts and not of labels.
MAX_LABELS = 1000

_WHOLE = re.compile(r"-?(0|[1-9][0-9]*)")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def is_missing(value: Any) -> bool:
    """Test whether a cell holds no label: null, not a number, or a blank text."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def faults(dataset: Dataset, task: Task) -> list[RowFault]:
    """Rows without a label."""
    from datasets import ClassLabel

    if "label" not in dataset.column_names:
        return []
    missing = [row for row, value in enumerate(dataset["label"][:]) if is_missing(value)]
    if isinstance(dataset.features["label"], ClassLabel):
        # datasets writes a missing class as -1
        missing = [row for row, value in enumerate(dataset["label"][:]) if value is None or value < 0]
    return [RowFault(f'have no label in column "{task.columns["label"]}"', missing)]


def names_of(task: Task, train: Dataset, skip: Collection[int] = ()) -> tuple[str, ...] | None:
    """Label names in the order of the model's outputs; None without classes.

    They are the task's, else those that the data declares, else the sorted values of the train rows; numbers are sorted
    by size.

    Args:
        task: the task.
        train: all rows of train.
        skip: positions of rows that do not count.

    Raises:
        TaskError: the column does not hold one class a row.
    """
    from datasets import ClassLabel

    if "label" not in train.column_names or task.problem_type == "regression":
        return None
    feature = train.features["label"]
    if isinstance(feature, ClassLabel):
        return _declared(task, feature)
    if task.labels:
        return task.labels
    _check_type(task, feature)
    column = train["label"][:]
    values = [str(value) for row, value in enumerate(column) if row not in skip and not is_missing(value)]
    counts = Counter(values)
    _check_values(task, counts, column)
    if len(counts) < 2 or len(counts) > MAX_LABELS:
        raise TaskError(
            f'Task "{task.name}": the label column has {len(counts)} different values, which is no classification; '
            f"name another column{_or_regression(task)}."
        )
    whole = all(_WHOLE.fullmatch(value) for value in counts)
    return tuple(sorted(counts, key=int if whole else None))


def _declared(task: Task, feature: Any) -> tuple[str, ...]:
    """Names of a column that declares its classes."""
    # the classes of folders are matched by name, all others by position
    by_position = task.data.builder not in FOLDER_BUILDERS
    if task.labels and set(task.labels) == set(feature.names) and list(task.labels) != feature.names:
        if by_position:
            raise TaskError(f'Task "{task.name}": the data has the labels in this order: {", ".join(feature.names)}.')
    elif task.labels and len(task.labels) != feature.num_classes and by_position:
        raise TaskError(f'Task "{task.name}" names {len(task.labels)} labels, the data {feature.num_classes}.')
    return task.labels or tuple(feature.names)


def _or_regression(task: Task) -> str:
    can = "problem_type" in kind_info(task.kind).settings
    return ', or set "problem_type: regression"' if can else ""


def _check_type(task: Task, feature: Any) -> None:
    """Raise `TaskError` for a column of lists, dates and other values that are no names."""
    held = str(getattr(feature, "dtype", type(feature).__name__))
    if held.startswith(("float", "double", "halffloat")):
        raise TaskError(
            f'Task "{task.name}": the label column holds fractional numbers ({held}), which are no classes; name '
            f'another column{_or_regression(task)}; if they are classes, list them in "labels".'
        )
    if not held.startswith(("string", "large_string", "int", "uint", "bool", "null")):
        raise TaskError(
            f'Task "{task.name}": the label column holds {held}, and a label is one text or whole number a row.'
        )


def _check_values(task: Task, counts: Mapping[str, int], column: Sequence[Any]) -> None:
    """Raise `TaskError` for values that are no names of classes, unless the task lists them."""

    def refuse(values: Sequence[str], why: str, mend: str) -> None:
        wrong = set(values)
        rows = [row for row, value in enumerate(column) if str(value) in wrong]
        raise TaskError(
            f'Task "{task.name}": {len(rows)} of {len(column)} train rows have a label {why} ({numbered(rows)}; the '
            f'first is "{column[rows[0]]}"); {mend}, or list the names in "labels" if they are meant.'
        )

    spaced = [value for value in counts if value != value.strip()]
    if spaced:
        refuse(spaced, "with a space at its edge", "remove the spaces")
    fractions = [value for value in counts if _NUMBER.fullmatch(value) and not value.lstrip("+-").isdigit()]
    if fractions and all(_NUMBER.fullmatch(value) for value in counts):
        refuse(fractions, "that is a fractional number", f"name another column{_or_regression(task)}")
    several = combinations(counts)
    if several:
        mark, joined = several
        mend = f'set "kind: multi_label" and "label_separator: \'{mark}\'" if a row may have several labels'
        refuse(joined, "that joins other labels", mend)


def combinations(names: Collection[str]) -> tuple[str, list[str]] | None:
    """Separator, and the names that are lists of labels: each part of them is a part of another name too.

    None if no name is such a list.
    """
    for separator in ",;|":
        parts = {name: re.split(rf"\s*{re.escape(separator)}\s*", name) for name in names}
        uses: Counter[str] = Counter()
        for found in parts.values():
            uses.update(set(found))
        joined = [name for name, found in parts.items() if len(found) > 1 and min(map(uses.__getitem__, found)) > 1]
        if joined:
            return separator, joined
    return None


def encode(task: Task, split: str, dataset: Dataset, labels: tuple[str, ...] | None, skip: Collection[int]) -> Dataset:
    """Data set with `label` as a `ClassLabel` over `labels`, or as float32.

    Rows in `skip` are going to be dropped, and get none.

    Raises:
        TaskError: a label is not one of `labels`, or is no number.
    """
    from datasets import ClassLabel, Value

    if "label" not in dataset.column_names:
        return dataset
    column = dataset["label"][:]
    given = {value for row, value in enumerate(column) if row not in skip and isinstance(value, Hashable)}
    feature = Value("float32") if labels is None else ClassLabel(names=list(labels))
    find = _number_of(dataset) if labels is None else _index_of(task, dataset, labels)
    known = {value: find(value) for value in given}
    wrong = [row for row, value in enumerate(column) if row not in skip and known.get(value) is None]
    if wrong:
        _refuse(task, split, dataset, wrong, labels)

    def encoded(values: list[Any]) -> dict[str, list[Any]]:
        return {"label": [known.get(value) for value in values]}

    # without features, map would infer the type, and the labels would have the old names or none
    features = dataset.features.copy()
    features["label"] = feature
    reads = [sorted((str(value), type(value).__name__, str(index)) for value, index in known.items()), labels]
    options = {"input_columns": "label", "batched": True, "features": features, "desc": f"Labels of {split}"}
    return map_rows(dataset, encoded, reads, **options)


def _number_of(dataset: Dataset) -> Callable[[Any], float | None]:
    """Function from a value of the label column to a float32; None for what is no finite number."""
    import numpy as np

    def find(value: Any) -> float | None:
        if isinstance(value, bool) or (isinstance(value, str) and not _NUMBER.fullmatch(value.strip())):
            return None
        try:
            with np.errstate(over="ignore"):
                number = np.float32(value)
        except (TypeError, ValueError):
            return None
        return float(number) if np.isfinite(number) else None

    return find


def _index_of(task: Task, dataset: Dataset, labels: Sequence[str]) -> Callable[[Any], int | None]:
    """Function from a value of the label column to its class; None for a value that is none.

    Whole numbers are positions unless they are names of labels.
    """
    from datasets import ClassLabel

    feature, position = dataset.features["label"], {name: index for index, name in enumerate(labels)}
    by_name = not task.labels or task.data.builder in FOLDER_BUILDERS
    if isinstance(feature, ClassLabel):
        if by_name:
            return lambda value: position.get(feature.names[value]) if value is not None and value >= 0 else None
        return lambda value: value if value is not None and 0 <= value < len(labels) else None
    if task.streaming:
        return index_of_value(labels)
    values = [value for value in dataset.unique("label") if not is_missing(value)]
    numbers = {value: _whole(value) for value in values}
    # whole numbers may be names too: ratings from 1 to 5 are no positions
    if by_name or None in numbers.values() or all(str(value) in position for value in values):
        return lambda value: position.get(str(value))
    known = {value: number for value, number in numbers.items() if number is not None and 0 <= number < len(labels)}
    return known.get


def index_of_value(labels: Sequence[str]) -> Callable[[Any], int | None]:
    """Function from a label to its class that looks at no other row, because a stream has not read them all.

    A whole number is a position unless there are names that are whole numbers.
    """
    position = {name: index for index, name in enumerate(labels)}
    by_name = any(_whole(name) is not None for name in labels)

    def find(value: Any) -> int | None:
        if is_missing(value):
            return None
        number = None if by_name else _whole(value)
        inside = number is not None and 0 <= number < len(labels)
        return position.get(str(value), number if inside else None)

    return find


def _whole(value: Any) -> int | None:
    """Whole number that a value is, or that it is the text of; None for others."""
    if isinstance(value, str):
        return int(value) if _WHOLE.fullmatch(value) else None
    return int(value) if isinstance(value, int) else None


def _refuse(task: Task, split: str, dataset: Dataset, wrong: Sequence[int], labels: tuple[str, ...] | None) -> None:
    first = dataset["label"][wrong[0]]
    count = f"{len(wrong)} of {len(dataset)} {split} rows"
    wrong = source_rows(dataset, wrong)
    if labels is None:
        raise TaskError(
            f'Task "{task.name}": {count} have a label that is no finite number ({numbered(wrong)}; the first is '
            f'"{first}"); a regression needs numbers such as 2.5.'
        )
    shown = ", ".join(labels[:12]) + (", ..." if len(labels) > 12 else "")
    hint = did_you_mean(first, labels) if isinstance(first, str) else ""
    raise TaskError(
        f'Task "{task.name}": label "{first}" of the {split} rows is not one of {shown} ({count}: '
        f"{numbered(wrong)}).{hint}"
    )
