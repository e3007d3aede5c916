"""Columns with a number for each row, which a method reads beside the row's inputs, such as its quality.

Their names are those that a method's card lists as `row_columns`; the adapter declares them as row inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from peft_lab.data.row_checks import keep_source_rows, numbered, source_rows
from peft_lab.data.task_schema import Task
from peft_lab.errors import ConfigError, TaskError

if TYPE_CHECKING:
    from datasets import Dataset

_NUMBERS = ("int", "uint", "float", "bool", "decimal", "string", "large_str")


def numbers(task: Task, name: str, split: str, dataset: Dataset) -> list[float]:
    """Numbers of the column that a task names for a purpose.

    Raises:
        TaskError: the column can hold no numbers, or a row has no finite one.
    """
    from datasets import Value

    column = task.columns[name]
    feature = dataset.features[column]
    # cells of a CSV file are texts
    if not isinstance(feature, Value) or not feature.dtype.startswith(_NUMBERS):
        held = getattr(feature, "dtype", type(feature).__name__)
        raise TaskError(
            f'Task "{task.name}": the column "{column}" of the {split} data is the {name} of each row, so it must hold '
            f"numbers, not {held}."
        )
    values = [_number(value) for value in dataset[column][:]]
    missing = [row for row, value in enumerate(values) if not math.isfinite(value)]
    if missing:
        raise TaskError(
            f'Task "{task.name}": {len(missing)} {split} rows have no number in column "{column}", the {name} of each '
            f"row ({numbered(source_rows(dataset, missing))} of {len(values)}); give each row one."
        )
    return values


def _number(value: Any) -> float:
    """Number in a cell; NaN if there is none."""
    try:
        return math.nan if value is None else float(value)
    except ValueError:
        return math.nan


def declared(model: Any) -> dict[str, Any]:
    """Row inputs of the active adapter of a model by the columns that they read."""
    config: Any = getattr(model, "active_peft_config", None)
    inputs = config.row_inputs() if hasattr(config, "row_inputs") else ()
    return {spec.column: spec for spec in inputs if spec.column is not None}


def unread(dataset: Dataset, model: Any, task: Task) -> list[str]:
    """Columns of numbers in a data set that the active adapter does not read.

    Raises:
        ConfigError: the adapter reads a column that the task does not name.
    """
    wanted = declared(model)
    missing = sorted(wanted.keys() - {*dataset.column_names})
    if missing:
        raise ConfigError(
            f'The adapter reads the column "{missing[0]}", which task "{task.name}" does not name: add '
            f'"{missing[0]}: COLUMN" to its columns.'
        )
    return [name for name in task.number_columns if name in dataset.column_names and name not in wanted]


def as_declared(dataset: Dataset, model: Any, task: Task) -> Dataset:
    """Data set whose numbers are integers where the active adapter reads integers.

    Raises:
        ConfigError: a row has a fraction there.
    """
    for name, spec in declared(model).items():
        if not spec.dtype.startswith("int"):
            continue
        values = dataset[name][:]
        broken = [row for row, value in enumerate(values) if not float(value).is_integer()]
        if broken:
            raise ConfigError(
                f'Task "{task.name}": {len(broken)} rows have a fraction in column "{task.columns[name]}", and the '
                f"{name} that the adapter reads is a whole number ({numbered(source_rows(dataset, broken))} of "
                f"{len(values)})."
            )
        plain = dataset.remove_columns(name)
        dataset = keep_source_rows(plain.add_column(name, [int(value) for value in values]), plain)
    return dataset


def numbers_of_inputs(inputs: Sequence[Any], model: Any, task: Task) -> dict[str, list[float]]:
    """Numbers of raw inputs to `predict`, by column; {} if the adapter reads none.

    Raises:
        ConfigError: an input is no mapping with a number, whole where the adapter reads integers, under the column's
            name or the task's.
    """
    found: dict[str, list[float]] = {}
    for name, spec in sorted(declared(model).items()):
        whole = spec.dtype.startswith("int")
        found[name] = []
        for row, value in enumerate(inputs):
            names = [key for key in (name, task.columns.get(name)) if isinstance(value, Mapping) and key in value]
            try:
                number = float(value[names[0]])
                if whole and not number.is_integer():
                    raise ValueError
            except (IndexError, TypeError, ValueError):
                raise ConfigError(
                    f'Input {row + 1} has no {"whole " if whole else ""}number "{name}", which the adapter reads: give '
                    "each input as a mapping with its columns."
                ) from None
            found[name].append(int(number) if whole else number)
    return found


@contextmanager
def given(values: Mapping[str, Sequence[float]]) -> Iterator[None]:
    """Give numbers of rows to the forwards inside the block; does nothing without any."""
    import torch

    from peft_lab.tuners.forward_context import row_inputs

    if not values:
        yield
        return
    with row_inputs(**{name: torch.tensor(list(numbers)) for name, numbers in values.items()}):
        yield
