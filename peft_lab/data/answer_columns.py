"""Columns of extracted answers: SQuAD's `answers`, or an answer and its place in the context."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peft_lab.data.row_checks import RowFault, column_faults, numbered, source_rows
from peft_lab.data.row_maps import map_rows
from peft_lab.data.task_schema import Task
from peft_lab.data.text_inputs import cast_texts
from peft_lab.errors import TaskError

if TYPE_CHECKING:
    from datasets import Dataset

#: Answers of a row, as SQuAD writes them: `text` and `answer_start`, two lists of one length.
Answers = dict[str, list[Any]]

#: Place that stands for one that is no whole number, and so fits no context.
_NOWHERE = -1


def cast_answers(dataset: Dataset, task: Task) -> Dataset:
    """Rows with texts as `question` and `context`, and `answers` of one form.

    A plain `answer` with its `answer_start` becomes `answers`, which an empty text makes empty. JSON is read where a
    cell holds a text.

    Raises:
        TaskError: a column holds something else.
    """
    from datasets import List, Value

    dataset = cast_texts(dataset, task, ("question", "context", "answer"))
    features = dataset.features.copy()
    features["answers"] = {"text": List(Value("string")), "answer_start": List(Value("int64"))}
    if "answer" in dataset.column_names:
        del features["answer"], features["answer_start"]
        plain = ["answer", "answer_start"]
        options = {"input_columns": plain, "remove_columns": plain, "features": features, "desc": "Reading answers"}
        return map_rows(dataset, _of_plain, [], **options)
    column, values = task.columns["answers"], dataset["answers"][:]
    unread = [row for row, value in enumerate(values) if not _is_blank(value) and _read(value) is None]
    if unread:
        raise TaskError(
            f'Task "{task.name}": {len(unread)} rows have no answers in column "{column}" '
            f"({numbered(source_rows(dataset, unread))} of {len(dataset)}); a row needs a mapping such as "
            '{"text": ["Paris"], "answer_start": [17]}.'
        )
    options = {"input_columns": "answers", "features": features, "desc": "Reading answers"}
    return map_rows(dataset, _of_answers, [], **options)


def _of_plain(answer: Any, start: Any) -> dict[str, Any]:
    if answer is None:
        return {"answers": None}
    return {"answers": {"text": [answer], "answer_start": [_whole(start)]} if answer else _empty()}


def _of_answers(value: Any) -> dict[str, Any]:
    return {"answers": None if _is_blank(value) else _read(value)}


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _empty() -> Answers:
    return {"text": [], "answer_start": []}


def _read(value: Any) -> Answers | None:
    """Answers of a cell; None if it holds none."""
    try:
        value = json.loads(value) if isinstance(value, str) else value
        if isinstance(value, Mapping):
            # `datasets` gives a missing mapping as one of missing values
            texts, starts = value["text"] or (), value["answer_start"] or ()
            pairs = list(zip(texts, starts, strict=True))
        else:
            pairs = [(each["text"], each["answer_start"]) for each in value]
    except (TypeError, ValueError, KeyError):
        return None
    if not all(isinstance(text, str) for text, _ in pairs):
        return None
    return {"text": [text for text, _ in pairs], "answer_start": [_whole(start) for _, start in pairs]}


def _whole(value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        return _NOWHERE


def answer_faults(dataset: Dataset, task: Task) -> list[RowFault]:
    """Rows without a text or an answer, or with an answer that does not stand at its place in the context."""
    found = column_faults(dataset.select_columns(["question", "context"]), task, ("question", "context"))
    rows: dict[str, list[int]] = {"missing": [], "none": [], "misplaced": []}
    for row, (context, answers) in enumerate(zip(dataset["context"][:], dataset["answers"][:], strict=True)):
        # a missing mapping may come as one of missing values
        if answers is None or answers["text"] is None:
            rows["missing"].append(row)
        elif not answers["text"]:
            rows["none"].append(row)
        elif not _stand_there(context or "", answers):
            rows["misplaced"].append(row)
    # only a question may be without an answer, so "keep" is for these alone
    found = [RowFault(fault.what, fault.rows) for fault in found]
    column = task.columns.get("answers") or task.columns["answer"]
    return [
        *found,
        RowFault(f'have no value in column "{column}"', rows["missing"]),
        RowFault("have an answer that does not stand at its answer_start in the context", rows["misplaced"]),
        RowFault("have no answer", rows["none"], "empty"),
    ]


def _stand_there(context: str, answers: Answers) -> bool:
    """Test whether all answers stand at their places in the context."""
    for text, start in zip(answers["text"], answers["answer_start"], strict=True):
        if not text.strip() or start < 0 or context[start : start + len(text)] != text:
            return False
    return True
