"""Scores of a run's baselines on the rows that the run is scored on."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel

from peft_lab.metrics.baselines import UNTOUCHED, Baseline
from peft_lab.training.trainer import scores

if TYPE_CHECKING:
    from peft_lab.data.kind import Kind
    from peft_lab.data.task_schema import Task
    from peft_lab.training.trainer import LabTrainer

logger = logging.getLogger("peft_lab")

#: Splits that a run is scored on.
SCORED = ("validation", "test")


def without_input(
    kind: Kind, task: Task, labels: Sequence[str] | None, rows: Mapping[str, Any], answered: bool = True
) -> dict[str, list[Baseline]]:
    """Baselines that see no input, by scored split.

    Args:
        kind, task, labels: of the run.
        rows: split -> preprocessed rows.
        answered: False if the run does not read the answers of its training rows.
    """
    found: dict[str, list[Baseline]] = {}
    for split in SCORED:
        if split not in rows:
            continue
        # a predictor that knows all training answers has none to know in a stream
        known = None if task.streaming or not answered else kind.baseline(task, labels, rows["train"], rows[split])
        guessed = kind.chance(task, labels, rows[split])
        found[split] = [each for each in (known, guessed) if each is not None]
    return found


def split_of_base(trainer: LabTrainer, kind: Kind, task: Task, rows: Mapping[str, Any], do_eval: bool) -> str | None:
    """Split on which the backbone as it was loaded is scored; None where it is not.

    These are the rows that decide: the test rows, or the validation rows of a task without test rows. A run that does
    not score its test rows, such as one of a search, does without, and so does a kind whose head starts at random.
    With several processes there is none either: an evaluation before the training changes what they train, and a model
    in parts (FSDP, DeepSpeed) cannot be evaluated before its training has been prepared.

    Args:
        trainer: the run's trainer.
        kind, task: of the run.
        rows: split -> rows.
        do_eval: True if the validation rows are scored.
    """
    split = "test" if task.has_test else "validation"
    scored = split in rows and (split == "test" or do_eval)
    alone = trainer.args.world_size == 1 and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
    return split if kind.info.source_head and scored and alone else None


def of_untouched_base(trainer: LabTrainer, rows: Any) -> Baseline:
    """Baseline of the backbone before the first step; it costs one evaluation.

    Args:
        trainer: the run's trainer, before the training.
        rows: preprocessed rows.
    """
    model = trainer.model
    base = model.disable_adapter() if isinstance(model, PeftModel) else contextlib.nullcontext()
    devices = [torch.cuda.current_device()] if trainer.args.device.type == "cuda" else []
    started = time.perf_counter()
    # a loader draws from torch's generator, and the training must not depend on this evaluation
    with torch.random.fork_rng(devices=devices), base:
        output = trainer.predict(rows, metric_key_prefix="base")
    found = Baseline(UNTOUCHED, scores(output.metrics or {}, "base_"), time.perf_counter() - started)
    logger.info("%s was scored on %d rows in %.1f s.", UNTOUCHED, len(rows), found.seconds)
    return found
