"""Checks of rows: what is missing, empty or cut is counted and named by row."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft_lab.data.task_schema import PROMPT_IDS, Task
from peft_lab.errors import TaskError

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger("peft_lab")

#: Row numbers that a message names.
_NAMED = 5
#: Characters of the first row that a message quotes.
_QUOTED = 60


@dataclass(frozen=True)
class RowFault:
    """Fault that some rows of a data set, or some inputs of a prediction, have in common.

    Attributes:
        what: verb and object, such as `have no label in column "topic"`.
        rows: positions, from 0.
        level: "missing" can be dropped alone, "empty" dropped or kept, and a "remark" is only said.
    """

    what: str
    rows: Sequence[int]
    level: str = "missing"


def numbered(rows: Sequence[int | str]) -> str:
    """First numbers of rows at positions, counted from 1: `rows 3, 8, ...`.

    Rows of a stream have names, `17 of reviews.csv`, which stand as they are.
    """
    shown = ", ".join(row if isinstance(row, str) else str(row + 1) for row in rows[:_NAMED])
    return f"row{'s' if len(rows) > 1 else ''} {shown}{', ...' if len(rows) > _NAMED else ''}"


def column_faults(dataset: Dataset, task: Task, texts: Iterable[str]) -> list[RowFault]:
    """Faults of rows that lack a value, or whose text is blank.

    `texts` names the columns in which a blank text counts. Labels and the column that chooses prompts have checks of
    their own.
    """
    import pyarrow.compute as pc

    # the stored values, so that no image is decoded
    table = dataset.with_format("arrow")
    found = []
    for name in [name for name in dataset.column_names if name not in ("label", PROMPT_IDS, *task.number_columns)]:
        column, source = table.select_columns([name])[:][name], task.columns.get(name, name)
        found.append(RowFault(f'have no value in column "{source}"', _positions(pc.is_null(column))))
        if name in texts:
            blank = pc.equal(pc.utf8_trim_whitespace(column), "")
            found.append(RowFault(f'have an empty text in column "{source}"', _positions(blank), "empty"))
    return found


def _positions(mask: Any) -> list[int]:
    return [row for row, marked in enumerate(mask.to_pylist()) if marked]


def rows_to_drop(task: Task, split: str, dataset: Dataset, faults: Iterable[RowFault]) -> set[int]:
    """Positions of the rows that `empty_rows` of the task leaves out.

    What is dropped or kept is said with its count.

    Args:
        task, split: the task and the name of the split, for messages.
        dataset: the rows.
        faults: their faults.

    Raises:
        TaskError: there are faults, and the task does not say what to do about them.
    """
    faults = [fault for fault in faults if fault.rows]
    for fault in [fault for fault in faults if fault.level == "remark"]:
        logger.warning('Task "%s": %s.', task.name, _sentence(split, dataset, [fault]))
    faults = [fault for fault in faults if fault.level != "remark"]
    kept = [fault for fault in faults if task.empty_rows == "keep" and fault.level == "empty"]
    if kept:
        logger.warning('Task "%s": %s; they are kept ("empty_rows: keep").', task.name, _sentence(split, dataset, kept))
    faults = [fault for fault in faults if fault not in kept]
    if not faults:
        return set()
    said = _sentence(split, dataset, faults)
    if task.empty_rows != "drop":
        keep = '; "empty_rows: keep" takes them as they are' if all(f.level == "empty" for f in faults) else ""
        raise TaskError(
            f'Task "{task.name}": {said}; mend the data, or set "empty_rows: drop" in the task file to leave these '
            f"rows out{keep}."
        )
    dropped = {row for fault in faults for row in fault.rows}
    logger.warning('Task "%s": %s; %d rows are left out ("empty_rows: drop").', task.name, said, len(dropped))
    return dropped


def _sentence(split: str, dataset: Dataset, faults: Sequence[RowFault]) -> str:
    # the names of a stream's rows say of which file they are
    total = "" if hasattr(dataset, "_source_rows") else f" of {len(dataset)}"
    found = []
    for fault in faults:
        rows = source_rows(dataset, fault.rows) if not total else fault.rows
        found.append(f"{len(fault.rows)} {split} rows {fault.what} ({numbered(rows)}{total})")
    return ", ".join(found)


def check_inputs(task: Task, faults: Iterable[RowFault]) -> None:
    """Raise `TaskError` if inputs of a prediction are missing or empty.

    None can be dropped, because there is one answer for each.
    """
    for fault in [fault for fault in faults if fault.rows]:
        said = f"{len(fault.rows)} inputs {fault.what} ({numbered(fault.rows)})"
        if fault.level == "remark":
            logger.warning("%s.", said)
        elif fault.level != "empty" or task.empty_rows != "keep":
            raise TaskError(f"{said}; mend them or leave them out.")


def warn_of_cut(task: Task, dataset: Dataset | None, cut: Mapping[str, Sequence[int]], mend: str) -> None:
    """Warn of rows that are cut, with their count, their first numbers and the mend.

    Args:
        task: their task.
        dataset: the rows before they were cut; None for the inputs of a prediction.
        cut: what is lost -> positions of the rows.
        mend: how to keep it.
    """
    for what, rows in cut.items():
        if rows:
            shown, quoted = rows, ""
            if dataset is not None:
                shown = source_rows(dataset, rows[: _NAMED + 1])
                beginning = _beginning(dataset[rows[0]])
                # rows of sounds have no text
                quoted = f', the first begins "{beginning}"' if beginning else ""
            count = "" if dataset is None else f" of {len(dataset)}"
            called = "inputs" if dataset is None else "rows"
            logger.warning(
                'Task "%s": %d%s %s %s (%s%s); %s.',
                task.name,
                len(rows),
                count,
                called,
                what,
                numbered(shown),
                quoted,
                mend,
            )


def _beginning(row: Mapping[str, Any]) -> str:
    """Beginning of the first text of a row, or of its first list of words."""
    for value in row.values():
        words = value if isinstance(value, list) and all(isinstance(word, str) for word in value) else [value]
        text = " ".join(" ".join(word.split()) for word in words if isinstance(word, str))
        if text:
            return text[:_QUOTED]
    return ""


def source_rows(dataset: Any, rows: Sequence[int]) -> list[Any]:
    """Positions in the source's file of rows of a split that was drawn from it; of a stream, names of rows."""
    # datasets keeps the rows that were drawn as numbers of the rows of the whole table
    known = getattr(dataset, "_source_rows", None)
    if known is not None:
        return [known[row] for row in rows]
    indices = dataset._indices
    return list(rows) if indices is None else [indices.column(0)[row].as_py() for row in rows]


def name_rows(dataset: Any, names: Sequence[str]) -> Any:
    """Data set that knows the names of its rows, which a part of a stream has."""
    dataset._source_rows = list(names)
    return dataset


def keep_source_rows(dataset: Any, drawn: Any) -> Any:
    """Data set that knows the source's rows of `drawn`, which it was made of.

    Adding a column copies the rows, and the numbers would be lost.
    """
    dataset._source_rows = source_rows(drawn, range(len(drawn)))
    return dataset
