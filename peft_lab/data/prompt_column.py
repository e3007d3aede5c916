"""Prompts that each row asks for, by its column `prompt_ids`.

The values are texts in a data set and become numbers, which the adapter reads.

A method that chooses prompts by row has a config field `prompt_values`, which keeps the values in the order of its sets
of prompts, and a method `ids_of_values`, which maps by it. So an adapter maps later as it did in training.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peft_lab.data import number_columns
from peft_lab.data.row_checks import keep_source_rows, numbered, source_rows
from peft_lab.data.task_schema import PROMPT_IDS, Task, row_columns
from peft_lab.errors import ConfigError, TaskError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger("peft_lab")

#: More sets of prompts than this, and the column is one of texts or numbers and not of kinds of row.
MAX_VALUES = 1000


def texts(task: Task, split: str, dataset: Dataset) -> list[str]:
    """Values of the column that chooses prompts, as texts.

    Those of a `ClassLabel` are its names.

    Raises:
        TaskError: the column holds something else than texts and whole numbers, or a row has no value.
    """
    from datasets import ClassLabel, Value

    column = task.columns[PROMPT_IDS]
    feature, values = dataset.features[column], dataset[column][:]
    if isinstance(feature, ClassLabel):
        # datasets writes a missing class as -1
        names: dict[int | None, str | None] = dict(enumerate(feature.names))
        names |= {-1: None, None: None}
        values = [names[value] for value in values]
    elif not isinstance(feature, Value) or not feature.dtype.startswith(("int", "uint", "string", "large_str", "bool")):
        held = getattr(feature, "dtype", type(feature).__name__)
        raise TaskError(
            f'Task "{task.name}": the column "{column}" of the {split} data chooses prompts, so it must hold texts or '
            f"whole numbers, not {held}."
        )
    missing = [row for row, value in enumerate(values) if value is None or not str(value).strip()]
    if missing:
        raise TaskError(
            f'Task "{task.name}": {len(missing)} {split} rows have no value in column "{column}", which chooses '
            f"prompts ({numbered(source_rows(dataset, missing))} of {len(values)}); give each row one."
        )
    return [str(value) for value in values]


def values_of(task: Task, train: Dataset) -> tuple[str, ...] | None:
    """Values that choose prompts, in the order of the sets of prompts.

    They are the task's own, else those of the train rows, sorted, numbers by size.

    Raises:
        TaskError: a train row has a value that the task does not name, or there are too many of them.
    """
    if PROMPT_IDS not in task.columns:
        return None
    found = train.unique(PROMPT_IDS)
    for value in found if task.prompt_values else ():
        if value not in task.prompt_values:
            raise TaskError(
                f'Task "{task.name}": the value "{value}" of column "{task.columns[PROMPT_IDS]}" is not one of the '
                f"prompt_values {', '.join(task.prompt_values)}.{did_you_mean(value, task.prompt_values)}"
            )
    if len(found) > MAX_VALUES:
        raise TaskError(
            f'Task "{task.name}": the column "{task.columns[PROMPT_IDS]}" has {len(found)} different values, which is '
            f"no choice of prompts: at most {MAX_VALUES}."
        )
    # as texts, 10 would stand before 9
    try:
        return task.prompt_values or tuple(sorted(found, key=int))
    except ValueError:
        return tuple(sorted(found))


def settings(values: Sequence[str] | None) -> dict[str, Any]:
    """Config fields of a method that chooses prompts by row."""
    return {} if values is None else {"prompt_values": list(values)}


def for_model(dataset: Dataset, model: Any, task: Task) -> Dataset:
    """Data set with `prompt_ids` as numbers, as the adapter maps them.

    The column is left out if the adapter chooses no prompts by row, and so is each column of numbers that it does not
    read; numbers are integers where it reads integers.

    Raises:
        ConfigError: a value that the adapter does not know, and it has no default, or a column of numbers that it
            reads is not there, or has a fraction where it reads integers.
    """
    left_out = number_columns.unread(dataset, model, task)
    dataset = dataset.remove_columns(left_out) if left_out else dataset
    dataset = number_columns.as_declared(dataset, model, task)
    ids_of = _mapping(model)
    if PROMPT_IDS not in dataset.column_names:
        if ids_of is not None:
            logger.warning(
                'Task "%s" names no column "%s", so all rows take the default prompts.', task.name, PROMPT_IDS
            )
        return dataset
    plain = dataset.remove_columns(PROMPT_IDS)
    if ids_of is None:
        return plain
    return keep_source_rows(plain.add_column(PROMPT_IDS, ids_of(dataset[PROMPT_IDS][:])), plain)


def check_kept(dataset: Dataset, raw_dataset: Dataset, kind: str, drops: bool = False) -> None:
    """Raise `ConfigError` if `prompt_ids`, or a column of numbers that the adapter reads, does not reach the model.

    All rows would have the same prompts. `drops` says that Trainer removes columns.
    """
    for name in sorted({PROMPT_IDS, *row_columns()} & {*raw_dataset.column_names}):
        if name not in dataset.column_names:
            raise ConfigError(f'The kind "{kind}" does not hand the column "{name}" on to the model.')
    if drops and PROMPT_IDS in raw_dataset.column_names:
        raise ConfigError(f"remove_unused_columns=True would remove {PROMPT_IDS}, which the method reads.")


def ids_of_inputs(inputs: Sequence[Any], model: Any, task: Task) -> list[int] | None:
    """Numbers of the prompts of raw inputs to `predict`.

    An input that is a mapping may have the task's column. None if the adapter chooses no prompts by row.

    Raises:
        ConfigError: a value that the adapter does not know, or none, and it has no default.
    """
    ids_of, names = _mapping(model), (PROMPT_IDS, task.columns.get(PROMPT_IDS))
    if ids_of is None:
        return None
    values: list[str | None] = []
    for row in inputs:
        given = [row[name] for name in names if name in row] if isinstance(row, Mapping) else []
        values.append(None if not given or given[0] is None else str(given[0]))
    return ids_of(values)


def _mapping(model: Any) -> Callable[[Sequence[str | None]], list[int]] | None:
    """Function of the adapter from values to numbers; None without one."""
    config: Any = getattr(model, "active_peft_config", None)
    return config.ids_of_values if getattr(config, "prompt_values", None) else None
