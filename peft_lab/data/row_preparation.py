"""Rows of a split on their way to a model: columns by their purpose, faults, encoded labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_lab.data import labels as label_column
from peft_lab.data import number_columns, prompt_column
from peft_lab.data.row_checks import rows_to_drop
from peft_lab.data.task_registry import kind
from peft_lab.data.task_schema import PROMPT_IDS, Task
from peft_lab.errors import TaskError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset


def canonical(task: Task, split: str, dataset: Dataset) -> Dataset:
    """Rows with the canonical columns of the task's kind only, cast to their types.

    Raises:
        TaskError: a column is missing or holds values of another type, or there is no row.
    """
    check_columns(task, split, dataset.column_names)
    if len(dataset) == 0:
        raise TaskError(f'Task "{task.name}": the {split} data has no rows.')
    texts = prompt_column.texts(task, split, dataset) if PROMPT_IDS in task.columns else None
    numbers = {name: number_columns.numbers(task, name, split, dataset) for name in task.number_columns}
    # one source column may serve as an input and choose the prompts, so it is copied and not renamed
    columns = {name: source for name, source in task.columns.items() if name not in (PROMPT_IDS, *numbers)}
    dataset = dataset.select_columns(list(columns.values()))
    dataset = dataset.rename_columns({source: name for name, source in columns.items() if source != name})
    if texts is not None:
        dataset = dataset.add_column(PROMPT_IDS, texts)
    for name, values in numbers.items():
        dataset = dataset.add_column(name, values)
    return kind(task.kind).cast(dataset, task)


def faulty(task: Task, split: str, dataset: Dataset) -> set[int]:
    """Positions of the rows that the task drops."""
    faults = [*kind(task.kind).row_faults(dataset, task), *label_column.faults(dataset, task)]
    dropped = rows_to_drop(task, split, dataset, faults)
    if len(dropped) == len(dataset) and not task.streaming:
        raise TaskError(f'Task "{task.name}": no row of the {split} data is left.')
    return dropped


def prepared(
    task: Task, split: str, dataset: Dataset, labels: tuple[str, ...] | None, dropped: set[int] | None = None
) -> Dataset:
    """Rows of one split with encoded labels, without those that the task drops."""
    dropped = faulty(task, split, dataset) if dropped is None else dropped
    dataset = kind(task.kind).encode_labels(task, split, dataset, labels, dropped)
    # dropped last, because what `map` makes of chosen rows has lost their numbers in the file
    return dataset.select([row for row in range(len(dataset)) if row not in dropped]) if dropped else dataset


def check_columns(task: Task, split: str, names: list[str]) -> None:
    """Raise `TaskError` if a column of the task is not among those of its data."""
    for name, source in task.columns.items():
        if source not in names:
            raise TaskError(
                f'Task "{task.name}": the {split} data has no column "{source}" for "{name}".'
                f"{did_you_mean(source, names)} Columns: {', '.join(names)}."
            )
