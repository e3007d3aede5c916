"""The prompts that each row of a task asks for: values of its column `prompt_ids`, as texts and then as numbers.

A method that chooses prompts by row has a config field `prompt_values`, which keeps the values in the order of its sets
of prompts, and a method `ids_of_values`, which maps by it. So an adapter maps later as it did in training.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peft_lab.data.task_schema import PROMPT_IDS, Task
from peft_lab.errors import ConfigError, TaskError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger("peft_lab")

#: More sets of prompts than this, and the column is one of texts or numbers and not of kinds of row.
MAX_VALUES = 1000


def texts(task: Task, split: str, rows: Dataset) -> list[str]:
    """The values of the column that chooses prompts, as texts; those of a `ClassLabel` are its names.

    Raises:
        TaskError: the column holds something else than texts and whole numbers, or a row has no value.
    """
    from datasets import ClassLabel, Value

    column = task.columns[PROMPT_IDS]
    feature, values = rows.features[column], rows[column][:]
    if isinstance(feature, ClassLabel):
        values = [None if value is None or value < 0 else feature.names[value] for value in values]
    elif not isinstance(feature, Value) or not feature.dtype.startswith(("int", "uint", "string", "large_str", "bool")):
        kind = getattr(feature, "dtype", type(feature).__name__)
        raise TaskError(
            f'Task "{task.name}": the column "{column}" of the {split} data chooses prompts, so it must hold texts or '
            f"whole numbers, not {kind}."
        )
    missing = sum(value is None for value in values)
    if missing:
        raise TaskError(f'Task "{task.name}": {missing} {split} rows have no value in column "{column}".')
    return [str(value) for value in values]


def values_of(task: Task, train: Dataset) -> tuple[str, ...] | None:
    """The values that choose prompts, in order: the task's own, else those of the train rows, numbers by size.

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
    try:
        return task.prompt_values or tuple(sorted(found, key=int))
    except ValueError:
        return tuple(sorted(found))


def settings(values: Sequence[str] | None) -> dict[str, Any]:
    """What a method that chooses prompts by row has to know of a task, by the name of its config field."""
    return {} if values is None else {"prompt_values": list(values)}


def for_model(rows: Dataset, model: Any, task: Task) -> Dataset:
    """The rows with `prompt_ids` as numbers, as the adapter of a model maps them; without, if it chooses none by row.

    Raises:
        ConfigError: a value that the adapter does not know, and it has no default.
    """
    ids_of = _mapping(model)
    if PROMPT_IDS not in rows.column_names:
        if ids_of is not None:
            logger.warning(
                'Task "%s" names no column "%s", so all rows take the default prompts.', task.name, PROMPT_IDS
            )
        return rows
    plain = rows.remove_columns(PROMPT_IDS)
    return plain if ids_of is None else plain.add_column(PROMPT_IDS, ids_of(rows[PROMPT_IDS][:]))


def check_kept(rows: Dataset, raw: Dataset, kind: str, drops: bool = False) -> None:
    """Raise `ConfigError` if the numbers of `raw` get lost on the way to the model: all rows would look alike."""
    if PROMPT_IDS not in raw.column_names:
        return
    if PROMPT_IDS not in rows.column_names:
        raise ConfigError(f'The kind "{kind}" does not hand the column "{PROMPT_IDS}" on to the model.')
    if drops:
        raise ConfigError(f"remove_unused_columns=True would remove {PROMPT_IDS}, which the method reads.")


def ids_of_inputs(inputs: Sequence[Any], model: Any, task: Task) -> list[int] | None:
    """The prompts of raw inputs to `predict`: a mapping may have the task's column; None if none are chosen by row.

    Raises:
        ConfigError: a value that the adapter does not know, or none, and it has no default.
    """
    ids_of, names = _mapping(model), (PROMPT_IDS, task.columns.get(PROMPT_IDS))
    if ids_of is None:
        return None
    rows = [row if isinstance(row, Mapping) else {} for row in inputs]
    found = [next((row[name] for name in names if name in row), None) for row in rows]
    return ids_of([None if value is None else str(value) for value in found])


def predict(
    kind: Any,
    model: Any,
    processor: Any,
    inputs: Sequence[Any],
    task: Task,
    batch_size: int,
    ids: Sequence[int] | None,
) -> list[Any]:
    """`Kind.predict`, with the prompts `ids` of the inputs given around each batch, if there are any."""
    if ids is None:
        return kind.predict(model, processor, inputs, task, batch_size)
    import torch

    from peft_lab.tuners.forward_context import row_inputs

    found: list[Any] = []
    for start in range(0, len(inputs), batch_size):
        part = slice(start, start + batch_size)
        with row_inputs(**{PROMPT_IDS: torch.tensor(ids[part])}):
            found += kind.predict(model, processor, inputs[part], task, batch_size)
    return found


def _mapping(model: Any) -> Callable[[Sequence[str | None]], list[int]] | None:
    """How the adapter of a model maps values to its prompts; None if it does not."""
    config: Any = getattr(model, "active_peft_config", None)
    return config.ids_of_values if getattr(config, "prompt_values", None) else None
