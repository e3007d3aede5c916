"""Run of several processes by `accelerate launch`, for large models.

The processes may outlive the one that started them if that is killed. They hold a lock of their own, so a comparison
that is started again waits for them instead of training the same run a second time.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from peft_lab.errors import PeftLabError
from peft_lab.runs import run_folder
from peft_lab.runs.run_config import dump_yaml


def train_launched(options: Mapping[str, Any], launcher: Mapping[str, Any], place: Path) -> dict[str, Any]:
    """Train by `accelerate launch`; returns the content of metrics.json.

    Args:
        options: options of the run.
        launcher: `{"accelerate": flags}`, the flags as `accelerate launch --help` lists them, without dashes.
        place: the run's folder; the options and the lock are written beside it.

    Raises:
        PeftLabError: the processes ended with an error; their output is in the run's log.
    """
    file = place.with_name(f"{place.name}.yaml")
    file.write_text(dump_yaml(options), encoding="utf-8")
    lock = place.with_name(f"{place.name}.launch")
    # the lock is held by the launched process itself, which may outlive this one
    command = [sys.executable, "-m", "peft_lab.comparison.run.accelerate_launch", str(lock)]
    flags = {"main_process_port": _free_port(), **launcher["accelerate"]}
    command += [*_flags(flags), "-m", "peft_lab", "train", str(file)]
    ended = subprocess.run(command, check=False)
    # a launch that left no metrics has failed too
    if ended.returncode or not (place / run_folder.METRICS).is_file():
        reason = _last_error(place.with_name(f"{place.name}.log"))
        raise PeftLabError(
            f"accelerate launch ended with exit code {ended.returncode}; {reason}its output is in {place.name}.log."
        )
    return run_folder.read_metrics(place)


def _last_error(log: Path) -> str:
    """Last error that the launched command printed; "" without one."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    told = [line.partition("Error:")[2].strip() for line in lines if line.startswith("Error:")]
    return f'it said "{told[-1]}"; ' if told else ""


def _flags(values: Mapping[str, Any]) -> list[str]:
    """Mapping as flags: true gives the bare flag, false none."""
    found = []
    for name, value in values.items():
        if value is not False:
            found += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return found


def _free_port() -> int:
    """Find a free port, because several runs may share a machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def main(arguments: Sequence[str]) -> None:
    """Run `accelerate launch` while holding a lock.

    The arguments are the lock's file and the flags.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser

    with FileLock(arguments[0]):
        launch_command(launch_command_parser().parse_args(list(arguments[1:])))


if __name__ == "__main__":
    main(sys.argv[1:])
