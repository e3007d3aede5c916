"""Run of several processes by `accelerate launch`, for large models.

The processes may outlive the one that started them if that is killed. They hold a lock of their own, so a comparison
that is started again waits for them instead of training the same run a second time.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_lab.errors import PeftLabError
from peft_lab.runs import run_folder
from peft_lab.runs.run_config import dump_yaml
from peft_lab.training.launch import find_config, process_options, read_config
from peft_lab.utils.accelerate_launch import launch
from peft_lab.utils.atomic_files import write_text


def train_launched(options: Mapping[str, Any], launcher: Mapping[str, Any], place: Path) -> dict[str, Any]:
    """Train by `accelerate launch`; returns the content of metrics.json.

    Args:
        options: options of the run.
        launcher: `{"accelerate": flags}`, the flags as `accelerate launch --help` lists them, without dashes;
            `config_file` may be the name of a config that is shipped.
        place: the run's folder; the options and the lock are written beside it.

    Raises:
        PeftLabError: the processes ended with an error; their output is in the run's log.
    """
    file = place.with_name(f"{place.name}.yaml")
    flags, options = dict(launcher["accelerate"]), dict(options)
    if "config_file" in flags:
        flags["config_file"] = path = find_config(str(flags["config_file"]))
        options |= process_options(read_config(path))
    write_text(file, dump_yaml(options))
    code = launch(flags, ["train", str(file)], lock=place.with_name(f"{place.name}.launch"))
    # a launch that left no metrics has failed too
    if code or not (place / run_folder.METRICS).is_file():
        reason = _last_error(place.with_name(f"{place.name}.log"))
        raise PeftLabError(f"accelerate launch ended with exit code {code}; {reason}its output is in {place.name}.log.")
    return run_folder.read_metrics(place)


def _last_error(log: Path) -> str:
    """Last error that the launched command printed; "" without one."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    told = [line.partition("Error:")[2].strip() for line in lines if line.startswith("Error:")]
    return f'it said "{told[-1]}"; ' if told else ""
