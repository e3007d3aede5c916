"""Columns of a task's source that its kind does not know, for rows that were drawn from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft_lab.data.row_checks import source_rows
from peft_lab.data.row_preparation import check_columns
from peft_lab.data.sources import read
from peft_lab.data.task_schema import Task

if TYPE_CHECKING:
    from datasets import Dataset


def column_values(task: Task, split: str, column: str, purpose: str, rows: Dataset) -> tuple[list[Any], list[int]]:
    """Values of a column for rows, and the positions of the rows in the source.

    Args:
        task: the task.
        split: split that the rows belong to; rows that were carved from train are looked for there.
        column: its name in the source.
        purpose: what it is for, in errors.
        rows: rows of the split, drawn in any order.

    Raises:
        TaskError: the data have no such column.
    """
    source = split if split in task.splits else "train"
    # readers of files keep the columns of the task alone
    wider = task.model_copy(update={"columns": {**task.columns, purpose: column}})
    found = read(wider, source)
    check_columns(wider, source, found.column_names)
    cells, places = found.select_columns([column])[:][column], source_rows(rows, range(len(rows)))
    return [cells[place] for place in places], places
