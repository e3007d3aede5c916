"""What a comparison leaves: one JSON line for each run in results.jsonl, and the items of each scored test row.

A folder of a comparison holds study.yaml, results.jsonl and `runs/ID`, one folder for each run: the adapter, its
metrics.json and, for a run that was scored on the test rows, items.csv. Imports nothing heavy.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from filelock import FileLock

from peft_lab.errors import ConfigError
from peft_lab.metrics import greater_is_better
from peft_lab.metrics.predictions import PREDICTIONS, Predictions, read_predictions

RESULTS, STUDY, COMPARISON, RUNS = "results.jsonl", "study.yaml", "comparison.json", "runs"


@dataclass(frozen=True)
class Measure:
    """What a number of `Record.measures` is.

    Attributes:
        title: words for a table's head.
        unit: "" for a plain number.
        higher_is_better: None if neither way is better in itself.
    """

    title: str
    unit: str = ""
    higher_is_better: bool | None = False


#: Every name that `Record.measures` may have, with its meaning. A record has those that could be measured.
MEASURES: dict[str, Measure] = {
    "trainable_parameters": Measure("trainable parameters"),
    "adapter_parameters": Measure("trainable parameters without the head"),
    "adapter_bytes": Measure("adapter file", "bytes"),
    "step_seconds": Measure("time of a training step (median)", "s"),
    "train_seconds": Measure("training time", "s"),
    "peak_memory_bytes": Measure("peak memory in training", "bytes"),
    "step_flops": Measure("FLOPs of a training step"),
    "saved_bytes": Measure("activations kept for backward", "bytes"),
    "ece": Measure("expected calibration error"),
    "shifted_score": Measure("main metric on the shifted test rows", higher_is_better=True),
    "shifted_drop": Measure("main metric lost on the shifted test rows"),
    "control_before": Measure("control task, base model", higher_is_better=None),
    "control_after": Measure("control task, adapted model", higher_is_better=None),
    "forgetting": Measure("forgetting on the control task"),
}


@dataclass
class Record:
    """One run of a comparison, as it stands in a line of results.jsonl.

    Attributes:
        id: hash of everything that decides the result.
        study: name of the study.
        stage: "search" for a run that only the validation rows saw, "final" for one that was scored on the test rows.
        arm: label of the arm: a method with its arguments.
        method, method_args: the method, and the arguments of this run (the tuned ones among them).
        task: label of the task in the study; two labels may share a task (with other rows or options).
        backbone: the task's backbone, as the study names it.
        seed: seed of the run.
        learning_rate: learning rate of the run.
        tuned: method arguments that were searched along with the learning rate, as this run has them.
        round: number of the round of a successive halving, 0 for a grid's runs and for final runs.
        beyond: whether the search made it because the best learning rate was the lowest or highest that was tried.
        status: "ok" or "failed".
        error: one sentence if it failed, else "".
        started, finished: UTC times, ISO 8601.
        folder: the run's folder, relative to that of the comparison.
        options: the options of `peft-lab train` that repeat this run, without the output folder.
        metrics: the content of metrics.json; empty if it failed.
        measures: name of `MEASURES` -> number.
        curves: "loss", "eval_loss", "eval_accuracy", ... -> pairs of step and value.
        environment: versions, device, threads, platform and the commit of a checkout.
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
    method_args: dict[str, Any] = field(default_factory=dict)
    tuned: dict[str, Any] = field(default_factory=dict)
    round: int = 0
    beyond: bool = False
    error: str = ""
    started: str = ""
    finished: str = ""
    folder: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    measures: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[list[float]]] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether the run ended with a result."""
        return self.status == "ok"

    @property
    def main_metric(self) -> str:
        """Name of the task's first metric ("" for a failed run)."""
        return self.metrics.get("main_metric", "")

    @property
    def greater_is_better(self) -> bool:
        """Whether more of the main metric is better."""
        return greater_is_better(self.main_metric)

    def score(self, split: str = "test", metric: str = "") -> float | None:
        """The main metric, or the one named, on a split; None if it was not taken there."""
        value = self.metrics.get("metrics", {}).get(split, {}).get(metric or self.main_metric)
        return None if value is None else float(value)

    @property
    def further_metrics(self) -> list[str]:
        """Names of the task's metrics on the test rows besides the main one; the loss is none of them."""
        taken = self.metrics.get("metrics", {}).get("test", {})
        return [name for name in taken if name not in (self.main_metric, "loss")]

    @property
    def steps(self) -> int:
        """Training steps of the run, 0 if it failed."""
        return int(self.metrics.get("global_step") or 0)


def read_results(folder: str | Path) -> list[Record]:
    """The records of a comparison in the order they were first written; a run that was repeated counts with its last.

    Runs that the study no longer has are left out, where comparison.json says which it has. A line that a killed
    process left half written at the end of the file is passed over.

    Raises:
        ConfigError: there is no results.jsonl, or a line in it is not a record.
    """
    path = Path(folder) / RESULTS
    if not path.is_file():
        raise ConfigError(f'"{folder}" holds no {RESULTS}; name the output_dir of a comparison.')
    journal = Journal(folder)
    journal.read()
    included = Path(folder) / COMPARISON
    if not included.is_file():
        return list(journal.records.values())
    ids = set(json.loads(included.read_text(encoding="utf-8"))["runs"])
    return [record for record in journal.records.values() if record.id in ids]


class Journal:
    """results.jsonl, read as it grows.

    Attributes:
        records: id -> record, the last one of each.
    """

    def __init__(self, folder: str | Path) -> None:
        self._path = Path(folder) / RESULTS
        self._position = self._lines = 0
        self.records: dict[str, Record] = {}

    def read(self) -> None:
        """Take in the lines that were added since the last time; one that is not complete is left for the next."""
        if not self._path.is_file():
            return
        with self._path.open("rb") as file:
            file.seek(self._position)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._position += len(line)
                self._lines += 1
                record = _record(line.decode("utf-8", errors="replace"), f'line {self._lines} of "{self._path}"')
                self.records[record.id] = record


def _record(line: str, where: str) -> Record:
    try:
        values = json.loads(line)
        known = {f.name for f in fields(Record)}
        return Record(**{name: value for name, value in values.items() if name in known})
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{where} is not a record of a comparison: {error}.") from error


def append_record(folder: str | Path, record: Record) -> None:
    """Add a record; when this returns, it is on the disk. Processes that write at once wait for one another."""
    path = Path(folder) / RESULTS
    line = json.dumps(asdict(record), ensure_ascii=False, default=str) + "\n"
    with FileLock(f"{path}.lock"):
        _cut_torn_line(path)
        with path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())


def repair(folder: str | Path) -> bool:
    """Cut off a last line that a killed process left half written; whether there was one."""
    path = Path(folder) / RESULTS
    with FileLock(f"{path}.lock"):
        return _cut_torn_line(path)


def _cut_torn_line(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        position = end
        while position:
            size = min(position, 1 << 16)
            file.seek(position - size)
            newline = file.read(size).rfind(b"\n")
            if newline >= 0:
                position = position - size + newline + 1
                break
            position -= size
        if position < end:
            file.truncate(position)
            os.fsync(file.fileno())
        return position < end


def read_items(folder: str | Path, record: Record) -> Predictions:
    """The items of a record's test rows.

    Raises:
        ConfigError: the run was not scored on the test rows, or its folder is gone.
    """
    return read_predictions(Path(folder) / record.folder / PREDICTIONS)


@dataclass(frozen=True)
class Spent:
    """What the search of one arm on one task and backbone cost.

    Attributes:
        trials: candidates that were tried.
        beyond: those of them that were tried because the best learning rate was the lowest or highest.
        runs: training runs (a candidate may have several, by rounds and seeds), failed ones included.
        steps: training steps of all these runs.
    """

    arm: str
    task: str
    backbone: str
    trials: int
    beyond: int
    runs: int
    steps: int


def overlapping(records: Iterable[Record]) -> bool:
    """Whether two runs were under way at the same time."""
    spans = sorted((record.started, record.finished) for record in records if record.started and record.finished)
    return any(later[0] < earlier[1] for earlier, later in itertools.pairwise(spans))


def search_budgets(records: Iterable[Record]) -> list[Spent]:
    """What the search of each arm cost, by task and backbone: the figures that show that no arm had more than another.

    A failed run counts with no steps. Without the records that are `beyond`, the budgets are those that all arms share.
    """
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        if record.stage == "search":
            groups.setdefault((record.arm, record.task, record.backbone), []).append(record)
    return [
        Spent(*key, _trials(runs), _trials(r for r in runs if r.beyond), len(runs), sum(run.steps for run in runs))
        for key, runs in groups.items()
    ]


def _trials(runs: Iterable[Record]) -> int:
    return len({_candidate(run) for run in runs})


def _candidate(record: Record) -> str:
    return json.dumps([record.learning_rate, record.tuned], sort_keys=True, default=str)
