"""Runs of a comparison: planned (`Run`) and ended (`Record`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from peft_lab.metrics import greater_is_better


@dataclass(frozen=True)
class RunInfo:
    """Identity, settings and state of a run.

    Attributes:
        id: hash of everything that decides the result.
        study: name of the study.
        stage: "search" if the run sees train and validation rows only, "final" if it is scored on the test rows.
        arm: label of the arm, a method with its arguments.
        method: name of the method.
        task: label of the task in the study; two labels may share a task (with other rows or options).
        backbone: the task's backbone, as the study names it.
        seed: seed of the run.
        learning_rate: learning rate of the run.
        status: "planned", "ok" or "failed".
        method_args: arguments of the method in this run, the tuned ones among them.
        tuned: method arguments that were searched along with the learning rate, as this run has them.
        round: number of the round of a successive halving, 0 for a grid's runs and for final runs.
        beyond: True if the search added the run because the best learning rate was the lowest or highest one tried.
        error: one sentence if the run failed, else "".
        started: UTC time, ISO 8601, "" until the run has ended.
        finished: UTC time, ISO 8601, "" until the run has ended.
        folder: the run's folder, relative to that of the comparison.
        options: the options of `peft-lab train` that repeat this run, without the output folder.
    """

    id: str
    study: str
    stage: str
    arm: str
    method: str
    task: str
    backbone: str
    seed: int
    learning_rate: float
    status: str
    method_args: Mapping[str, Any] = field(default_factory=dict)
    tuned: Mapping[str, Any] = field(default_factory=dict)
    round: int = 0
    beyond: bool = False
    error: str = ""
    started: str = ""
    finished: str = ""
    folder: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """True if the run ended with a result."""
        return self.status == "ok"


@dataclass(frozen=True)
class Run(RunInfo):
    """Planned run, with all that its process has to know.

    Attributes:
        shifted: task whose test rows are scored besides, "" for none.
        control: task on which forgetting is measured, "" for none.
        ood: task whose rows are to be told from those of the run, "" for none.
        cost: True if the FLOPs and kept activations of a training step are counted along with this run.
        launcher: flags of `accelerate launch` if that starts the run, else empty.
    """

    shifted: str = ""
    control: str = ""
    ood: str = ""
    cost: bool = False
    launcher: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Record(RunInfo):
    """Ended run, one line of results.jsonl.

    Attributes:
        metrics: the content of metrics.json; empty if the run failed.
        measures: name from `MEASURES` -> number.
        curves: "loss", "eval_loss", "eval_accuracy", ... -> pairs of step and value.
        environment: versions, device, threads, platform and the commit of a checkout.
    """

    metrics: Mapping[str, Any] = field(default_factory=dict)
    measures: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, list[list[float]]] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, run: Run, **outcome: Any) -> Record:
        """Build the record of a planned run.

        Args:
            run: the run.
            outcome: fields of the record that replace those of the run, or that the run does not have.
        """
        shared = {each.name: getattr(run, each.name) for each in fields(RunInfo)}
        return cls(**{**shared, **outcome})

    @property
    def main_metric(self) -> str:
        """Name of the task's first metric, "" for a failed run."""
        return str(self.metrics.get("main_metric", ""))

    @property
    def greater_is_better(self) -> bool:
        """True if more of the main metric is better."""
        return greater_is_better(self.main_metric)

    @property
    def scores(self) -> Mapping[str, Mapping[str, float]]:
        """Metrics by split and name, empty for a failed run."""
        found: Mapping[str, Mapping[str, float]] = self.metrics.get("metrics", {})
        return found

    def score(self, split: str = "test", metric: str = "") -> float | None:
        """Main metric, or the named one, on a split.

        Returns None if it was not computed there.
        """
        value = self.scores.get(split, {}).get(metric or self.main_metric)
        return None if value is None else float(value)

    @property
    def further_metrics(self) -> list[str]:
        """Names of the test metrics besides the main one and the loss."""
        main_or_loss = (self.main_metric, "loss")
        return [name for name in self.scores.get("test", {}) if name not in main_or_loss]

    @property
    def steps(self) -> int:
        """Training steps of the run, 0 if it failed."""
        return int(self.metrics.get("global_step") or 0)
