"""Splits of a task: read by `datasets`, with canonical columns, and fingerprinted."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from peft_lab.data import foreign_files, prompt_column
from peft_lab.data.task_registry import data_files, kind
from peft_lab.data.task_schema import PROMPT_IDS, QUOTING, Task
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
    labels, prompt_values = _label_names(task, train), prompt_column.values_of(task, train)
    train = _encode_labels(task, "train", train, labels)
    parts: dict[str, Dataset] = {}
    # test rows are carved first and even if nobody asked: train must be the same with and without them
    if "test" not in task.splits and task.test_fraction:
        train, parts["test"] = carve(task, train, "test", task.test_fraction, seed)
    if "validation" in task.splits:
        validation = _encode_labels(task, "validation", _canonical(task, "validation"), labels)
    else:
        train, validation = carve(task, train, "validation", task.validation_fraction, seed)
    parts |= {"train": train, "validation": validation}
    if test and "test" in task.splits:
        parts["test"] = _encode_labels(task, "test", _canonical(task, "test"), labels)
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
    for name, source in task.columns.items():
        if source not in dataset.column_names:
            raise TaskError(
                f'Task "{task.name}": the {split} data has no column "{source}" for "{name}".'
                f"{did_you_mean(source, dataset.column_names)} Columns: {', '.join(dataset.column_names)}."
            )
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


def _read(task: Task, split: str) -> Dataset:
    import datasets

    data, source = task.data, task.splits[split]
    try:
        if data.path:
            _check_hub_name(task)
            return datasets.load_dataset(data.path, data.name or None, revision=data.revision or None, split=source)
        files: Any = data_files(task, split)
        if task.foreign:
            foreign_files.check_files(task, files)
        if data.builder == "imagefolder":
            files = [f"{folder}/**" for folder in files]  # else images in folders of folders are missed
        options = dict(data.options)
        if data.builder == "csv":
            # pandas would turn the texts "null", "None" and "NA" into missing values
            options["keep_default_na"] = False
            options["quoting"] = QUOTING[options.get("quoting", "minimal")]
        return datasets.load_dataset(data.builder, data_files={split: files}, split=split, **options)
    # a TaskError is a ValueError too, and says already what is wrong
    except TaskError:
        raise
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        where = f'"{data.path}" of the Hub' if data.path else f"the {data.builder} files"
        # datasets wraps the error of its reader, which names the cause
        reason = " ".join(str(error.__cause__ or error).split())
        raise TaskError(f'Task "{task.name}": the {split} data cannot be read from {where}: {reason}') from error


def _check_hub_name(task: Task) -> None:
    """Refuse the name of a data set that `datasets` would find in the working directory.

    It looks for a folder of that name first, and takes the name of one of its builders for the builder.
    """
    name = task.data.path
    is_builder = name.isidentifier() and importlib.util.find_spec(f"datasets.packaged_modules.{name}") is not None
    if os.path.exists(name) or is_builder:
        raise TaskError(
            f'Task "{task.name}": "{name}" stands for a data set of the Hub, but means a builder or a folder of the '
            'working directory here; work in another folder, or give "builder" and "files" for local files.'
        )


def _label_names(task: Task, train: Dataset) -> tuple[str, ...] | None:
    """Label names in the order of the model's outputs; None without classes.

    They are the task's, else those that the data declares, else the sorted values of the train rows.
    """
    from datasets import ClassLabel

    if "label" not in train.column_names or task.problem_type == "regression":
        return None
    feature = train.features["label"]
    if isinstance(feature, ClassLabel):
        if task.labels and set(task.labels) == set(feature.names) and list(task.labels) != feature.names:
            # the classes of image folders are matched by name, all others by position
            if task.data.builder != "imagefolder":
                raise TaskError(
                    f'Task "{task.name}": the data has the labels in this order: {", ".join(feature.names)}.'
                )
        elif task.labels and len(task.labels) != feature.num_classes and task.data.builder != "imagefolder":
            raise TaskError(f'Task "{task.name}" names {len(task.labels)} labels, the data {feature.num_classes}.')
        return task.labels or tuple(feature.names)
    if task.labels:
        return task.labels
    values = sorted(set(train.unique("label")) - {None})
    if len(values) < 2 or len(values) > 1000:
        raise TaskError(
            f'Task "{task.name}": the label column has {len(values)} different values, which is no classification; '
            'name another column, or set "problem_type: regression".'
        )
    return tuple(str(value) for value in values)


def _encode_labels(task: Task, split: str, dataset: Dataset, labels: tuple[str, ...] | None) -> Dataset:
    """Data set with `label` as a `ClassLabel` over `labels`, or as float32."""
    from datasets import ClassLabel, Value

    if "label" not in dataset.column_names:
        return dataset
    if labels is None:
        return dataset.cast_column("label", Value("float32"))
    number = _numbering(dataset, labels, by_name=not task.labels or task.data.builder == "imagefolder")

    def encode(values: list[Any]) -> dict[str, list[int]]:
        return {"label": [_index(task, split, value, number, labels) for value in values]}

    # without features, map would infer the type, and the labels would have the old names or none
    features = dataset.features.copy()
    features["label"] = ClassLabel(names=list(labels))
    return dataset.map(encode, input_columns="label", batched=True, features=features, desc=f"Labels of {split}")


def _numbering(dataset: Dataset, labels: Sequence[str], by_name: bool) -> Callable[[Any], int | None]:
    """Function from a value of the label column to its class index.

    Whole numbers are indices unless they are names of labels; None for a value that is neither.
    """
    from datasets import ClassLabel

    feature, position = dataset.features["label"], {name: index for index, name in enumerate(labels)}
    if isinstance(feature, ClassLabel):
        # datasets writes a missing class as -1, which Python would take for the last name
        if by_name:
            return lambda value: position.get(feature.names[value]) if value is not None and value >= 0 else None
        return lambda value: value if value is not None and 0 <= value < len(labels) else None
    values = set(dataset.unique("label"))
    # whole numbers may be names too: ratings from 1 to 5 are no positions
    if by_name or not all(isinstance(v, int) for v in values) or all(str(v) in position for v in values):
        return lambda value: position.get(str(value))
    return lambda value: value if 0 <= value < len(labels) else None


def _index(task: Task, split: str, value: Any, number: Callable[[Any], int | None], labels: Sequence[str]) -> int:
    index = number(value)
    if index is None:
        shown = ", ".join(labels[:12]) + (", ..." if len(labels) > 12 else "")
        hint = did_you_mean(value, labels) if isinstance(value, str) else ""
        raise TaskError(f'Task "{task.name}": label "{value}" of the {split} rows is not one of {shown}.{hint}')
    return index


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
