"""Evaluation of a trained adapter, and prediction for raw inputs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, TrainingArguments

from peft_lab.data import number_columns, prompt_column
from peft_lab.data.prediction_inputs import INPUT_FILES, check_top_k, input_columns, read_inputs
from peft_lab.data.splits import load_splits, subset
from peft_lab.data.task_registry import check_split
from peft_lab.data.task_registry import kind as task_kind
from peft_lab.errors import ConfigError
from peft_lab.loading.load_run import load
from peft_lab.runs import run_folder
from peft_lab.runs.trained_task import check_metrics, trained_task
from peft_lab.training.arguments import shows_bars
from peft_lab.training.trainer import LabTrainer, scores
from peft_lab.utils.atomic_files import write_errors
from peft_lab.utils.batch_progress import progress_bar

if TYPE_CHECKING:
    from peft_lab.data.task_schema import Task


def evaluate(
    adapter: str | Path,
    task: str | Task | None = None,
    split: str = "test",
    model_name_or_path: str | None = None,
    *,
    max_samples: int | None = None,
    batch_size: int = 32,
    allow_other_base: bool = False,
) -> dict[str, Any]:
    """Evaluate a saved adapter on a split of its task.

    Args:
        adapter: folder of a run, any folder of a peft adapter, or a Hub id.
        task: another task with the same labels; by default that of the run.
        split: "train", "validation" or "test".
        model_name_or_path: the base to load instead of the one that was trained on.
        max_samples: number of rows, drawn at random with a fixed seed; by default all.
        batch_size: rows in one batch.
        allow_other_base: warn instead of refusing where the base's weights differ from those trained on.

    Returns:
        The metrics by name, the loss, and the number of `rows`.

    Raises:
        ConfigError: there is no such adapter, base or split, or the labels differ.
        TaskError: the task or its data are not what they should be.
        AdapterMismatchError: the adapter does not fit the base.
    """
    check_split(split)
    loaded = load(adapter, task, model_name_or_path, allow_other_base=allow_other_base)
    check_metrics(loaded.task)
    if loaded.task.streaming and split == "train":
        raise ConfigError(f'The train rows of task "{loaded.task.name}" are a stream without end; name another split.')
    splits = load_splits(loaded.task, test=split == "test")
    if loaded.labels and splits.labels and list(splits.labels) != loaded.labels:
        raise ConfigError(
            f'"{adapter}" was trained on other labels ({", ".join(loaded.labels[:5])}, ...) than those of task '
            f'"{loaded.task.name}" ({", ".join(splits.labels[:5])}, ...).'
        )
    raw = subset(getattr(splits, split), max_samples)
    raw = prompt_column.for_model(raw, loaded.model, loaded.task)
    rows = loaded.kind.preprocess(raw, loaded.processor, loaded.task, loaded.model)
    prompt_column.check_kept(rows, raw, loaded.kind.name)
    raw = loaded.kind.rows_to_score(raw, loaded.processor, loaded.task, loaded.model)
    rows = loaded.kind.evaluation_rows(rows, loaded.processor, loaded.task)
    # Trainer makes its output folder even if nothing is written, so it gets one that vanishes
    with write_errors(tempfile.gettempdir()), tempfile.TemporaryDirectory() as scratch:
        trainer = LabTrainer(
            model=loaded.model,
            args=TrainingArguments(
                output_dir=scratch,
                per_device_eval_batch_size=batch_size,
                report_to="none",
                disable_tqdm=not shows_bars(),
                remove_unused_columns=False,  # the collator reads what the kind's preprocessing made
                dataloader_pin_memory=torch.cuda.is_available(),
                label_names=list(loaded.kind.trainer_labels),
                logging_nan_inf_filter=False,  # it would leave batches out of the loss in silence
            ),
            data_collator=loaded.kind.data_collator(loaded.processor, loaded.task, loaded.model),
            compute_metrics=loaded.kind.compute_metrics(loaded.task, loaded.labels, raw),
            preprocess_logits_for_metrics=loaded.kind.preprocess_logits_for_metrics,
            keeps_labels=loaded.kind.keeps_labels,
        )
        trainer.remove_callback(PrinterCallback)  # it would print what is returned
        found = trainer.evaluate(rows, metric_key_prefix=split)
    # metrics of written text need generation, which Trainer's evaluation does not do
    written = loaded.kind.generation_metrics(loaded.model, loaded.processor, raw, loaded.task, batch_size)
    return scores(found, f"{split}_") | written | {"rows": len(raw)}


def predict(
    adapter: str | Path,
    inputs: str | Path | Sequence[Any],
    task: str | Task | None = None,
    model_name_or_path: str | None = None,
    *,
    top_k: int | None = None,
    batch_size: int = 32,
    allow_other_base: bool = False,
) -> list[Any]:
    """Predict the answers of a saved adapter to raw inputs, in order.

    Args:
        adapter, task, model_name_or_path: as for `load`.
        inputs: one input or several: texts, pairs of texts, image files, PIL images, or mappings of the task's columns;
            folders of files and patterns such as `scans/*.png` where the kind of task reads files; or files of rows
            (.txt, .csv, .tsv, .json, .jsonl, .parquet). The column that chooses prompts may be among those of a
            mapping.
        top_k: number of labels in each answer, the best first, under "top_k"; for kinds that choose one of several.
        batch_size: rows in one batch.
        allow_other_base: as for `load`.

    Raises:
        ConfigError: there is no such adapter, base or file, an input lacks a column, or `top_k` does not fit the task.
        TaskError: the task is not what it should be.
        AdapterMismatchError: the adapter does not fit the base.
    """
    folder = run_folder.find_adapter(adapter)
    trained = trained_task(folder, run_folder.read_origin(folder), task, run_folder.is_download(adapter))
    # inputs are read first, because a wrong file should be refused before a model is loaded
    given = [inputs] if isinstance(inputs, str | Path) else list(inputs)
    rows = read_inputs(given, task_kind(trained.kind).input_files(trained))
    options: dict[str, Any] = {"top_k": top_k, "batch_size": batch_size, "allow_other_base": allow_other_base}
    return predict_rows(folder, rows, task, model_name_or_path, **options)


def predict_rows(
    adapter: str | Path,
    rows: Sequence[Any],
    task: str | Task | None = None,
    model_name_or_path: str | None = None,
    *,
    top_k: int | None = None,
    batch_size: int = 32,
    allow_other_base: bool = False,
) -> list[Any]:
    """Predict the answers to inputs that `read_inputs` has read; arguments and errors are those of `predict`."""
    loaded = load(adapter, task, model_name_or_path, allow_other_base=allow_other_base)
    check_top_k(top_k, loaded.kind, loaded.task, loaded.labels)
    file = next((row for row in rows if isinstance(row, str | Path) and os.path.isfile(row)), None)
    if loaded.kind.reads_texts(loaded.task) and file is not None:
        raise ConfigError(f'"{file}" is a file, and not one of inputs: these end with {", ".join(INPUT_FILES)}.')
    # the column that chooses prompts is read now, because `input_columns` keeps only those of the task
    ids = prompt_column.ids_of_inputs(rows, loaded.model, loaded.task)
    values = [input_columns(row, loaded.task, number) for number, row in enumerate(rows, start=1)]
    numbers = number_columns.numbers_of_inputs(rows, loaded.model, loaded.task)
    # kinds that rank no labels know no such argument
    options: dict[str, Any] = {} if top_k is None else {"top_k": top_k}
    # numbers are given around a call for the rows of one batch, all others for the rows of all batches
    size, found = batch_size if numbers else max(len(values), 1), []
    with progress_bar(f"predicting with {Path(adapter).name}", len(values)):
        for start in range(0, max(len(values), 1), size):
            part = slice(start, start + size)
            with number_columns.given({name: column[part] for name, column in numbers.items()}):
                chosen = None if ids is None else ids[part]
                found += loaded.kind.predict_with_prompts(
                    loaded.model, loaded.processor, values[part], loaded.task, batch_size, chosen, **options
                )
    return found
