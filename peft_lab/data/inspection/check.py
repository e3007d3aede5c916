"""Check of all rows of a task: what a run would refuse, and what a careful person would look at."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_lab.data.inspection.model_view import ModelView, plain_rows
from peft_lab.data.profile import ColumnProfile, profile_column
from peft_lab.data.row_checks import numbered, source_rows
from peft_lab.data.row_preparation import canonical, faulty
from peft_lab.data.sources import open_parts, read, take
from peft_lab.data.splits import load_splits
from peft_lab.data.task_registry import kind
from peft_lab.data.task_schema import PROMPT_IDS, Task
from peft_lab.errors import TaskError

if TYPE_CHECKING:
    from datasets import Dataset

#: Rows of a stream that are looked at, and damaged files that are named.
_OF_STREAM, _NAMED_FILES = 10_000, 10


@dataclass(frozen=True)
class Lengths:
    """Lengths of the rows of a split, before they are cut by the model's limit if there is one.

    Attributes:
        unit: `tokens`, or `words` without a tokenizer.
        median, high, most: median, 95th percentile and maximum.
    """

    unit: str
    median: float
    high: float
    most: int


@dataclass
class DataReport:
    """Report on the rows of a task.

    Attributes:
        task, kind: names.
        rows: split -> number of rows, as a run reads them.
        columns: split of the source -> column -> profile.
        classes: split -> name of a class -> rows.
        lengths: split -> lengths of the texts.
        examples: three training rows as a model sees them, or their columns without a tokenizer.
        errors: sentences with which a run would end.
        doubts: sentences about what should be looked at.
    """

    task: str
    kind: str
    rows: dict[str, int] = field(default_factory=dict)
    columns: dict[str, dict[str, ColumnProfile]] = field(default_factory=dict)
    classes: dict[str, dict[str, int]] = field(default_factory=dict)
    lengths: dict[str, Lengths] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)


def check_data(task: Task, view: ModelView | None = None) -> DataReport:
    """Read all rows of a task and report on them; of a stream, the first ones.

    Args:
        task: the task.
        view: tokenizer or image processor of a backbone, and what it needs; None for a report without.
    """
    report = DataReport(task.name, task.kind)
    with _warnings_to(report.doubts):
        for split in task.splits:
            _check_source(task, split, report)
        if report.errors:
            return report
        try:
            parts, labels = _parts(task)
        # what only all splits together show, such as a label of the test rows that train lacks
        except TaskError as error:
            report.errors.append(str(error))
            return report
        report.rows = {split: len(part) for split, part in parts.items()}
        keys = {split: _Keys(task, part) for split, part in parts.items()}
        _check_equal_rows(parts, keys, report)
        _count_classes(parts, labels, report)
        try:
            _measure(task, parts, labels, view, report)
        except TaskError as error:
            report.errors.append(str(error))
    return report


@contextmanager
def _warnings_to(doubts: list[str]) -> Iterator[None]:
    """Collect warnings of peft-lab as doubts, each once, instead of logging them."""
    logger = logging.getLogger("peft_lab")

    def collect(record: logging.LogRecord) -> bool:
        text = record.getMessage().rstrip(".")
        if text not in doubts:
            doubts.append(text)
        return False

    logger.addFilter(collect)
    try:
        yield
    finally:
        logger.removeFilter(collect)


def _check_source(task: Task, split: str, report: DataReport) -> None:
    """Profile the columns of a split of the source, and find its faults."""
    try:
        dataset = canonical(task, split, _read(task, split))
        stored = _undecoded(dataset)
        profiles = {name: profile_column(name, stored[name][:]) for name in stored.column_names}
        report.columns[split] = profiles
        damaged = _damaged_files(task, dataset, stored)
        if damaged:
            report.doubts.append(f"damaged files of the {split} rows: {damaged}")
        faulty(task, split, dataset)
    except TaskError as error:
        report.errors.append(str(error))


def _read(task: Task, split: str) -> Dataset:
    if not task.streaming:
        return read(task, split)
    from peft_lab.data.row_stream import data_set

    parts, features = open_parts(task, split)
    rows, _ = take(parts, _OF_STREAM)
    if len(rows) == _OF_STREAM:
        logging.getLogger("peft_lab").warning("the first %s %s rows of the stream are looked at", _OF_STREAM, split)
    return data_set(task, split, rows, features)


def _parts(task: Task) -> tuple[dict[str, Dataset], tuple[str, ...] | None]:
    """Rows of each split as a run reads them; a stream's training rows are its first ones."""
    found = load_splits(task, test=task.has_test)
    train: Any = found.train
    if task.streaming:
        train = canonical(task, "train", _read(task, "train"))
        train = kind(task.kind).encode_labels(task, "train", train, found.labels, faulty(task, "train", train))
    parts = {"train": train, "validation": found.validation, "test": found.test}
    return {split: part for split, part in parts.items() if part is not None}, found.labels


def _undecoded(dataset: Dataset) -> Dataset:
    """Data set whose images and sounds stay files."""
    for name, feature in dataset.features.items():
        if hasattr(feature, "decode"):
            dataset = dataset.cast_column(name, type(feature)(decode=False))
    return dataset


def _damaged_files(task: Task, dataset: Dataset, stored: Dataset) -> str:
    """Names of the files of the rows that the kind finds fault with; `stored` are the same rows, undecoded."""
    names = [name for name in stored.column_names if profile_column(name, stored[name][:50]).type in ("image", "audio")]
    if not names:
        return ""
    found: list[str] = []
    for fault in kind(task.kind).row_faults(dataset, task):
        if fault.level == "remark":
            continue
        for row in fault.rows:
            for name in names:
                path = (stored[row][name] or {}).get("path")
                found.append(Path(path).name if path else f"row {row + 1}")
    shown = ", ".join(found[:_NAMED_FILES])
    return f"{shown}, and {len(found) - _NAMED_FILES} more" if len(found) > _NAMED_FILES else shown


class _Keys:
    """Hashes of the inputs and of the whole of each row."""

    def __init__(self, task: Task, part: Dataset) -> None:
        stored = _undecoded(part).with_format(None)
        names = [name for name in stored.column_names if name not in (PROMPT_IDS, *task.number_columns)]
        of_inputs = [name for name in names if name in task.inputs]
        self.inputs: list[str] = []
        self.whole: list[str] = []
        for row in stored:
            self.inputs.append(_hash([row[name] for name in of_inputs]))
            self.whole.append(_hash([row[name] for name in names]))


def _hash(values: Any) -> str:
    return hashlib.blake2b(json.dumps(values, sort_keys=True, default=_file_hash).encode(), digest_size=16).hexdigest()


def _file_hash(value: Any) -> str:
    return hashlib.blake2b(value).hexdigest() if isinstance(value, bytes) else str(value)


def _check_equal_rows(parts: Mapping[str, Dataset], keys: Mapping[str, _Keys], report: DataReport) -> None:
    """Doubts about rows that stand twice in a split, in two splits, or with two answers."""
    answers: dict[str, set[str]] = {}
    for split, part in parts.items():
        seen: set[str] = set()
        double = []
        for row, whole in enumerate(keys[split].whole):
            if whole in seen:
                double.append(row)
            seen.add(whole)
        if double:
            named = numbered(source_rows(part, double))
            report.doubts.append(f"{len(double)} of {len(part)} {split} rows are duplicates of others ({named})")
        for inputs, whole in zip(keys[split].inputs, keys[split].whole, strict=True):
            answers.setdefault(inputs, set()).add(whole)
    splits = list(parts)
    for place, later in enumerate(splits):
        for earlier in splits[:place]:
            known = set(keys[earlier].inputs)
            leaked = [row for row, inputs in enumerate(keys[later].inputs) if inputs in known]
            if leaked:
                named = numbered(source_rows(parts[later], leaked))
                report.doubts.append(
                    f"{len(leaked)} of {len(parts[later])} {later} rows have the inputs of {earlier} rows ({named}): "
                    "their scores say nothing about new ones"
                )
    several = {inputs for inputs, found in answers.items() if len(found) > 1}
    for split, part in parts.items():
        rows = [row for row, inputs in enumerate(keys[split].inputs) if inputs in several]
        if rows:
            shown = numbered(source_rows(part, rows))
            report.doubts.append(
                f"{len(rows)} of {len(part)} {split} rows have inputs that have another answer elsewhere ({shown})"
            )


def _count_classes(parts: Mapping[str, Dataset], labels: Sequence[str] | None, report: DataReport) -> None:
    from datasets import ClassLabel

    for split, part in parts.items():
        feature = part.features.get("label")
        if labels is None or not isinstance(feature, ClassLabel):
            return
        counts = Counter(part["label"][:])
        report.classes[split] = {name: counts[index] for index, name in enumerate(labels)}
        missing = [name for name, count in report.classes[split].items() if not count]
        if missing:
            shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            report.doubts.append(f"the {split} rows have none of {len(missing)} of the {len(labels)} classes ({shown})")
    train = report.classes["train"]
    most, least = max(train, key=lambda name: train[name]), min(train, key=lambda name: train[name])
    if train[most] > 10 * max(train[least], 1):
        report.doubts.append(
            f'the classes are unequal: {train[most]} training rows of "{most}", {train[least]} of "{least}"; look at '
            "f1 beside accuracy"
        )


def _measure(
    task: Task, parts: Mapping[str, Dataset], labels: Sequence[str] | None, view: ModelView | None, report: DataReport
) -> None:
    """Lengths of the rows, and some of them as the model sees them."""
    if view is None:
        for split, part in parts.items():
            counts = [_words(task, row) for row in _undecoded(part)]
            _add_lengths(report, split, "words", counts)
        report.examples = plain_rows(task, parts["train"])
        return
    for split, part in parts.items():
        rows = view.preprocessed(part)
        _add_lengths(report, split, "tokens", view.lengths(rows))
        if split == "train":
            report.examples = view.examples(rows, labels) or plain_rows(task, part)


def _words(task: Task, row: Mapping[str, Any]) -> int:
    """Words of the texts of a row that the model reads."""
    return sum(len(value.split()) for name, value in row.items() if name in task.inputs and isinstance(value, str))


def _add_lengths(report: DataReport, split: str, unit: str, counts: Sequence[int]) -> None:
    import numpy as np

    if any(counts):
        median, high = (float(np.percentile(counts, part)) for part in (50, 95))
        report.lengths[split] = Lengths(unit, median, high, max(counts))
