"""Inputs of a run: options, rows and base weights, compared at resume."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from peft_lab.adapter_files.base_fingerprint import model_hash
from peft_lab.data.splits import Splits, fingerprint, load_splits
from peft_lab.errors import AdapterMismatchError, ConfigError
from peft_lab.loading.load_run import load
from peft_lab.runs.run_config import RunConfig
from peft_lab.training.checkpoint_manifest import read_manifest
from peft_lab.utils import strict_json
from peft_lab.utils.versions import versions

if TYPE_CHECKING:
    from datasets import Dataset

    from peft_lab.data.task_schema import Task

logger = logging.getLogger("peft_lab")

#: Options that a checkpoint may be continued with in another folder although they differ: how long it trains, what is
#: looked at meanwhile, and what changes memory and time but no value. Task and base are compared by their content.
_MAY_DIFFER = (
    *("task", "model_name_or_path", "model_revision", "max_steps", "num_train_epochs", "max_seconds"),
    *("max_eval_samples", "max_test_samples", "early_stopping_patience", "load_best_model_at_end"),
    *("metric_for_best_model", "greater_is_better", "gradient_checkpointing", "activation_checkpointing", "use_cpu"),
    "loss_chunk_size",
)
_MAY_DIFFER_BEGINNINGS = ("eval_", "save_", "dataloader_", "per_device_eval_", "torch_compile", "ddp_")


def inputs_of(
    config: RunConfig, rows: Mapping[str, Dataset], base: str, splits: Splits, train: Any, reads: Sequence[Any]
) -> dict[str, Any]:
    """Record of the inputs of a run, for the manifests of its checkpoints.

    Args:
        config: the options.
        rows: split -> rows as the model takes them; test rows are left out, because training never sees them.
        base: hash of the base weights, as `base_hash` returns it.
        splits: rows as they were read; the fingerprint of a stream is known there alone.
        train: the training rows before they are preprocessed, which may be done for a part of them alone.
        reads: what preprocessing depends on beside the rows, as `row_maps.recorded_reads` gives it.
    """
    whole = {split: part for split, part in rows.items() if split not in ("train", "test") and isinstance(part, Sized)}
    data = {split: fingerprint(part) for split, part in whole.items()}
    of_train = splits.fingerprints["train"]
    if isinstance(train, Sized):
        of_train = hashlib.blake2b(
            json.dumps([fingerprint(train), list(reads)], sort_keys=True, default=str).encode(), digest_size=16
        ).hexdigest()
    data = {"train": of_train} | data
    return {"options": json.loads(strict_json.dumps(config.identity())), "data": data, "base": base}


def base_hash(base: nn.Module, head_modules: Sequence[str]) -> str:
    """Hash of the base weights, without the task head of the run."""
    return model_hash(base, head_modules)


def check_inputs(checkpoint: str, inputs: Mapping[str, Any], own: bool) -> None:
    """Compare the inputs of a checkpoint with those of the run now.

    Args:
        checkpoint: the checkpoint; one without a manifest is not compared.
        inputs: inputs of the run, as `inputs_of` returns them.
        own: True if it lies in the folder of the run, so that all options must be the same.

    Raises:
        ConfigError: naming what differs, and the mend.
    """
    recorded = read_manifest(Path(checkpoint))
    if recorded is None:
        return
    found = [f"the {split} rows" for split in _differing(recorded.data, inputs["data"])]
    if recorded.base not in (None, inputs["base"]):
        found.append("the weights of the base")
    then, now = recorded.options or {}, inputs["options"]
    for name in _differing(recorded.options, now):
        if own or not (name in _MAY_DIFFER or name.startswith(_MAY_DIFFER_BEGINNINGS)):
            found.append(f"{name} ({then.get(name, 'unset')} there, {now.get(name, 'unset')} here)")
    if found:
        mend = "choose another --output_dir, or pass --overwrite_output_dir to start afresh"
        raise ConfigError(
            f'"{checkpoint}" cannot be continued, because {", ".join(found)} differ from those it was trained with; '
            f"restore them, {mend if own else 'or leave --resume_from_checkpoint out'}."
        )
    others = ", ".join(_differing(recorded.versions, versions()))
    if others:
        logger.warning('"%s" was written with other versions of %s: the rest may round otherwise.', checkpoint, others)


def check_finished(metrics: Mapping[str, Any], task: Task, folder: Path) -> None:
    """Check that the task of a finished run still has its rows.

    Only files are read again: what has a name on the Hub or in a package has a version.

    Raises:
        ConfigError: rows differ, and the mend.
    """
    recorded = (metrics.get("data") or {}).get("fingerprints")
    if task.where != "files" or not recorded:
        return
    found = load_splits(task, test="test" in recorded).fingerprints
    differing = [split for split in recorded if recorded[split] != found.get(split)]
    if differing:
        raise ConfigError(
            f'output_dir "{folder}" holds a finished run on other rows ({", ".join(differing)}); choose another '
            "--output_dir, or pass --overwrite_output_dir to replace it."
        )


def load_finished(folder: Path, task: Task) -> Any:
    """Load the model of a finished run.

    Raises:
        AdapterMismatchError: its base has other weights now, and the mend.
    """
    try:
        return load(folder, task).model
    except AdapterMismatchError as error:
        raise AdapterMismatchError(
            f'output_dir "{folder}" holds a finished run on another base ({str(error).partition(";")[0]}); choose '
            "another --output_dir, or pass --overwrite_output_dir to replace it."
        ) from error


def _differing(there: Mapping[str, Any] | None, here: Mapping[str, Any]) -> list[str]:
    """Names whose values differ; none if nothing was recorded."""
    if there is None:
        return []
    return [name for name in sorted({*there, *here}) if there.get(name) != here.get(name)]
