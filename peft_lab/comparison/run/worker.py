"""What the process of a run does: train, measure, record. It is the run's own process, so that nothing outlives it."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypedDict

from filelock import FileLock, Timeout

from peft_lab.comparison.records.results import RUNS, Journal, Record, append_record
from peft_lab.comparison.records.run import Run
from peft_lab.errors import PeftLabError
from peft_lab.runs import run_folder

ERROR = "error.txt"
#: What is kept of a search's run: its adapter will not be used.
_KEPT = (run_folder.RUN, run_folder.METRICS, run_folder.HISTORY, run_folder.TASK)


class Job(TypedDict, total=False):
    """What a backend hands to `execute`: plain values only.

    Attributes:
        do: "run", or "size" to find the argument that gives an arm its size.
        folder: absolute path of the comparison's folder, the same on every machine that takes part.
        run: the fields of a `Run`.
        since: a failed run recorded before this time is tried again.
        threads: threads of the process; None leaves torch's own choice.
        device: value of CUDA_VISIBLE_DEVICES, None to leave it as it is.
        field, limit: for "size": the argument and the number of trainable parameters.
        log: for "run": whether what is printed goes to the run's log file.
    """

    do: str
    folder: str
    run: dict[str, Any]
    since: str
    threads: int | None
    device: str | None
    field: str
    limit: int
    log: bool


def execute(job: Job) -> None:
    """Carry out a job; its result is on the disk when this returns.

    A run that another process is at, or has recorded already, is left to it.
    """
    from peft_lab.utils.processes import end_with_parent, quiet

    end_with_parent()
    if job.get("device") is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(job["device"])
    folder, run = Path(job["folder"]), Run(**job["run"])
    lock = FileLock(lock_file(folder, run.id))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return
    with lock, _logged(folder / RUNS / f"{run.id}.log", job.get("log", True)):
        quiet()
        if job.get("threads"):
            import torch

            torch.set_num_threads(int(job["threads"] or 1))
        if job["do"] == "size":
            from peft_lab.comparison.study.parameter_budget import find_size

            find_size(folder, run, job["field"], job["limit"])
        elif not is_recorded(folder, run.id, job.get("since", "")):
            _record(folder, run)


def lock_file(folder: Path, identity: str) -> Path:
    """The file whose lock the process of a run holds; the system releases it however the process ends."""
    return folder / RUNS / f"{identity}.lock"


def is_recorded(folder: Path, identity: str, since: str = "") -> bool:
    """Whether a run has a record; one of a failure counts only from the time `since` on."""
    journal = Journal(folder)
    journal.read()
    found = journal.records.get(identity)
    return found is not None and (found.ok or not since or found.finished >= since)


def now() -> str:
    """The time as records have it."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


@contextlib.contextmanager
def _logged(file: Path, wanted: bool) -> Iterator[None]:
    """Send what this process and its children print to a file."""
    if not wanted:
        yield
        return
    with file.open("a", encoding="utf-8") as log:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        yield
        sys.stdout.flush()
        sys.stderr.flush()


def _record(folder: Path, run: Run) -> None:
    """Make the run and record how it ended; an error of the run is a result too."""
    place, started = folder / RUNS / run.id, now()
    (place / ERROR).unlink(missing_ok=True)
    found: dict[str, Any] = {"status": "ok"}
    try:
        found |= perform(run, place)
    except Exception as error:  # whatever ends one run, the others go on
        place.mkdir(parents=True, exist_ok=True)
        (place / ERROR).write_text(traceback.format_exc(), encoding="utf-8")
        traceback.print_exc()
        found = {"status": "failed", "error": one_line(error)}
    append_record(folder, record_of(run, started, **found, environment=environment()))
    if found["status"] == "ok":
        _prune(place, run.stage)


def record_of(run: Run, started: str, **values: Any) -> Record:
    """The record of a run that ends now."""
    options = {name: value for name, value in run.options.items() if name != "hub_token"}
    return Record(
        id=run.id,
        study=run.study,
        stage=run.stage,
        arm=run.arm,
        method=run.method,
        method_args=dict(run.method_args),
        task=run.task,
        backbone=run.backbone,
        seed=run.seed,
        learning_rate=run.learning_rate,
        tuned=dict(run.tuned),
        round=run.round,
        beyond=run.beyond,
        options=options,
        started=started,
        finished=now(),
        folder=f"{RUNS}/{run.id}",
        **values,
    )


def one_line(error: BaseException) -> str:
    """An error in one line, with its type if it is not one of ours."""
    text = " ".join(str(error).split())[:500]
    return text if isinstance(error, PeftLabError) and text else f"{type(error).__name__}: {text}".rstrip(": ")


def perform(run: Run, place: Path) -> dict[str, Any]:
    """Train and measure; returns `metrics`, `measures` and `curves` of the record."""
    from peft_lab.comparison.run.measures import curves, measure

    options = {**run.options, "output_dir": str(place)}
    if run.launcher:
        from peft_lab.comparison.run.accelerate_launch import train_launched

        metrics = train_launched(options, run.launcher, place)
    else:
        from peft_lab.training.run import train

        metrics = train(options).metrics
    return {"metrics": metrics, "measures": measure(run, place, metrics), "curves": curves(place)}


def _prune(place: Path, stage: str) -> None:
    """Remove what is not needed of a recorded run: checkpoints, and of a search's run all but its figures."""
    for path in place.iterdir():
        if path.name.startswith("checkpoint-") or (stage == "search" and path.name not in _KEPT):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def environment() -> dict[str, Any]:
    """What decides a result besides the options: versions, device, threads, platform, commit of a checkout."""
    import torch

    from peft_lab.utils.versions import device_name, versions

    found: Mapping[str, Any] = {
        "versions": versions(),
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "commit": commit(),
    }
    return dict(found)


def commit() -> str:
    """The git commit of the checkout that peft_lab runs from, with "+changes" if files differ; "" if installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        head, status = (
            subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + ("+changes" if status else "")
