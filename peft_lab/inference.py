"""What is done with a trained adapter: load it, evaluate it, predict with it, merge it into its base."""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_lab import run_folder
from peft_lab.errors import AdapterMismatchError, ConfigError, PeftLabError, TaskError
from peft_lab.merged import check_reloadable
from peft_lab.task import kind as task_kind
from peft_lab.task import load_task

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from peft_lab.kind import Kind
    from peft_lab.task_schema import Task

#: Files of inputs for `predict`: one input a line, or one row a line.
INPUT_FILES = (".txt", ".csv", ".jsonl")


@dataclass
class Loaded:
    """A trained adapter (or baseline) ready to use.

    Attributes:
        model: in evaluation mode, with the task head and its label names.
        processor: the tokenizer or image processor that it was trained with.
        task, kind: what it was trained for.
        labels: class names in the order of the outputs; None for regression and generation.
        folder: where it was loaded from.
    """

    model: PreTrainedModel | PeftModel
    processor: Any
    task: Task
    kind: Kind
    labels: list[str] | None
    folder: Path


def load(
    adapter: str | Path, task: str | Task | None = None, model_name_or_path: str | None = None, dtype: str | None = None
) -> Loaded:
    """Load an adapter on its base, with the head, the labels and the processor it was trained with.

    Args:
        adapter: folder of a run, any folder of a peft adapter, or a Hub id.
        task: the task whose kind and labels apply, if the folder does not say it.
        model_name_or_path: the base to load instead of the one that was trained on.
        dtype: dtype of the base; the one of the training by default.

    Raises:
        ConfigError: no such adapter or base, or the task is not known.
        AdapterMismatchError: the adapter does not fit this base.
    """
    folder = run_folder.find_adapter(adapter)
    run = run_folder.read_origin(folder)
    found = trained_task(folder, run, task)
    kind, labels = task_kind(found.kind), run_folder.read_labels(folder)
    if labels is None:
        labels = list(found.labels) or _labels_of_data(found)
    dtype = dtype or run.get("dtype")
    revision = run.get("model_revision") if model_name_or_path is None else None
    base = model_name_or_path or base_of(folder, run)
    from peft_lab.train import load_base

    processor, bare = load_base(kind, found, labels, base, revision, dtype)
    adapted = (folder / run_folder.ADAPTER_CONFIG).is_file()
    model = _put_on(bare, folder, base) if adapted else bare
    return Loaded(model.eval(), processor, found, kind, labels, folder)


def _labels_of_data(task: Task) -> list[str] | None:
    """The labels of a task that reads them from its rows; None for regression and generation."""
    if "label" not in task.columns or task.problem_type == "regression":
        return None
    from peft_lab.data import load_splits

    return list(load_splits(task).labels or ()) or None


def base_of(folder: Path, run: dict[str, str]) -> str:
    """The base that an adapter's folder names: that of its run, else that of its adapter_config.json.

    Raises:
        ConfigError: it names none.
    """
    config_file = folder / run_folder.ADAPTER_CONFIG
    if not config_file.is_file():
        return str(folder)
    named = run.get("model_name_or_path") or json.loads(config_file.read_text(encoding="utf-8")).get(
        "base_model_name_or_path"
    )
    if not named:
        raise ConfigError(f'"{folder}" does not name its base; pass model_name_or_path.')
    return str(named)


def trained_task(folder: Path, run: dict[str, str], task: str | Task | None = None) -> Task:
    """The task asked for, else the one of the run: by its name or file, else by the copy in the folder.

    Raises:
        ConfigError: neither is there.
    """
    if task is not None:
        return load_task(task)
    named, copy = run.get("task"), folder / run_folder.TASK
    if named:
        try:
            return load_task(named)
        except TaskError:
            if not copy.is_file():
                raise
    if copy.is_file():
        return load_task(copy)
    raise ConfigError(f'"{folder}" does not say which task it was trained on; name one.')


def evaluate(
    adapter: str | Path,
    task: str | Task | None = None,
    split: str = "test",
    model_name_or_path: str | None = None,
    *,
    max_samples: int | None = None,
    batch_size: int = 32,
) -> dict[str, Any]:
    """Metrics of a saved adapter on a split of its task, or of another task with the same labels.

    Raises:
        ConfigError, TaskError, AdapterMismatchError: what is wrong.
    """
    loaded = load(adapter, task, model_name_or_path)
    import torch
    from transformers import TrainingArguments

    from peft_lab.data import load_splits, subset
    from peft_lab.train import scores
    from peft_lab.trainer import LabTrainer

    splits = load_splits(loaded.task, test=split == "test")
    if loaded.labels and splits.labels and list(splits.labels) != loaded.labels:
        raise ConfigError(
            f'"{adapter}" was trained on other labels ({", ".join(loaded.labels[:5])}, ...) than those of task '
            f'"{loaded.task.name}" ({", ".join(splits.labels[:5])}, ...).'
        )
    raw = subset(getattr(splits, split), max_samples)
    rows = loaded.kind.preprocess(raw, loaded.processor, loaded.task, loaded.model)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = LabTrainer(
            model=loaded.model,
            args=TrainingArguments(
                output_dir=scratch,
                per_device_eval_batch_size=batch_size,
                report_to="none",
                remove_unused_columns=False,
                dataloader_pin_memory=torch.cuda.is_available(),
                label_names=["labels"],
            ),
            data_collator=loaded.kind.data_collator(loaded.processor, loaded.model),
            compute_metrics=loaded.kind.compute_metrics(loaded.task, loaded.labels),
            preprocess_logits_for_metrics=loaded.kind.preprocess_logits_for_metrics,
        )
        found = trainer.evaluate(rows, metric_key_prefix=split)
    written = loaded.kind.generation_metrics(loaded.model, loaded.processor, raw, loaded.task, batch_size)
    return scores(found, f"{split}_") | written | {"rows": len(rows)}


def predict(
    adapter: str | Path,
    inputs: str | Sequence[Any],
    task: str | Task | None = None,
    model_name_or_path: str | None = None,
    *,
    batch_size: int = 32,
) -> list[Any]:
    """Answers of a saved adapter to raw inputs, in order.

    Args:
        adapter, task, model_name_or_path: as for `load`.
        inputs: one input or several: texts, pairs of texts, image files, PIL images; or one .txt, .csv or .jsonl file.
        batch_size: rows in one batch.

    Raises:
        ConfigError, TaskError, AdapterMismatchError: what is wrong.
    """
    rows = read_inputs([inputs] if isinstance(inputs, str | Path) else list(inputs))
    loaded = load(adapter, task, model_name_or_path)
    rows = [_input(row, loaded.task) if isinstance(row, Mapping) else row for row in rows]
    return loaded.kind.predict(loaded.model, loaded.processor, rows, loaded.task, batch_size)


def read_inputs(inputs: list[Any]) -> list[Any]:
    """Inputs as given, or the rows of the single .txt, .csv or .jsonl file that they name.

    Raises:
        ConfigError: the file does not exist or holds nothing.
    """
    if len(inputs) != 1 or not str(inputs[0]).lower().endswith(INPUT_FILES):
        return inputs
    path = Path(inputs[0]).expanduser()
    if not path.is_file():
        raise ConfigError(f'There is no input file "{path}".')
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix.lower() == ".csv":
            rows: list[Any] = list(csv.DictReader(file))
        elif path.suffix.lower() == ".jsonl":
            rows = [json.loads(line) for line in file if line.strip()]
        else:
            rows = [line.rstrip("\r\n") for line in file if line.strip()]
    if not rows:
        raise ConfigError(f'"{path}" holds no input.')
    return rows


def _input(row: Mapping[str, Any], task: Task) -> Any:
    """The input columns of a row of a file, which may have the names of the task's own data and further columns."""
    names = {name: source for name, source in task.columns.items() if name != "label"}
    chosen = {
        name: row[name] if name in row else row[source] for name, source in names.items() if {name, source} & {*row}
    }
    if len(chosen) < len(names):
        raise ConfigError(
            f"A row of the input file lacks {', '.join(sorted({*names} - {*chosen}))}; it has {', '.join(row)}."
        )
    return next(iter(chosen.values())) if len(chosen) == 1 else chosen or row


def merge(adapter: str | Path, out: str | Path, model_name_or_path: str | None = None) -> Path:
    """Merge an adapter into its base and save the result, which loads with transformers alone.

    Raises:
        ConfigError: the method cannot be merged, there is no adapter, the merged model would lose weights when loaded
            again, or `out` already holds something.
    """
    out = Path(out).expanduser()
    run_folder.refuse_filled(out)
    loaded = load(adapter, None, model_name_or_path)
    adapted: Any = loaded.model
    if not (loaded.folder / run_folder.ADAPTER_CONFIG).is_file():
        raise ConfigError(f'"{adapter}" is a whole model: there is no adapter to merge.')
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except (NotImplementedError, AttributeError) as error:
        reason = str(error) or "peft has no merge for it"
        raise ConfigError(f'The adapter in "{adapter}" cannot be merged: {reason}') from error
    check_reloadable(merged)
    merged.save_pretrained(out)
    loaded.processor.save_pretrained(out)
    if loaded.labels:
        run_folder.write_labels(out, loaded.labels)
    return out


def _put_on(model: PreTrainedModel, folder: Path, base: str) -> PeftModel:
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(folder))
    except PeftLabError:
        raise
    except (RuntimeError, ValueError, KeyError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        shown = next((line for line in lines if "size mismatch" in line), lines[0] if lines else type(error).__name__)
        raise AdapterMismatchError(f'The adapter in "{folder}" does not fit base "{base}": {shown}') from error
