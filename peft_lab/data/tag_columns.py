"""Columns of tagged words: lists or texts of words and tags, or a text and spans of its characters."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from peft_lab.data.labels import MAX_LABELS, index_of_value
from peft_lab.data.row_checks import RowFault, column_faults, numbered, source_rows
from peft_lab.data.row_maps import map_rows
from peft_lab.data.task_schema import Task
from peft_lab.data.words import tags_of_spans, words_and_marks
from peft_lab.errors import TaskError, did_you_mean
from peft_lab.metrics.entities import OUTSIDE

if TYPE_CHECKING:
    from datasets import Dataset

Span = dict[str, Any]


def cast_tags(dataset: Dataset, task: Task) -> Dataset:
    """Rows whose `tokens` and `tags` are lists of texts, and whose `spans` are lists of start, end and label.

    A text in place of a list is split at white space, or read as JSON in the place of spans. Tags that the data declare
    as classes stay what they are.

    Raises:
        TaskError: a column holds something else.
    """
    from datasets import ClassLabel, List, Value

    for name in ("tokens", "tags"):
        if name in dataset.column_names and not _is_list_of(dataset.features[name], (Value("string"), ClassLabel)):
            _check_words(dataset, name, task)
            dataset = _replaced(dataset, name, List(Value("string")), _as_words)
    if "spans" in dataset.column_names:
        feature = List({"start": Value("int64"), "end": Value("int64"), "label": Value("string")})
        column, values = task.columns["spans"], dataset["spans"][:]
        unread = [row for row, value in enumerate(values) if not _is_blank(value) and _as_spans(value) is None]
        if unread:
            raise TaskError(
                f'Task "{task.name}": {len(unread)} rows have no list of spans in column "{column}" '
                f"({numbered(source_rows(dataset, unread))} of {len(dataset)}); a row needs a list such as "
                '[{"start": 0, "end": 5, "label": "city"}], with whole numbers of characters.'
            )
        dataset = _replaced(dataset, "spans", feature, _as_spans)
    return dataset


def _is_list_of(feature: Any, entries: tuple[Any, type]) -> bool:
    entry = getattr(feature, "feature", None)
    return entry == entries[0] or isinstance(entry, entries[1])


def _check_words(dataset: Dataset, name: str, task: Task) -> None:
    feature = dataset.features[name]
    entry = getattr(feature, "feature", feature)
    held = str(getattr(entry, "dtype", type(entry).__name__))
    if not held.startswith(("string", "large_string", "int", "uint", "null")):
        raise TaskError(
            f'Task "{task.name}": the column "{task.columns[name]}" holds {held}; it must hold a list of texts a row, '
            "or one text with spaces between the words."
        )


def _replaced(dataset: Dataset, name: str, feature: Any, change: Callable[[Any], Any]) -> Dataset:
    """Data set with a column of another type; missing values and blank cells are missing."""

    def changed(value: Any) -> dict[str, Any]:
        return {name: None if _is_blank(value) else change(value)}

    features = dataset.features.copy()
    features[name] = feature
    options = {"input_columns": name, "features": features, "desc": f"Reading {name}"}
    return map_rows(dataset, changed, [name, change.__name__], **options)


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _as_words(value: Any) -> list[str | None]:
    if isinstance(value, str):
        return list(value.split())
    return [None if entry is None else str(entry) for entry in value]


def _as_spans(value: Any) -> list[Span] | None:
    """Spans of a cell; None if it holds none."""
    try:
        value = json.loads(value) if isinstance(value, str) else value
        return [{"start": int(s["start"]), "end": int(s["end"]), "label": _label(s["label"])} for s in value]
    except (TypeError, ValueError, KeyError):
        return None


def _label(value: Any) -> str:
    if not isinstance(value, (str, int)) or not str(value).strip():
        raise ValueError("no label")
    return str(value)


# Rows that nothing can be learned from -----------------------------------------------------------------------------


def tag_faults(dataset: Dataset, task: Task) -> list[RowFault]:
    """Rows without words or tags, with more of one than of the other, or with spans that are none."""
    # a row without a word has no tag, so it cannot be kept as one that is empty
    found = [RowFault(fault.what, fault.rows) for fault in column_faults(dataset, task, ("text",))]
    return found + (_span_faults(dataset) if "spans" in dataset.column_names else _list_faults(dataset, task))


def _list_faults(dataset: Dataset, task: Task) -> list[RowFault]:
    rows: dict[str, list[int]] = {"empty": [], "blank": [], "uneven": []}
    for row, (tokens, tags) in enumerate(zip(dataset["tokens"][:], dataset["tags"][:], strict=True)):
        if tokens is None or tags is None:
            continue
        if not tokens:
            rows["empty"].append(row)
        elif len(tokens) != len(tags):
            rows["uneven"].append(row)
        elif not all(token and token.strip() for token in tokens) or None in tags:
            rows["blank"].append(row)
    names = task.columns
    return [
        RowFault(f'have no word in column "{names["tokens"]}"', rows["empty"]),
        RowFault(f'have another number of tags in "{names["tags"]}" than words in "{names["tokens"]}"', rows["uneven"]),
        RowFault("have an empty word, or a word without a tag", rows["blank"]),
    ]


def _span_faults(dataset: Dataset) -> list[RowFault]:
    rows: dict[str, list[int]] = {"outside": [], "overlap": [], "inside": []}
    for row, (text, spans) in enumerate(zip(dataset["text"][:], dataset["spans"][:], strict=True)):
        if text is None or spans is None:
            continue
        ordered = sorted(spans, key=lambda span: span["start"])
        if any(not 0 <= s["start"] < s["end"] <= len(text) or not text[s["start"] : s["end"]].strip() for s in spans):
            rows["outside"].append(row)
        elif any(first["end"] > second["start"] for first, second in itertools.pairwise(ordered)):
            rows["overlap"].append(row)
        elif _cuts_words(text, spans):
            rows["inside"].append(row)
    return [
        RowFault("have a span that is empty or ends outside the text", rows["outside"]),
        RowFault("have spans that overlap, and a word has one tag", rows["overlap"]),
        RowFault("have a span that begins or ends within a word, and takes all of it", rows["inside"], "remark"),
    ]


def _cuts_words(text: str, spans: Sequence[Span]) -> bool:
    words = words_and_marks(text)
    inside: set[int] = set()
    for word in words:
        inside.update(range(word.start + 1, word.end))
    return any(span["start"] in inside or span["end"] in inside for span in spans)


# Names and numbers of tags -----------------------------------------------------------------------------------------


def tag_names(task: Task, train: Dataset, skip: Collection[int] = ()) -> tuple[str, ...]:
    """Names of the tags in the order of the model's outputs.

    They are the task's, else those that the data declare, else those of the train rows: `O` first, the others sorted.

    Args:
        task: the task.
        train: all rows of train, cast.
        skip: positions of rows that do not count.

    Raises:
        TaskError: the rows have too few or too many tags for that, or are streamed.
    """
    declared = _declared(train)
    if declared:
        if task.labels and len(task.labels) != len(declared):
            raise TaskError(f'Task "{task.name}" names {len(task.labels)} labels, the data {len(declared)}.')
        return task.labels or declared
    if task.labels:
        return task.labels
    if task.streaming:
        raise TaskError(f'Task "{task.name}": a stream does not know all tags of its rows; list them in "labels".')
    found: set[str] = set()
    for row, tags in enumerate(_tag_lists(train)):
        if row not in skip and tags is not None:
            found.update(tag for tag in tags if tag is not None)
    if len(found) < 2 or len(found) > MAX_LABELS:
        raise TaskError(f'Task "{task.name}": the train rows have {len(found)} different tags; name another column.')
    whole = all(tag.isdecimal() for tag in found)
    return tuple(sorted(found, key=int if whole else lambda tag: (tag != OUTSIDE, tag)))


def _declared(dataset: Dataset) -> tuple[str, ...]:
    from datasets import ClassLabel

    feature = dataset.features.get("tags")
    entry = getattr(feature, "feature", None)
    return tuple(entry.names) if isinstance(entry, ClassLabel) else ()


def _tag_lists(dataset: Dataset) -> list[list[Any] | None]:
    """Tags of each row, as they are written; None where a row has none."""
    if "tags" in dataset.column_names:
        return dataset["tags"][:]
    pairs = zip(dataset["text"][:], dataset["spans"][:], strict=True)
    return [_tags(text, spans) for text, spans in pairs]


def _tags(text: str | None, spans: Sequence[Span] | None) -> list[str] | None:
    return None if text is None or spans is None else tags_of_spans(words_and_marks(text), spans)


def encode_tags(task: Task, split: str, dataset: Dataset, labels: Sequence[str], skip: Collection[int]) -> Dataset:
    """Data set with `tokens` and with `tags` as lists of classes, in the place of spans too.

    Rows at the positions `skip` are going to be dropped, and get no tags.

    Raises:
        TaskError: a tag is not one of `labels`.
    """
    from datasets import ClassLabel, List, Value

    names, find = _declared(dataset), index_of_value(labels)
    wrong: dict[str, list[int]] = {}
    for row, tags in enumerate(_tag_lists(dataset)):
        for tag in (tags or ()) if row not in skip else ():
            if (not 0 <= tag < len(labels)) if names else find(tag) is None:
                wrong.setdefault(str(tag), []).append(row)
    if wrong:
        _refuse(task, split, dataset, wrong, labels)

    def encoded(row: dict[str, Any], place: int) -> dict[str, Any]:
        if place in skip:
            return {"tokens": [], "tags": []}
        if "spans" in row:
            words = words_and_marks(row["text"])
            tags: list[Any] = tags_of_spans(words, row["spans"])
            return {"tokens": [word.text for word in words], "tags": [find(tag) for tag in tags]}
        return {"tokens": row["tokens"], "tags": row["tags"] if names else [find(tag) for tag in row["tags"]]}

    features = dataset.features.copy()
    features |= {"tokens": List(Value("string")), "tags": List(ClassLabel(names=list(labels)))}
    if "spans" in features:
        del features["spans"]
    removed = ["spans"] if "spans" in dataset.column_names else []
    options = {"with_indices": True, "features": features, "remove_columns": removed, "desc": f"Tags of {split}"}
    return map_rows(dataset, encoded, [list(labels), sorted(skip), bool(names)], **options)


def _refuse(task: Task, split: str, dataset: Dataset, wrong: dict[str, list[int]], labels: Sequence[str]) -> None:
    tag, rows = next(iter(wrong.items()))
    rows = list(dict.fromkeys(rows))
    shown = ", ".join(labels[:12]) + (", ..." if len(labels) > 12 else "")
    raise TaskError(
        f'Task "{task.name}": tag "{tag}" of the {split} rows is not one of {shown} ({len(rows)} of {len(dataset)} '
        f"{split} rows: {numbered(source_rows(dataset, rows))}).{did_you_mean(tag, labels)}"
    )
