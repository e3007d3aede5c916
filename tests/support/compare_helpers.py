"""What the tests of comparisons share: tiny studies, and a backend that makes up results instead of training."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from peft_lab.comparison.records.results import append_record
from peft_lab.comparison.records.run import Record, Run
from peft_lab.comparison.run.worker import Job, Start, record_of
from support import tiny_runs

#: Seconds that a made-up run takes before and after training.
OVERHEAD = 1.0


def tiny_study(folder: Path, **changes: Any) -> dict[str, Any]:
    """A study of two small arms on `tiny_runs`' task and backbone, which are made if they are not there."""
    backbone, task = folder / "backbone", folder / "task" / "topics.yaml"
    if not backbone.is_dir():
        tiny_runs.make_backbone(backbone)
        tiny_runs.make_task(task.parent)
    return {
        "name": "tiny",
        "tasks": [{"task": str(task), "model_name_or_path": str(backbone)}],
        "methods": ["head", "lora"],
        "seeds": 2,
        "search": {"strategy": "none"},
        "limits": {"max_steps": 3},
        "training": {"per_device_train_batch_size": 8, "use_cpu": True},
        **changes,
    }


def metrics_of(run: Run, score: float) -> dict[str, Any]:
    """The part of metrics.json that decides what a comparison does next."""
    splits = ["validation"] if run.stage == "search" else ["validation", "test"]
    return {
        "main_metric": "accuracy",
        "metrics": {split: {"accuracy": score, "loss": 1 - score} for split in splits},
        "global_step": run.options.get("max_steps", 0),
    }


class PretendBackend:
    """Records a result for each job without training.

    Args:
        score: run -> its main metric on every split; it may raise, as a process that dies does.
        workers: jobs at once.
        step_seconds: method -> time that a training step is said to take.
        sizes: method -> number of trainable parameters.
    """

    def __init__(
        self,
        score: Callable[[Run], float],
        workers: int = 2,
        step_seconds: Mapping[str, float] | None = None,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        self.score, self.workers = score, workers
        self.step_seconds, self.sizes = step_seconds or {}, sizes or {}
        self.runs: list[Run] = []

    def submit(self, job: Job) -> Future[None]:
        """Record the result of a job."""
        future: Future[None] = Future()
        run = job.run
        self.runs.append(run)
        try:
            values = {"status": "ok", "metrics": metrics_of(run, self.score(run)), "measures": self.measures(run)}
            # the times of the record are made up too, so that no test depends on the speed of the machine
            ended = datetime.now(timezone.utc)
            started = ended - timedelta(seconds=OVERHEAD + values["measures"]["train_seconds"])
            record = record_of(run, Start.now(), **values)
            append_record(job.folder, replace(record, started=started.isoformat(), finished=ended.isoformat()))
            future.set_result(None)
        except RuntimeError as error:
            future.set_exception(error)
        return future

    def measures(self, run: Run) -> dict[str, float]:
        """Times and sizes as a real run would have them."""
        step = self.step_seconds.get(run.method, 0.01)
        return {
            "step_seconds": step,
            "train_seconds": step * run.options.get("max_steps", 0),
            "trainable_parameters": self.sizes.get(run.method, 1000),
        }

    def close(self) -> None:
        """Nothing is left running."""


def record(arm: str, seed: int, stage: str = "final", task: str = "words", rate: float = 1e-3, **changes) -> Record:
    """A run with all that a report shows; `score` None makes it a failed one."""
    score = changes.pop("score", 0.9)
    name = re.sub(r"\W+", "-", f"{task}-{arm}-{stage}-{seed}-{rate}")
    scores = {"validation": {"accuracy": score}} | ({"test": {"accuracy": score}} if stage == "final" else {})
    metrics = {
        "metrics": scores,
        "main_metric": "accuracy",
        "global_step": 20,
        "data": {"labels": 2, "version": "1", "fingerprint": "abc", "rows": {"train": 50, "validation": 150}},
        "versions": {"torch": "2.13.0"},
    }
    values = {
        "id": name,
        "study": "study",
        "stage": stage,
        "arm": arm,
        "method": arm.split()[0],
        "task": task,
        "backbone": "tiny",
        "seed": seed,
        "learning_rate": rate,
        "status": "failed" if score is None else "ok",
        "error": "RuntimeError: it broke" if score is None else "",
        "started": f"2026-01-01T00:{len(name) % 60:02d}:00",
        "finished": f"2026-01-01T00:{len(name) % 60:02d}:00",
        "folder": f"runs/{name}",
        "options": {"task": task, "seed": seed},
        "metrics": {} if score is None else metrics,
        "measures": {}
        if score is None
        else {"trainable_parameters": 100 * len(arm), "step_seconds": 0.01, "ece": 0.02},
        "curves": {} if score is None else {"loss": [[1, 2.0], [10, 1.0]], "eval_accuracy": [[5, 0.5], [10, score]]},
        "environment": {"device": "a CPU"},
    }
    return Record(**{**values, **changes})
