"""Parts of a study: arms, cells, search and limits.

Imports nothing heavy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field, model_validator

from peft_lab import registry
from peft_lab.runs.optimization import RATES
from peft_lab.utils.schema import Number, Schema

#: Options of a run unless the study says otherwise.
DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "warmup_steps": 0.1,
    "disable_tqdm": True,
}


#: Further tasks of a cell, on which final runs are measured.
FURTHER = ("shifted", "control", "ood")


@dataclass(frozen=True)
class Arm:
    """Arm of a comparison: a method with its arguments.

    Attributes:
        label: its name in tables; the method's name with the values of a grid, if it has no name of its own.
        args: arguments that all its runs have.
        tune: argument -> values that are searched along with the learning rate, the first one being the default.
        learning_rates: the ones to try; empty for a grid around the method's own.
        size: the argument that sets its number of parameters, for `limits: {trainable_parameters: ...}`.
        training: run options of its own, which belong to the recipe of its method.
    """

    label: str
    method: str
    args: Mapping[str, Any] = field(default_factory=dict)
    tune: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    learning_rates: tuple[float, ...] = ()
    size: str = ""
    training: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """Task on a backbone, on which the arms are compared.

    Attributes:
        task: the task's label in this study.
        source: name or absolute path of the task.
        backbone: its backbone.
        options: run options of this task alone.
        shifted, control, ood: tasks of further measures ("" for none), see `peft_lab.comparison.run.measures`.
        learning_rates: by the label of an arm those that it tries here, in place of its own: backbones differ in the
            rates that they want.
    """

    task: str
    source: str
    backbone: str
    options: Mapping[str, Any] = field(default_factory=dict)
    shifted: str = ""
    control: str = ""
    ood: str = ""
    learning_rates: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


class Search(Schema):
    """Search of learning rates and tuned arguments.

    Every arm has equally many trials.

    Attributes:
        strategy: "grid" trains each candidate in full; "halving" starts with all of them and a part of the steps, and
            lets the best 1/`factor` go on to `factor` times the steps; "none" takes the method's default.
        trials: candidates of each arm.
        seeds: runs of each candidate.
        max_steps: steps of a full training in the search; by default those of the final runs. A task with `max_steps`
            of its own is searched with the same part of them.
        extend: candidates that an arm gets besides, one after another, as long as its best learning rate is the lowest
            or the highest that it has tried. The right to them is every arm's, so only the trials are equally many.
    """

    strategy: Literal["grid", "halving", "none"] = "grid"
    trials: int = Field(default=3, ge=1)
    seeds: int = Field(default=1, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    factor: int = Field(default=2, ge=2)
    extend: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _check_rounds(self) -> Search:
        if self.strategy == "halving" and self.trials < 2 * self.factor:
            raise ValueError(
                f"Halving by {self.factor} needs at least {2 * self.factor} trials to have two rounds, got "
                f"{self.trials}; use the strategy grid for fewer."
            )
        return self


class Limits(Schema):
    """Limits of all arms: steps or seconds of training, and trainable parameters.

    Attributes:
        max_steps: training steps of every run (a task's own `max_steps` goes before it).
        seconds: time of training steps of every run.
        trainable_parameters: each arm's size argument is set to the largest value that stays within this number of
            trainable parameters, the task head included.
    """

    max_steps: int | None = Field(default=None, ge=1)
    seconds: Number | None = Field(default=None, gt=0, allow_inf_nan=False)
    trainable_parameters: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _check_one_length(self) -> Limits:
        if self.max_steps is not None and self.seconds is not None:
            raise ValueError('"limits" may set max_steps or seconds, not both.')
        return self


@dataclass(frozen=True)
class Study:
    """Plan of a comparison: every arm on every cell.

    The search is on the validation rows, the final runs are scored on the test rows.
    """

    name: str
    cells: tuple[Cell, ...]
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    search: Search = field(default_factory=Search)
    limits: Limits = field(default_factory=Limits)
    training: Mapping[str, Any] = field(default_factory=dict)
    launcher: Mapping[str, Any] = field(default_factory=dict)

    def options(self, cell: Cell, arm: Arm) -> dict[str, Any]:
        """Options of all runs of an arm on a cell.

        Learning rate, seed and output folder are left out.
        """
        limits = _filled(max_steps=self.limits.max_steps, max_seconds=self.limits.seconds)
        # the narrower setting goes last: limits hold for all tasks, a task's options for it alone
        found = {**DEFAULTS, **self.training, **limits, **cell.options}
        if arm.method == "head":  # the rate of all that it trains is the one that is searched
            found = {name: value for name, value in found.items() if name not in RATES}
        # a part of the steps, unless their number is unknown beforehand
        found.setdefault("logging_steps", 10 if "max_seconds" in found else 0.05)
        # checkpoints are not needed where the last state is the result
        if not {"early_stopping_patience", "load_best_model_at_end"} & found.keys():
            found.setdefault("save_strategy", "no")
        return {
            "task": cell.source,
            "model_name_or_path": cell.backbone,
            "method": arm.method,
            "method_args": dict(arm.args),
            **found,
            **arm.training,
        }

    def learning_rates(self, cell: Cell, arm: Arm) -> tuple[float, ...]:
        """Learning rates that the study gives an arm on a cell.

        Without any, they are chosen around the method's default.
        """
        return cell.learning_rates.get(arm.label, arm.learning_rates)

    def search_steps(self, cell: Cell) -> int | None:
        """Steps of a full training in the search on a cell.

        Returns None if they are those of its final runs.
        """
        steps, limit, own = self.search.max_steps, self.limits.max_steps, cell.options.get("max_steps")
        # the search gets the same fraction on a task with a length of its own
        return max(1, round(steps * own / limit)) if steps and limit and own else steps

    def _search(self) -> dict[str, Any]:
        if self.search.strategy == "none":
            return {"strategy": "none"}
        return self.search.model_dump(exclude_none=True, exclude=set() if self.search.extend else {"extend"})

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `from_mapping` reads back.

        Paths are absolute, grids are written out as arms.
        """
        return {
            "name": self.name,
            "tasks": [_cell_values(cell) for cell in self.cells],
            "methods": [_arm_values(arm) for arm in self.arms],
            "seeds": list(self.seeds),
            "search": self._search(),
            **_filled(limits=self.limits.model_dump(exclude_none=True)),
            **_filled(training=dict(self.training), launcher=dict(self.launcher)),
        }


def is_grid(method: str, name: str, value: Any) -> bool:
    """Test whether a value of `args` is a list of alternatives.

    Of an argument that is itself a list, only a list of lists is.
    """
    if not isinstance(value, list):
        return False
    field_ = registry.config_fields(method).get(name)
    takes_list = field_ is not None and re.search(r"list|sequence|tuple|set\[", field_.annotation, re.IGNORECASE)
    return all(isinstance(item, list) for item in value) if takes_list else True


def _single(arm: Arm) -> dict[str, Any]:
    """Arguments of an arm, none of them readable as a grid."""
    single = dict(arm.args)
    for name, value in arm.args.items():
        if is_grid(arm.method, name, value):
            single[name] = [value]
    return single


def _filled(**values: Any) -> dict[str, Any]:
    # not a test of truth, because 0 and False are values
    return {key: value for key, value in values.items() if value not in (None, "", [], {}, ())}


def _cell_values(cell: Cell) -> dict[str, Any]:
    rates = {arm: list(values) for arm, values in cell.learning_rates.items()}
    named = {"task": cell.source, "name": cell.task, "model_name_or_path": cell.backbone}
    further = {name: getattr(cell, name) for name in FURTHER}
    return {**named, **cell.options, **_filled(**further, learning_rates=rates)}


def _arm_values(arm: Arm) -> dict[str, Any]:
    return _filled(
        method=arm.method,
        name=arm.label,
        args=_single(arm),
        tune={name: list(values) for name, values in arm.tune.items()},
        learning_rates=list(arm.learning_rates),
        size=arm.size,
        training=dict(arm.training),
    )
