"""Options of an incremental protocol, read and checked without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal

from pydantic import Field

from peft_lab import registry
from peft_lab.data.task_registry import kind as task_kind
from peft_lab.data.task_registry import validate_task
from peft_lab.data.task_schema import Task
from peft_lab.errors import ConfigError, did_you_mean
from peft_lab.protocols.sessions import NATURAL, order_of
from peft_lab.runs.run_config import RunConfig, convert, read_pairs, training_argument_fields
from peft_lab.utils.schema import Schema, check

#: Class orders of SLCA, the usual ones.
ORDERS = ("1993", "1996", "1997")

#: Options that are the protocol's own -> help.
HELP = {
    "task": "Name of a task of classes, or the path of a task file.",
    "model_name_or_path": "Backbone, as for train.",
    "method": "Methods that are compared: estimators of features, and adapters that are trained session by session.",
    "output_dir": "Folder of the results; the same command goes on where it was stopped.",
    "method_args": "Fields of the method's config, if there is one method: --method_args metric=cosine",
    "steps": "Number of sessions, the first one included.",
    "base_classes": "Classes of the first session; as many as in the others by default.",
    "shots": "Rows of each class in all sessions but the first, drawn by the order's seed; all by default.",
    "orders": f"Orders of the classes: seeds, or {NATURAL} for that of the task ({' '.join(ORDERS)} by default).",
    "domain_column": "Column of the data that names the domain of each row: sessions then bring domains, not classes.",
    "adapter": "Adapter below the estimators, such as ssf; its training flags are those of train.",
    "adapter_args": "Fields of the adapter's config: --adapter_args r=8",
    "adapt": "When the adapter is trained: first (on the first session) or each (on every one).",
    "overwrite_output_dir": "Replace the results that stand in output_dir.",
}
#: Those that take several values.
SEVERAL = ("method", "method_args", "adapter_args", "orders")

#: Options of `train` that have no meaning here.
_REFUSED = {
    "do_eval": "sessions are scored on the test rows",
    "do_predict": "sessions are scored on the test rows",
    "early_stopping_patience": "a session has no validation rows",
    "packing": "classes are not packed",
    "prune": "sessions are learned on the dense base",
    "alternating_every": "no rows are held out",
    "row_weight_column": "rows are not weighted",
    "reference_model": "rows are not weighted",
    "unsupervised": "sessions train on the labels of their rows",
    "resume_from_checkpoint": "the protocol goes on by itself",
    "push_to_hub": "there is no adapter to push",
}


def is_protocol(values: Mapping[str, Any]) -> bool:
    """Test whether the mapping of a YAML file is an incremental protocol."""
    return "steps" in values


class _Protocol(Schema):
    """Keys of the protocol's own options."""

    task: str
    model_name_or_path: str
    method: list[str] = Field(min_length=1)
    output_dir: str
    steps: int = Field(ge=2)
    base_classes: int | None = Field(default=None, ge=1)
    shots: int | None = Field(default=None, ge=1)
    orders: list[str] = Field(default=list(ORDERS), min_length=1)
    domain_column: str | None = None
    adapter: str | None = None
    adapt: Literal["first", "each"] = "first"
    method_args: dict[str, Any] = Field(default_factory=dict)
    adapter_args: dict[str, Any] = Field(default_factory=dict)
    overwrite_output_dir: bool = False


@dataclass(frozen=True)
class IncrementalOptions:
    """Options of a protocol.

    Attributes:
        own: those of the protocol, as `HELP` names them.
        training: those of `peft-lab train`, for adapters.
    """

    own: _Protocol
    training: Mapping[str, Any]

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], where: str = "the protocol") -> IncrementalOptions:
        """Read flat values, and check them without torch.

        Raises:
            ConfigError: a value that none can have, or an option that has no meaning here.
            TaskError: the task is not what it should be.
        """
        given: dict[str, Any] = {name: value for name, value in values.items() if name in HELP and value is not None}
        for name in ("method_args", "adapter_args"):
            given[name] = read_pairs(name, given.get(name))
        for name in ("method", "orders"):
            if name in given:
                listed = given[name] if isinstance(given[name], list | tuple) else [given[name]]
                given[name] = [str(value) for value in listed]
        for name, kind in {
            "steps": "int",
            "base_classes": "int",
            "shots": "int",
            "overwrite_output_dir": "bool",
        }.items():
            if name in given:
                given[name] = convert(name, kind, given[name])
        training = {name: value for name, value in values.items() if name not in HELP}
        of_runs = (*(spec.name for spec in fields(RunConfig)), *training_argument_fields())
        unknown = next((name for name in training if name not in of_runs), None)
        if unknown is not None:
            raise ConfigError(f'Unknown option "{unknown}" in {where}.{did_you_mean(unknown, [*HELP, *of_runs])}')
        for name, reason in _REFUSED.items():
            if training.get(name) not in (None, False):
                raise ConfigError(f"{name} has no meaning in {where}: {reason}; leave it out.")
        found = cls(check(_Protocol, given, where, ConfigError), training)
        found.check()
        return found

    def check(self) -> None:
        """Check names and values against each other.

        Raises:
            ConfigError, TaskError: as `from_mapping`.
        """
        own, task = self.own, self.task
        if not task.has_classes or task_kind(task.kind).predicts_tokens:
            raise ConfigError(f'Task "{task.name}" has no single class for each row, by which sessions come.')
        if task.streaming:
            raise ConfigError(f'Task "{task.name}" is streamed, and sessions need all rows; store it first.')
        for name in own.orders:
            order_of(1, name)
        for what, listed in (("method", own.method), ("orders", own.orders)):
            double = next((each for each in listed if listed.count(each) > 1), None)
            if double is not None:
                raise ConfigError(f'{what} names "{double}" twice; name it once.')
        if own.domain_column and own.base_classes:
            raise ConfigError(
                "base_classes counts classes, and domain_column makes sessions of domains; leave one out."
            )
        if own.method_args and len(own.method) > 1:
            raise ConfigError(f"method_args are for one method, and {len(own.method)} are named; name one of them.")
        if own.adapter_args and own.adapter is None:
            raise ConfigError("adapter_args have no effect without adapter; give both.")
        # of all methods, so that a name is known to be wrong before anything is loaded
        for name in (*own.method, *([own.adapter] if own.adapter else [])):
            self.run_config(name).check()
        if own.adapter and registry.method(own.adapter).place == "head":
            raise ConfigError(f'adapter "{own.adapter}" acts on the head alone, so features stay as they are.')

    @cached_property
    def task(self) -> Task:
        """Task of the protocol."""
        return validate_task(self.own.task)

    def run_config(self, method: str) -> RunConfig:
        """Options of a run of one of the methods."""
        own = self.own
        args = own.adapter_args if method == own.adapter and method not in own.method else own.method_args
        named = {"task": own.task, "model_name_or_path": own.model_name_or_path, "output_dir": own.output_dir}
        return RunConfig.from_mapping({**self.training, **named, "method": method, "method_args": args}, "the protocol")

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `from_mapping` reads back, without where they are written."""
        values = self.own.model_dump(exclude_none=True, exclude={"output_dir", "overwrite_output_dir"})
        return {name: value for name, value in values.items() if value != {}} | dict(self.training)
