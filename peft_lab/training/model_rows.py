"""Rows of a run: chosen, held out, and preprocessed for its model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from peft_lab.data import prompt_column
from peft_lab.data.kind import Kind
from peft_lab.data.row_checks import name_rows, source_rows
from peft_lab.data.row_stream import RowStream
from peft_lab.data.splits import Splits, carve, per_class, subset
from peft_lab.data.task_registry import kind as task_kind
from peft_lab.data.task_schema import Task
from peft_lab.errors import ConfigError, PeftLabError
from peft_lab.runs.run_config import RunConfig
from peft_lab.training.cached_features import check_value
from peft_lab.training.callbacks.bilevel import activation_parameters
from peft_lab.training.drawn_rows import DrawnRows
from peft_lab.training.packing import pack

if TYPE_CHECKING:
    from datasets import Dataset

#: Split that bi-level training holds out of train, and its share unless the run gives another.
HELD_OUT, HELD_OUT_FRACTION = "held_out", 0.1

#: Splits that a run is scored on.
SCORED = ("validation", "test")

#: Options that draw from all training rows.
_DRAWING = ("max_train_samples", "examples_per_class", "alternating_every")


def check_options(config: RunConfig, task: Task) -> None:
    """Refuse options that a task cannot follow.

    Raises:
        ConfigError: naming the option.
    """
    check_streaming(config, task)
    check_value(config.features)
    flags, kind = config.training_arguments, task_kind(task.kind)
    if flags.get("do_eval") is False and kind.tunes(task):
        raise ConfigError(
            f'Task "{task.name}" chooses its thresholds on the validation rows, which do_eval=False leaves out; remove '
            "one of them."
        )
    if flags.get("label_smoothing_factor") and not kind.smooths_labels(task):
        raise ConfigError(
            f"label_smoothing_factor={flags['label_smoothing_factor']} is for answers that are one class out of "
            f'several; task "{task.name}" has others, so leave it out.'
        )


def check_streaming(config: RunConfig, task: Task) -> None:
    """Refuse options that need the number of all training rows of a streamed task.

    Raises:
        ConfigError: naming the option.
    """
    if not task.streaming:
        return
    flags, what = config.training_arguments, f'Task "{task.name}" is streamed'
    drawing = next((name for name in _DRAWING if getattr(config, name) is not None), None)
    if drawing is not None:
        raise ConfigError(f"{what}, and {drawing} draws from all training rows; leave it out, max_steps limits them.")
    if config.prune.get("by") == "bip":
        raise ConfigError(f"{what}, and prune: by=bip draws from all training rows; take by=magnitude.")
    if config.preprocessing_num_workers is not None or config.overwrite_cache:
        raise ConfigError(f"{what}: its rows are tokenised while they are read; dataloader_num_workers does it faster.")
    if flags.get("num_train_epochs") is not None:
        raise ConfigError(f"{what}, and a stream has no known number of rows; give max_steps, not num_train_epochs.")
    if (flags.get("max_steps") or -1) <= 0 and config.max_seconds is None:
        raise ConfigError(f"{what}, and a stream has no known end; give max_steps.")
    by_default = "epoch" if config.early_stopping_patience is not None else "no"
    for name in ("eval_strategy", "save_strategy"):
        if str(flags.get(name, by_default)) == "epoch":
            raise ConfigError(f"{what} and has no epochs; give {name}=steps and its number of steps.")


def chosen_rows(config: RunConfig, splits: Splits, seed: int) -> dict[str, Any]:
    """Rows of each split, at most as many as the run asks for."""
    limited = {
        "train": (splits.train, config.max_train_samples),
        "validation": (splits.validation, config.max_eval_samples),
        "test": (splits.test, config.max_test_samples),
    }
    found: dict[str, Any] = {}
    for split, (rows, limit) in limited.items():
        if rows is not None:
            found[split] = rows if isinstance(rows, RowStream) else subset(rows, limit)
    if config.examples_per_class is not None:
        found["train"] = per_class(found["train"], config.examples_per_class, seed)
    return found


def hold_out(config: RunConfig, task: Task, model: Any, train: Dataset, seed: int) -> dict[str, Dataset]:
    """Training rows, without those held out for the activation alone, and these.

    Raises:
        ConfigError: the adapter learns no activation.
    """
    if not activation_parameters(model):
        raise ConfigError(
            f'alternating_every={config.alternating_every}: method "{config.method}" with {config.method_args} learns '
            "no activation; leave one of them out."
        )
    rest, held_out = carve(task, train, HELD_OUT, config.alternating_fraction or HELD_OUT_FRACTION, seed)
    return {"train": rest, HELD_OUT: held_out}


def model_rows(
    raw: Mapping[str, Any],
    kind: Kind,
    processor: Any,
    task: Task,
    model: Any,
    drops: bool,
    packed: int | None,
    few: bool = False,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rows of each split with numbers of prompts, and the same preprocessed for the model.

    Args:
        raw: split -> rows with encoded labels.
        kind, processor, task, model: of the run.
        drops: True if Trainer removes columns that the model's forward does not name.
        packed: tokens of the sequences that training rows are packed into; None without packing.
        few: True if the run draws few of its training rows, which are then preprocessed when they are drawn.
    """
    found: dict[str, Any] = {}
    rows: dict[str, Any] = {}
    for split, part in raw.items():
        length = packed if split == "train" else None
        prepare = partial(_prepared, kind, processor, task, model, drops, length, split in ("train", HELD_OUT))
        if isinstance(part, RowStream):
            found[split], rows[split] = part, part.preprocessed(_Second(prepare))
        elif few and split == "train":
            found[split], rows[split] = part, DrawnRows(part, _Second(prepare))
        else:
            found[split], rows[split] = prepare(part)
            if split in SCORED:
                found[split] = kind.rows_to_score(found[split], processor, task, model)
    return found, rows


def _prepared(
    kind: Kind, processor: Any, task: Task, model: Any, drops: bool, packed: int | None, trains: bool, rows: Dataset
) -> tuple[Dataset, Dataset]:
    numbered = prompt_column.for_model(rows, model, task)
    if task.streaming:
        name_rows(numbered, source_rows(rows, range(len(rows))))
    found = kind.preprocess(numbered, processor, task, model)
    prompt_column.check_kept(found, numbered, kind.name, drops)
    _check_image_source(found, kind, model)
    if not trains:
        found = kind.evaluation_rows(found, processor, task)
    return numbered, found if packed is None else pack(found, packed)


def _check_image_source(rows: Dataset, kind: Kind, model: Any) -> None:
    """Raise `ConfigError` if the method makes the images of something that the rows do not have."""
    config = getattr(model, "active_peft_config", None)
    source = getattr(config, "image_source", "")
    if config is not None and source and source not in rows.column_names:
        raise ConfigError(
            f'Method "{config.info.name}" makes its images of {source}, and kind "{kind.name}" gives none; take a task '
            "whose kind does."
        )


class _Second:
    """Function that returns the second of two results; a class, because worker processes may have to pickle it."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, rows: Any) -> Any:
        """Second result."""
        return self.function(rows)[1]


@contextmanager
def plain_errors_of_workers() -> Iterator[None]:
    """Raise errors of ours from workers of a loader with their own sentence, without the worker's traceback."""
    try:
        yield
    except PeftLabError as error:
        text = str(error)
        own = f"{type(error).__name__}: "
        if not text.startswith("Caught ") or own not in text:
            raise
        raise type(error)(text.rpartition(own)[2].strip()) from error
