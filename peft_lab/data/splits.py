"""Splits of a task: read by `datasets`, with canonical columns, and fingerprinted."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from peft_lab.data import prompt_column
from peft_lab.data.row_preparation import canonical, faulty, prepared
from peft_lab.data.row_stream import RowStream, open_stream
from peft_lab.data.sources import read
from peft_lab.data.task_registry import kind
from peft_lab.data.task_schema import Task
from peft_lab.errors import TaskError

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger("peft_lab")


@dataclass(frozen=True)
class Splits:
    """The rows of a task with the canonical columns of its kind.

    Attributes:
        train, validation: disjoint; the validation rows are carved from train if the source has none.
        test: None unless it was asked for.
        labels: label names in the order of the model's outputs; None for regression and generation.
        prompt_values: values of the column `prompt_ids`, which holds texts; None if the task names none.
        fingerprints: split -> hash of its content, the same on every machine; of a stream, hash of the names and sizes
            of its files, or of the name and revision of a data set of the Hub.
    """

    train: Dataset | RowStream
    validation: Dataset
    test: Dataset | None
    labels: tuple[str, ...] | None
    prompt_values: tuple[str, ...] | None
    fingerprints: dict[str, str]

    @property
    def fingerprint(self) -> str:
        """Hash of the train and validation rows, whatever the test rows."""
        return _digest([self.fingerprints["train"], self.fingerprints["validation"]])


def load_splits(task: Task, seed: int | None = None, *, test: bool = False) -> Splits:
    """Read the rows of a task.

    Args:
        task: the task.
        seed: seed of the carving; the task's own `split_seed` by default, so that runs with other training seeds
            train and validate on the same rows.
        test: read the test rows too.

    Raises:
        TaskError: the data cannot be had, a column or a label is missing, or there is no test split to give.
    """
    seed = task.split_seed if seed is None else seed
    if test and not task.has_test:
        raise TaskError(f'Task "{task.name}" has no test rows: name a "test" split or set "test_fraction".')
    if task.streaming:
        return _streamed(task, test)
    # labels and prompts are those of all training rows, so they are read before any rows are carved
    train = canonical(task, "train", read(task, "train"))
    dropped = faulty(task, "train", train)
    labels, prompt_values = kind(task.kind).class_names(task, train, dropped), prompt_column.values_of(task, train)
    train = prepared(task, "train", train, labels, dropped)
    parts: dict[str, Dataset] = {}
    # test rows are carved first and even if nobody asked: train must be the same with and without them
    if "test" not in task.splits and task.test_fraction:
        train, parts["test"] = carve(task, train, "test", task.test_fraction, seed)
    if "validation" in task.splits:
        validation = prepared(task, "validation", canonical(task, "validation", read(task, "validation")), labels)
    else:
        train, validation = carve(task, train, "validation", task.validation_fraction, seed)
    parts |= {"train": train, "validation": validation}
    if test and "test" in task.splits:
        parts["test"] = prepared(task, "test", canonical(task, "test", read(task, "test")), labels)
    # never handed out unasked, so that no choice can be made on them
    if not test:
        parts.pop("test", None)
    fingerprints = {name: fingerprint(part) for name, part in parts.items()}
    logger.debug('Task "%s": %s.', task.name, ", ".join(f"{len(part):,} {name} rows" for name, part in parts.items()))
    return Splits(train, validation, parts.get("test"), labels, prompt_values, fingerprints)


def _streamed(task: Task, test: bool) -> Splits:
    """Splits of a task whose training rows are streamed."""
    train, parts = open_stream(task)
    fingerprints = {name: fingerprint(part) for name, part in parts.items() if test or name != "test"}
    fingerprints["train"] = _digest([json.dumps(train.identity, sort_keys=True, default=str)])
    given = parts["test"] if test else None
    return Splits(train, parts["validation"], given, train.labels, train.prompt_values, fingerprints)


def subset(dataset: Dataset, count: int | None, seed: int = 0) -> Dataset:
    """Draw at most `count` rows by `seed`.

    The first rows would not do, because sources are often sorted by class.
    """
    if count is None or count >= len(dataset):
        return dataset
    return dataset.shuffle(seed=seed).select(range(count))


def per_class(dataset: Dataset, count: int, seed: int) -> Dataset:
    """Draw `count` rows of each class by `seed`, in random order.

    A class that has fewer gives all of them.

    Raises:
        TaskError: the rows have no classes.
    """
    from datasets import ClassLabel

    if not isinstance(dataset.features.get("label"), ClassLabel):
        raise TaskError("examples_per_class needs a classification task: these rows have no classes.")
    shuffled = dataset.shuffle(seed=seed)
    labels = np.asarray(shuffled["label"][:])
    chosen = np.concatenate([np.flatnonzero(labels == label)[:count] for label in np.unique(labels)])
    # in the order of the shuffle, else the rows would be grouped by class
    return shuffled.select(np.sort(chosen))


def fingerprint(dataset: Dataset) -> str:
    """Hash of column names, label names and every value, in order.

    Images count by the bytes of their files.
    """
    from datasets import ClassLabel, Image

    # sources may hold the same columns in another order
    names = sorted(dataset.column_names)
    for name in names:
        # decoded pixels may differ between versions of the decoder, the bytes of a file do not
        if isinstance(dataset.features[name], Image):
            dataset = dataset.cast_column(name, Image(decode=False))
    # a column of tags holds lists of classes
    entries = {name: getattr(dataset.features[name], "feature", dataset.features[name]) for name in names}
    known = {name: entry.names for name, entry in entries.items() if isinstance(entry, ClassLabel)}
    # a format that was set, such as torch, would hand out values of other types
    plain = dataset.with_format(None)

    def lines() -> Iterable[str | bytes]:
        yield json.dumps([names, known], sort_keys=True)
        for batch in plain.iter(batch_size=1000):
            for values in zip(*(batch[name] for name in names), strict=True):
                for value in values:
                    # JSON knows no dates, which a source may hold
                    yield _file_bytes(value) if _is_file(value) else json.dumps(value, sort_keys=True, default=str)

    return _digest(lines())


def _digest(parts: Iterable[str | bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        # the length keeps ("ab", "c") and ("a", "bc") apart
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def _is_file(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"bytes", "path"}


def _file_bytes(value: dict[str, Any]) -> bytes:
    # the path does not count, because it differs between machines
    if value["bytes"] is not None:
        return value["bytes"]
    with open(value["path"], "rb") as file:
        return file.read()


def carve(task: Task, dataset: Dataset, split: str, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split rows into (rest, carved), stratified by label where classes allow it.

    Raises:
        TaskError: there are too few rows.
    """
    from datasets import ClassLabel

    count = round(fraction * len(dataset))
    if not 0 < count < len(dataset):
        raise TaskError(f'Task "{task.name}": {len(dataset)} rows are too few to carve a {split} split from them.')
    # scikit-learn refuses to stratify a class of one row, or more classes than rows in a part
    stratify = None
    if isinstance(dataset.features.get("label"), ClassLabel):
        sizes = Counter(dataset["label"][:]).values()
        if min(sizes) >= 2 and len(sizes) <= min(count, len(dataset) - count):
            stratify = "label"
        else:
            logger.warning('Task "%s": the %s rows are drawn at random, for some classes are rare.', task.name, split)
    halves = dataset.train_test_split(test_size=count, seed=seed, stratify_by_column=stratify)
    return halves["train"], halves["test"]
