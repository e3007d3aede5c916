"""A run of a comparison that is yet to be made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Run:
    """One run to be made; the fields are those of `Record`.

    Attributes:
        shifted, control: tasks of further measures, "" for none.
        beyond: whether the search made it because the best learning rate was the lowest or highest that was tried.
        cost: whether the FLOPs and kept activations of a step are counted along with this run.
        launcher: flags of `accelerate launch`, if that starts the run.
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
    method_args: Mapping[str, Any] = field(default_factory=dict)
    tuned: Mapping[str, Any] = field(default_factory=dict)
    round: int = 0
    beyond: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    shifted: str = ""
    control: str = ""
    cost: bool = False
    launcher: Mapping[str, Any] = field(default_factory=dict)
