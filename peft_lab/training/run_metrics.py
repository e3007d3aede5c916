"""Entries of a run's metrics.json: parameter counts, data and class of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel

from peft_lab.backbones.sharded_weights import whole_shape
from peft_lab.data.splits import Splits
from peft_lab.loading.load_run import count_parameters
from peft_lab.runs import own_tasks
from peft_lab.training.trainer import LabTrainer

if TYPE_CHECKING:
    from peft_lab.data.task_schema import Task


def parameter_counts(trainer: LabTrainer) -> dict[str, int]:
    """Count the parameters of a run's model: trainable ones, those of the adapter, and all."""
    trainable, total = count_parameters(trainer.model)
    # methods are compared by the parameters of the adapter, without those of the task head
    head = {id(parameter) for parameter in trainer.head_parameters(trainer.model)}
    trained = [each for each in trainer.model.parameters() if each.requires_grad and id(each) not in head]
    adapter = sum(whole_shape(parameter).numel() for parameter in trained)
    return {"trainable": trainable, "adapter": adapter, "total": total}


def data_record(
    task: Task, own: Path | None, labels: Sequence[str] | None, splits: Splits, rows: Mapping[str, Any]
) -> dict[str, Any]:
    """Record of what a run was trained and scored on.

    Args:
        task: its task.
        own: the task file, if it is the user's own.
        labels: names of the classes; None without classes.
        splits: all rows of the task.
        rows: split -> the rows that the run used.
    """
    return {
        "task": task.name,
        "version": task.version,
        "task_file": own_tasks.digest(own) if own else None,
        "labels": _outputs(task, labels),
        "fingerprint": splits.fingerprint,
        "fingerprints": splits.fingerprints,
        "rows": {name: len(part) for name, part in rows.items() if isinstance(part, Sized)},
        "streaming": task.streaming,
    }


def class_name(model: Any) -> str:
    """Dotted name of the class that an adapter was put on, which loads the base again."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return f"{type(base).__module__}.{type(base).__qualname__}"


def _outputs(task: Task, labels: Sequence[str] | None) -> int | None:
    """Number of outputs of the task head; None without one."""
    if labels:
        return len(labels)
    return 1 if task.problem_type == "regression" else None
