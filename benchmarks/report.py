"""Shared parts of the benchmark scripts: environment, timing, tables and results files."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # so that CPU time is the time of a step
os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # torch's profiler, which measures peak memory, writes to stderr
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def environment(device: str) -> str:
    """Describe date, versions and machine in one paragraph."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("peft-lab", "peft", "transformers", "torch")]
    machine = f"{platform.machine()}, {os.cpu_count()} cores, one thread"
    if device != "cpu":
        import torch

        machine = torch.cuda.get_device_name(device)
    return f"{date.today().isoformat()}; Python {platform.python_version()}, {', '.join(versions)}; {machine}."


def timed(function: Callable[[], object], device: str = "cpu") -> float:
    """Seconds of a call.

    On a CPU they are CPU time, which other programs on the machine hardly change, else wall time.
    """
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    function()
    return clock() - start


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown table; the first column is aligned left, the others right."""
    lines = [header, ["-", *["-:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def publish(text: str, output: Path | None) -> None:
    """Print a report, and write it to `output` if that is given."""
    print(text)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n", encoding="utf-8")
