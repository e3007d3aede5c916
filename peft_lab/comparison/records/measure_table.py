"""Measures of a run besides its metrics: names, meanings, units, means."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from peft_lab.comparison.records.run import Record
from peft_lab.metrics.out_of_distribution import SCORES


@dataclass(frozen=True)
class Measure:
    """Meaning and display of a number in `Record.measures`.

    Attributes:
        title: meaning, in words.
        head: short title with the display unit, for tables and axes; "" if the measure is in neither.
        unit: display unit, in the unit of the number.
        decimals: decimals of the displayed number.
    """

    title: str
    head: str = ""
    unit: float = 1.0
    decimals: int = 0

    def scaled(self, value: float) -> float:
        """Value in the display unit."""
        return value / self.unit

    def text(self, value: float) -> str:
        """Value as displayed, two digits at least."""
        shown = self.scaled(value)
        # a small number would be shown as 0
        vanishes = 0 < abs(shown) < 0.5 / 10**self.decimals
        return f"{shown:.2g}" if vanishes else f"{shown:,.{self.decimals}f}"


def _out_of_distribution() -> dict[str, Measure]:
    """Measures of each score for out-of-distribution rows; they have a table of their own."""
    found: dict[str, Measure] = {}
    for name, title in SCORES.items():
        found[f"ood_{name}_auroc"] = Measure(f"AUROC of out-of-distribution rows by {title}", decimals=3)
        found[f"ood_{name}_fpr95"] = Measure(
            f"out-of-distribution rows taken for the task's by {title}, where 95 % of the task's are", decimals=3
        )
    return found


#: Every name that `Record.measures` may have. A record has those that could be measured.
MEASURES: dict[str, Measure] = {
    "trainable_parameters": Measure("trainable parameters", "trainable parameters"),
    "adapter_parameters": Measure("trainable parameters without the head"),
    "adapter_bytes": Measure("adapter file", "adapter KB", 1024),
    "peak_memory_bytes": Measure("peak memory in training", "peak memory MB", 2**20),
    "train_seconds": Measure("training time"),
    "step_seconds": Measure("time of a training step (median)", "step ms", 1e-3, 1),
    "step_flops": Measure(
        "FLOPs of a training step, its pass through the backbone included where features are computed once",
        "step GFLOPs",
        1e9,
        2,
    ),
    "saved_bytes": Measure("activations kept for backward", "saved MB", 2**20, 1),
    "ece": Measure("expected calibration error", "calibration error", decimals=3),
    "shifted_score": Measure("main metric on the shifted test rows", "shifted score", decimals=3),
    "shifted_drop": Measure("main metric lost on the shifted test rows"),
    "control_before": Measure("control task, base model"),
    "control_after": Measure("control task, adapted model"),
    "forgetting": Measure("forgetting on the control task", "forgetting", decimals=3),
    **_out_of_distribution(),
}


def mean_measure(records: Iterable[Record], name: str) -> float | None:
    """Mean of a measure over the runs that have it.

    Returns None if no run has it, or a value is not finite.
    """
    known = [record.measures[name] for record in records if name in record.measures]
    # a mean over the finite values alone would hide a run that diverged; null stands for its value
    values = np.asarray([np.nan if value is None else value for value in known])
    return float(values.mean()) if known and np.isfinite(values).all() else None
