"""Incremental protocol: classes or domains come session after session, and all that have come are told apart.

Class-incremental as in SLCA (arXiv 2303.05118), TEEN (2312.05229) and FeTrIL (2211.13131): after each session the
accuracy over all classes seen, in their joint label space, without rows of earlier sessions.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from peft_lab import registry
from peft_lab.data.further_columns import column_values
from peft_lab.data.splits import Splits, load_splits
from peft_lab.data.task_registry import kind as task_kind
from peft_lab.errors import ConfigError
from peft_lab.loading.load_run import Loaded
from peft_lab.protocols.incremental_metrics import step_metrics, summary
from peft_lab.protocols.incremental_options import IncrementalOptions
from peft_lab.protocols.incremental_report import RESULTS, write_report
from peft_lab.protocols.learners import (
    AdapterLearner,
    EstimatorLearner,
    FeatureReader,
    Learner,
    frozen_backbone,
    is_estimator,
    make_estimator,
)
from peft_lab.protocols.sessions import Session, order_of, sessions_of
from peft_lab.runs.run_config import dump_yaml, read_run_file
from peft_lab.training.model_rows import chosen_rows
from peft_lab.utils import strict_json
from peft_lab.utils.atomic_files import write_errors, write_text
from peft_lab.utils.interruption import going_on
from peft_lab.utils.versions import device_name, versions

logger = logging.getLogger("peft_lab")

Array = Any

#: File with the options of a protocol.
OPTIONS = "incremental.yaml"


@dataclass(frozen=True)
class Part:
    """Rows of a split, with the class or domain by which sessions come.

    Attributes:
        rows: with encoded labels.
        groups: class or domain of each row, whole numbers (rows,).
        labels: class of each row (rows,).
    """

    rows: Any
    groups: Array
    labels: Array


@dataclass(frozen=True)
class IncrementalResult:
    """Result of a protocol.

    Attributes:
        output_dir: folder with results.jsonl, results.csv, report.md, report.json and the curve.
        records: one for each method and order.
        table: rows of the report, as `incremental_report.summary_rows` gives them.
    """

    output_dir: Path
    records: list[dict[str, Any]]
    table: list[dict[str, Any]]


def incremental(values: Mapping[str, Any] | str | Path, **options: Any) -> IncrementalResult:
    """Carry out an incremental protocol, or go on with one that was stopped.

    Args:
        values: options as `incremental_options.HELP` names them and those of `train` for adapters, or a YAML file.
        options: options that override them.

    Raises:
        ConfigError, TaskError: an option or the data are not what they should be.
        WriteError: the folder cannot be written.
    """
    given = read_run_file(values) if isinstance(values, str | Path) else dict(values)
    found = IncrementalOptions.from_mapping({**given, **options})
    folder = Path(found.own.output_dir).expanduser()
    hint = "Stopped; the same command goes on with the next method and order."
    with write_errors(folder), _claimed(folder, found), going_on(lambda: hint):
        return _carry_out(found, folder)


def _carry_out(options: IncrementalOptions, folder: Path) -> IncrementalResult:
    protocol = _Protocol(options)
    records = read_records(folder)
    done = {(record["method"], record["order"]) for record in records}
    for order in options.own.orders:
        for method in options.own.method:
            if (method, order) in done:
                continue
            record = protocol.run(method, order)
            records.append(record)
            with (folder / RESULTS).open("a", encoding="utf-8") as file:
                file.write(strict_json.dumps(record) + "\n")
            logger.info("%s, order %s: average %.4f, last %.4f.", method, order, record["average"], record["last"])
            write_report(folder, records, options.to_dict(), protocol.facts, draws=False)
    # also where there was nothing left to do, so that a report that was lost is made again
    table = write_report(folder, records, options.to_dict(), protocol.facts)
    return IncrementalResult(folder, records, table)


class _Protocol:
    """Data, backbone and learners of a protocol; what is expensive is made when it is first asked for."""

    def __init__(self, options: IncrementalOptions) -> None:
        self.options, self.task = options, options.task
        self.kind = task_kind(self.task.kind)
        self.config = options.run_config(options.own.adapter or options.own.method[0])
        splits = load_splits(self.task, test=self.task.has_test)
        self.labels = list(splits.labels or ())
        self.names = self.labels
        self.train, self.test = self._parts(splits)
        self._frozen: Loaded | None = None
        self._reader: FeatureReader | None = None
        self._adapted: tuple[str, AdapterLearner, FeatureReader] | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """What a report says of the data and the machine."""
        rows = {"train": len(self.train.labels), "test": len(self.test.labels)}
        return {"groups": self.names, "rows": rows, "versions": versions(), "device": device_name()}

    def _parts(self, splits: Splits) -> tuple[Part, Part]:
        seed = int(self.config.training_arguments.get("seed", 42))
        rows = chosen_rows(self.config, splits, seed)
        tested = "test" if "test" in rows else "validation"
        if tested == "validation":
            logger.warning('Task "%s" has no test rows: sessions are scored on the validation rows.', self.task.name)
        column = self.options.own.domain_column
        found = {}
        for split in ("train", tested):
            labels = np.asarray(rows[split]["label"][:])
            groups = labels
            if column is not None:
                values, _ = column_values(self.task, split, column, "domain", rows[split])
                if split == "train":
                    self.names = sorted({str(value) for value in values})
                groups = self._domains([str(value) for value in values], split)
            found[split] = Part(rows[split], groups, labels)
        return found["train"], found[tested]

    def _domains(self, values: Sequence[str], split: str) -> Array:
        unknown = sorted(set(values) - set(self.names))
        if unknown:
            raise ConfigError(
                f'domain_column: the {split} rows have the domain "{unknown[0]}", which no training row has; leave its '
                "rows out."
            )
        places = {name: place for place, name in enumerate(self.names)}
        return np.asarray([places[value] for value in values])

    def learner(self, method: str, order: str) -> Learner:
        """Fresh learner of a method.

        An adapter that is trained on the first session alone is the same for all estimators of an order, so they share
        it: the first of them trains it.
        """
        own = self.options.own
        if not (registry.method(method).place == "head" and is_estimator(method)):
            return AdapterLearner(self.options.run_config(method), self.frozen)
        estimator = make_estimator(method, own.method_args)
        if own.adapter is None:
            return EstimatorLearner(estimator, self.reader)
        if own.adapt == "each":
            adapter = AdapterLearner(self.options.run_config(own.adapter), self.frozen)
            return EstimatorLearner(estimator, adapter=adapter, each=True)
        if self._adapted is None or self._adapted[0] != order:
            adapter = AdapterLearner(self.options.run_config(own.adapter), self.frozen)
            self._adapted = order, adapter, FeatureReader(adapter.loaded, adapter.batch_size)
        _, adapter, reader = self._adapted
        return EstimatorLearner(estimator, reader, adapter)

    @property
    def frozen(self) -> Loaded:
        """The frozen backbone, with processor, task and labels."""
        if self._frozen is None:
            folder = Path(self.options.own.output_dir)
            self._frozen = frozen_backbone(self.config, self.kind, self.task, self.labels, folder)
        return self._frozen

    @property
    def reader(self) -> FeatureReader:
        """Features of the frozen backbone, shared by all estimators and orders."""
        if self._reader is None:
            size = int(self.config.training_arguments.get("per_device_eval_batch_size", 32))
            self._reader = FeatureReader(self.frozen, size)
        return self._reader

    def run(self, method: str, order: str) -> dict[str, Any]:
        """Record of one method and order."""
        own = self.options.own
        what = "domains" if own.domain_column else "classes"
        sessions = sessions_of(order_of(len(self.names), order), own.steps, own.base_classes, what)
        started = time.perf_counter()
        learner = self.learner(method, order)
        steps = run_sessions(learner, self.train, self.test, sessions, own.shots, _seed(order))
        seconds = time.perf_counter() - started
        groups = [list(session.groups) for session in sessions]
        kept = isinstance(learner, EstimatorLearner) and learner.keeps_features
        named: dict[str, Any] = {"method": method, "order": order, "sessions": groups, "keeps_features": kept}
        return named | summary(steps) | {"steps": steps, "seconds": seconds}


def run_sessions(
    learner: Learner, train: Part, test: Part, sessions: Sequence[Session], shots: int | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """Metrics after each session (`step_metrics`).

    Args:
        learner: is given the training rows of one session after the other.
        train, test: the rows.
        sessions: classes or domains of each.
        shots: training rows of each class in the sessions but the first, drawn by `seed`; None for all.

    Raises:
        ConfigError: a session without training or test rows.
    """
    steps: list[dict[str, Any]] = []
    for number, session in enumerate(sessions):
        places = np.flatnonzero(np.isin(train.groups, session.groups))
        if shots is not None and number:
            places = _few(places, train.labels, shots, seed + number)
        come = [each.groups for each in sessions[: number + 1]]
        scored = np.flatnonzero(np.isin(test.groups, np.concatenate(come)))
        for what, found in (("training", places), ("test", np.flatnonzero(np.isin(test.groups, session.groups)))):
            if not len(found):
                raise ConfigError(f"Session {number + 1} has no {what} rows; give fewer steps, or more rows.")
        seen = _seen_classes(train, come)
        learner.learn(train.rows, places, seen)
        right = learner.predict(test.rows, scored, seen) == test.labels[scored]
        steps.append(step_metrics(right, test.groups[scored], come))
    return steps


def _seen_classes(train: Part, come: Sequence[tuple[int, ...]]) -> list[int]:
    """Classes of the training rows of all sessions that have come."""
    return sorted({int(label) for label in train.labels[np.isin(train.groups, np.concatenate(come))]})


def _few(places: Array, labels: Array, shots: int, seed: int) -> Array:
    """At most so many rows of each class, drawn by the seed."""
    shuffled = np.random.default_rng(seed).permutation(places)
    kept = [shuffled[labels[shuffled] == label][:shots] for label in np.unique(labels[places])]
    return np.sort(np.concatenate(kept))


def _seed(order: str) -> int:
    return int(order) if order.isdecimal() else 0


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Records in a folder; a line that a kill has cut is left out and removed.

    Raises:
        ConfigError: a line that is no record.
    """
    path = folder / RESULTS
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_text(path, whole)
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
        raise ConfigError(
            f'"{path}" holds a line that is no record: {error}; remove the file to start anew.'
        ) from error


@contextmanager
def _claimed(folder: Path, options: IncrementalOptions) -> Iterator[None]:
    """Keep the folder for this process, and compare the options with those that it was begun with.

    Raises:
        ConfigError: another process or other options.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{OPTIONS}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ConfigError(f'"{folder}" is in use by another process; wait for it, or choose another folder.') from error
    try:
        _begin(folder, options)
        yield
    finally:
        lock.release()


def _begin(folder: Path, options: IncrementalOptions) -> None:
    path, now = folder / OPTIONS, _plain(options.to_dict())
    if path.is_file() and not options.own.overwrite_output_dir:
        then = _plain(read_run_file(path))
        # further methods and orders may join those that are done
        differing = sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key))
        differing = [key for key in differing if key not in ("method", "orders")]
        if differing:
            raise ConfigError(
                f'output_dir "{folder}" holds results with other options ({", ".join(differing)}); choose another '
                "folder, or pass --overwrite_output_dir to replace them."
            )
    elif (folder / RESULTS).is_file():
        if not options.own.overwrite_output_dir:
            raise ConfigError(f'output_dir "{folder}" holds results of something else; choose another folder.')
        (folder / RESULTS).unlink()
    write_text(path, dump_yaml(now))


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as JSON keeps them, so that those of a file can be compared."""
    found: dict[str, Any] = json.loads(json.dumps(dict(values), default=str))
    return found
