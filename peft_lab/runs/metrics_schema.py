"""Form of metrics.json, which a folder from anywhere may break."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict

from peft_lab.errors import ConfigError
from peft_lab.utils.schema import Schema, check

_Number = float | None


class _Part(Schema):
    """Mapping of which each key may be absent, and others may stand beside them."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)


class _Run(_Part):
    task: str | None = None
    method: str | None = None
    model_name_or_path: str | None = None
    model_revision: str | None = None
    dtype: str | None = None
    output_dir: str | None = None


class _Parameters(_Part):
    trainable: int = 0
    total: int = 0
    adapter: int | None = None


class _Pruning(_Part):
    by: str = ""
    share: float = 0.0
    structured: bool = False
    pruned: int = 0
    weights: int = 0


class _Data(_Part):
    task: str = ""
    version: str = ""
    task_file: str | None = None
    labels: int | None = None
    fingerprint: str = ""
    rows: Mapping[str, int] = {}


class _Export(_Part):
    title: str = ""
    rank: int = 0
    max_relative_error: float = 0.0


class _Metrics(_Part):
    run: _Run = _Run()
    metrics: Mapping[str, Mapping[str, _Number]] = {}
    main_metric: str = ""
    learning_rate: float = 0.0
    seed: int = 0
    global_step: int = 0
    base_revision: str | None = None
    parameters: _Parameters = _Parameters()
    pruning: _Pruning | None = None
    adapter_bytes: int = 0
    peak_memory_bytes: float = 0
    train_seconds: float = 0.0
    step_seconds: _Number = None
    data: _Data = _Data()
    method_config: Mapping[str, Any] = {}
    versions: Mapping[str, str] = {}
    device: str = ""
    lora_export: _Export = _Export()


#: What a run of peft-lab writes, and its card states.
_OF_A_RUN = (
    *("metrics", "main_metric", "learning_rate", "seed", "global_step", "parameters", "adapter_bytes"),
    *("peak_memory_bytes", "train_seconds", "data", "versions", "device"),
)


def check_form(metrics: Mapping[str, Any], where: str) -> None:
    """Check the types of what metrics of a run hold.

    Raises:
        ConfigError: a value that the metrics of no run have.
    """
    check(_Metrics, metrics, where, ConfigError)


def check_complete(metrics: Mapping[str, Any], where: str) -> None:
    """Check that metrics hold all that a model card states.

    Raises:
        ConfigError: naming what they lack.
    """
    needed = {
        "": _OF_A_RUN,
        "run": ("method", "model_name_or_path"),
        "parameters": ("trainable", "total"),
        "data": ("rows", "labels", "fingerprint"),
        "versions": ("peft-lab",),
    }
    for part, names in needed.items():
        found = metrics.get(part, {}) if part else metrics
        missing = [name for name in names if name not in found]
        if missing:
            owner = f'"{part}" of {where}' if part else where
            raise ConfigError(f"{owner} lacks {', '.join(missing)}, so no card can be made of it; train the run again.")
