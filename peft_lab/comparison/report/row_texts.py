"""Contents of the test rows of a run, read again from the data of its task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_lab.comparison.records.run import Record
from peft_lab.errors import PeftLabError
from peft_lab.runs import run_folder
from peft_lab.runs.trained_task import trained_task
from peft_lab.utils.text import one_line

if TYPE_CHECKING:
    from datasets import Dataset

    from peft_lab.data.task_schema import Task

#: Characters of a text in a table, and columns of texts.
_MAX_TEXT, _MAX_COLUMNS = 160, 3


@dataclass(frozen=True)
class RowTexts:
    """Texts of test rows, for a table.

    Attributes:
        columns: names of the columns of texts, those of the task's own data.
        rows: row number -> a text for each column.
        reason: sentence on why there are none, else "".
    """

    columns: tuple[str, ...] = ()
    rows: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    reason: str = ""

    def of(self, row: int) -> tuple[str, ...]:
        """Texts of a row, empty ones where it has none."""
        return self.rows.get(row, ("",) * len(self.columns))


def row_texts(folder: Path, record: Record, rows: list[int]) -> RowTexts:
    """Read texts of test rows that a run was scored on.

    Only data on this machine are read, and only if they are those that the run saw.

    Args:
        folder: the comparison's folder.
        record: a run, whose folder names the task.
        rows: numbers of rows of its predictions.
    """
    place = folder / record.folder
    if not rows or not record.folder or not place.resolve().is_relative_to(folder.resolve()):
        return RowTexts()
    try:
        task = trained_task(place, run_folder.read_origin(place))
        if task.data.path or task.streaming:
            return RowTexts(reason="Their contents are not shown: the data are not files of this machine.")
        found = _test_rows(task, record)
    except (PeftLabError, OSError) as error:
        return RowTexts(reason=f"Their contents are not shown: {one_line(str(error))[:200]}")
    if found is None:
        return RowTexts(reason="Their contents are not shown: the data are not those of the runs any more.")
    return _texts(task, found, rows)


def _test_rows(task: Task, record: Record) -> Dataset | None:
    """Test rows in the order of the predictions; None if they are others than those of the run."""
    from peft_lab.data.splits import load_splits, subset

    splits = load_splits(task, test=True)
    data: Mapping[str, Any] = record.metrics.get("data", {})
    if splits.test is None or splits.fingerprints.get("test") != data.get("fingerprints", {}).get("test"):
        return None
    chosen = subset(splits.test, record.options.get("max_test_samples"))
    return chosen if len(chosen) == data.get("rows", {}).get("test") else None


def _texts(task: Task, found: Dataset, rows: list[int]) -> RowTexts:
    from datasets import Value

    from peft_lab.data.row_checks import source_rows

    texts = [
        name
        for name in found.column_names
        if isinstance(found.features[name], Value) and found.features[name].dtype in ("string", "large_string")
    ][:_MAX_COLUMNS]
    part = found.select_columns(texts).select(rows) if texts else None
    numbers = source_rows(found, rows)
    lines = {}
    for position, row in enumerate(rows):
        values = part[position] if part is not None else {}
        shown = [_short(values[name]) for name in texts]
        lines[row] = (str(numbers[position] + 1), *shown)
    columns = ("row of the data", *(task.columns.get(name, name) for name in texts))
    return RowTexts(columns, lines)


def _short(value: Any) -> str:
    text = one_line(str(value))
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]} ..."
