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

from peft_lab.data import labels as label_column
from peft_lab.data import prompt_column, read_files
from peft_lab.data.row_checks import rows_to_drop
from peft_lab.data.task_registry import data_files, kind
from peft_lab.data.task_schema import PROMPT_IDS, Task
from peft_lab.errors import TaskError, did_you_mean

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
        fingerprints: split -> hash of its content, the same on every machine.
    """

    train: Dataset
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
    has_test = "test" in task.splits or task.test_fraction > 0
    if test and not has_test:
        raise TaskError(f'Task "{task.name}" has no test rows: name a "test" split or set "test_fraction".')
    # labels and prompts are those of all training rows, so they are read before any rows are carved
    train = _canonical(task, "train")
    dropped = _faulty(task, "train", train)
    labels, prompt_values = label_column.names_of(task, train, dropped), prompt_column.values_of(task, train)
    train = _prepared(task, "train", train, labels, dropped)
    parts: dict[str, Dataset] = {}
    # test rows are carved first and even if nobody asked: train must be the same with and without them
    if "test" not in task.splits and task.test_fraction:
        train, parts["test"] = carve(task, train, "test", task.test_fraction, seed)
    if "validation" in task.splits:
        validation = _prepared(task, "validation", _canonical(task, "validation"), labels)
    else:
        train, validation = carve(task, train, "validation", task.validation_fraction, seed)
    parts |= {"train": train, "validation": validation}
    if test and "test" in task.splits:
        parts["test"] = _prepared(task, "test", _canonical(task, "test"), labels)
    # never handed out unasked, so that no choice can be made on them
    if not test:
        parts.pop("test", None)
    fingerprints = {name: fingerprint(part) for name, part in parts.items()}
    return Splits(train, validation, parts.get("test"), labels, prompt_values, fingerprints)


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
    known = {n: dataset.features[n].names for n in names if isinstance(dataset.features[n], ClassLabel)}
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


def _canonical(task: Task, split: str) -> Dataset:
    """One split of the source with the canonical columns only."""
    dataset = _read(task, split)
    _check_columns(task, split, dataset.column_names)
    if len(dataset) == 0:
        raise TaskError(f'Task "{task.name}": the {split} data has no rows.')
    texts = prompt_column.texts(task, split, dataset) if PROMPT_IDS in task.columns else None
    # one source column may serve as an input and choose the prompts, so it is copied and not renamed
    columns = {name: source for name, source in task.columns.items() if name != PROMPT_IDS}
    dataset = dataset.select_columns(list(columns.values()))
    dataset = dataset.rename_columns({source: name for name, source in columns.items() if source != name})
    if texts is not None:
        dataset = dataset.add_column(PROMPT_IDS, texts)
    return kind(task.kind).cast(dataset, task)


def _faulty(task: Task, split: str, dataset: Dataset) -> set[int]:
    """Positions of the rows that the task drops."""
    faults = [*kind(task.kind).row_faults(dataset, task), *label_column.faults(dataset, task)]
    dropped = rows_to_drop(task, split, len(dataset), faults)
    if len(dropped) == len(dataset):
        raise TaskError(f'Task "{task.name}": no row of the {split} data is left.')
    return dropped


def _prepared(
    task: Task, split: str, dataset: Dataset, labels: tuple[str, ...] | None, dropped: set[int] | None = None
) -> Dataset:
    """Rows of one split with encoded labels, without those that the task drops."""
    dropped = _faulty(task, split, dataset) if dropped is None else dropped
    dataset = label_column.encode(task, split, dataset, labels, dropped)
    # dropped last, because what `map` makes of chosen rows has lost their numbers in the file
    return dataset.select([row for row in range(len(dataset)) if row not in dropped]) if dropped else dataset


def _check_columns(task: Task, split: str, names: list[str]) -> None:
    for name, source in task.columns.items():
        if source not in names:
            raise TaskError(
                f'Task "{task.name}": the {split} data has no column "{source}" for "{name}".'
                f"{did_you_mean(source, names)} Columns: {', '.join(names)}."
            )


def _read(task: Task, split: str) -> Dataset:
    import datasets

    data, source = task.data, task.splits[split]
    try:
        if data.path:
            return datasets.load_dataset(data.path, data.name or None, revision=data.revision or None, split=source)
        files: Any = data_files(task, split)
        if data.builder in ("csv", "json"):
            rows = read_files.read_rows(data.builder, files, data.options)
            names = read_files.column_names(rows)
            if rows:
                _check_columns(task, split, names)
            return read_files.as_dataset(rows, sorted(set(task.columns.values())))
        if data.builder == "imagefolder":
            return _read_folders(files, split)
        return datasets.load_dataset(data.builder, data_files={split: files}, split=split, **data.options)
    # a TaskError is a ValueError too, and says already what is wrong
    except TaskError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        where = f'"{data.path}" of the Hub' if data.path else f"the {data.builder} files"
        # datasets wraps the error of its reader, which names the cause
        reason = " ".join(str(error.__cause__ or error).split())
        raise TaskError(f'Task "{task.name}": the {split} data cannot be read from {where}: {reason}') from error


def _read_folders(folders: list[str], split: str) -> Dataset:
    """Images of folders, by the table beside them or by the names of their folders."""
    import datasets

    from peft_lab.data.image_column import read_described, warn_of_other_files

    described = read_described(folders)
    if described is not None:
        return described
    warn_of_other_files(folders)
    files = [f"{folder}/**" for folder in folders]  # else images in folders of folders are missed
    return datasets.load_dataset("imagefolder", data_files={split: files}, split=split)


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
