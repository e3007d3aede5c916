"""Measures of runs for tables and plots: short heads, units, means over runs."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from peft_lab.comparison.records.results import Record

#: Measure -> short head, unit that it is divided by, decimals.
SHOWN: dict[str, tuple[str, float, int]] = {
    "trainable_parameters": ("trainable parameters", 1, 0),
    "adapter_bytes": ("adapter KB", 1024, 0),
    "peak_memory_bytes": ("peak memory MB", 2**20, 0),
    "step_seconds": ("step ms", 1e-3, 1),
    "step_flops": ("step GFLOPs", 1e9, 2),
    "saved_bytes": ("saved MB", 2**20, 1),
    "ece": ("calibration error", 1, 3),
    "shifted_score": ("shifted score", 1, 3),
    "forgetting": ("forgetting", 1, 3),
}


def measured(records: Iterable[Record], name: str) -> float | None:
    """The mean of a measure over runs, None if none of them has it."""
    found = [float(value) for record in records if (value := record.measures.get(name)) is not None]
    return float(np.mean(found)) if found and np.isfinite(found).all() else None


def measure_head(name: str) -> str:
    """The short head of a measure, with its unit."""
    return SHOWN[name][0]


def scaled(name: str, value: float) -> float:
    """A measure in the unit that its head names."""
    return value / SHOWN[name][1]
