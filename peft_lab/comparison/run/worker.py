"""Process of one run: trains, measures and records.

Each run has a process of its own, so that its memory ends with it.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from peft_lab.comparison.records.results import RUNS, Journal, append_record
from peft_lab.comparison.records.run import Record, Run
from peft_lab.errors import PeftLabError, WriteError
from peft_lab.runs import run_folder
from peft_lab.utils.atomic_files import write_errors, write_text
from peft_lab.utils.interruption import signals_as_stops

ERROR = "error.txt"
#: Files that are kept of a search's run. Its adapter will not be used.
_KEPT = (run_folder.RUN, run_folder.METRICS, run_folder.HISTORY, run_folder.TASK)


@dataclass(frozen=True)
class Job:
    """Order to the process of a run.

    Attributes:
        task: "run", or "size" to find the argument value that gives an arm its number of trainable parameters.
        folder: absolute path of the comparison's folder, the same on every machine that takes part.
        run: the run.
        retry_until: a failed run recorded up to this line of results.jsonl is made again.
        threads: threads of the process; None leaves torch's own choice.
        device: value of CUDA_VISIBLE_DEVICES, None to leave it as it is.
        size_argument: for "size", the argument of the method.
        limit: for "size", the number of trainable parameters.
    """

    task: str
    folder: str
    run: Run
    retry_until: int = 0
    threads: int | None = None
    device: str | None = None
    size_argument: str = ""
    limit: int = 0


#: Exit code of a process whose output the disk refused (`EX_CANTCREAT` of sysexits.h).
REFUSED = 73


def execute_in_process(job: Job) -> None:
    """Carry out a job as the whole of a process; its exit code tells of a full disk."""
    from peft_lab.utils.processes import end_with_parent

    end_with_parent()
    try:
        # a process that is asked to end leaves no lock of the system behind, which Python would complain of
        with signals_as_stops():
            execute(job)
    except WriteError:
        sys.exit(REFUSED)


def execute(job: Job) -> None:
    """Carry out a job and write its result to the disk.

    A run that another process has locked, or has recorded already, is left to it.

    Raises:
        WriteError: the comparison's folder cannot be written.
    """
    from peft_lab.utils.processes import quiet

    # CUDA reads the variable when it is first used, so this comes before any work
    if job.device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = job.device
    folder, run = Path(job.folder), job.run
    lock = FileLock(lock_file(folder, run.id))
    try:
        with write_errors(folder):
            lock.acquire(timeout=0)
    except Timeout:
        return
    with lock, write_errors(folder), _logged(folder / RUNS / f"{run.id}.log"):
        quiet()
        if job.threads:
            import torch

            torch.set_num_threads(job.threads)
        if job.task == "size":
            from peft_lab.comparison.study.parameter_budget import find_size

            find_size(folder, run, job.size_argument, job.limit)
        # another process may have recorded the run just before it released the lock
        elif not is_recorded(folder, run.id, job.retry_until):
            _make_and_record(folder, run)


def lock_file(folder: Path, run_id: str) -> Path:
    """File whose lock the process of a run holds.

    The system releases it however the process ends.
    """
    return folder / RUNS / f"{run_id}.lock"


def is_recorded(folder: Path, run_id: str, retry_until: int = 0) -> bool:
    """Test whether a run has a record that stands."""
    journal = Journal(folder)
    journal.read()
    return journal.standing(run_id, retry_until) is not None


class Start(NamedTuple):
    """Start of a run.

    Attributes:
        time: UTC time, for the record.
        clock: `time.monotonic()`, which measures the duration whatever is done to the time of the day.
    """

    time: datetime
    clock: float

    @classmethod
    def now(cls) -> Start:
        """Start of a run that begins now."""
        return cls(datetime.now(timezone.utc), time.monotonic())


@contextlib.contextmanager
def _logged(file: Path) -> Iterator[None]:
    """Send the output of this process and its children to a file."""
    with file.open("a", encoding="utf-8") as log:
        # what is still buffered belongs to the old output
        sys.stdout.flush()
        sys.stderr.flush()
        # file descriptors, not sys.stdout: libraries in C and child processes write to these
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        yield
        sys.stdout.flush()
        sys.stderr.flush()


def _make_and_record(folder: Path, run: Run) -> None:
    """Make the run and record its end, an error too."""
    place, started = folder / RUNS / run.id, Start.now()
    # a run that is made again may succeed, and then the old error would mislead
    (place / ERROR).unlink(missing_ok=True)
    try:
        outcome: dict[str, Any] = {"status": "ok", **perform(run, place)}
    # the disk would refuse the record and the other runs too, so the comparison ends; the run can be made again
    except WriteError:
        traceback.print_exc()
        raise
    except Exception as error:  # one run that fails must not end the others
        write_text(place / ERROR, traceback.format_exc())
        traceback.print_exc()
        outcome = {"status": "failed", "error": one_line(error)}
    append_record(folder, record_of(run, started, **outcome, environment=environment()))
    # a run without a record goes on from its checkpoints, so these are removed last
    if outcome["status"] == "ok":
        _prune(place, run.stage)


def record_of(run: Run, started: Start, **outcome: Any) -> Record:
    """Build the record of a run that ends now.

    Args:
        run: the run.
        started: its start.
        outcome: `status`, and what else is known of its end.
    """
    times = (started.time, started.time + timedelta(seconds=time.monotonic() - started.clock))
    first, last = (each.isoformat(timespec="milliseconds") for each in times)
    # a token must not reach a file that is made to be shared
    options = {name: value for name, value in run.options.items() if name != "hub_token"}
    return Record.of(run, options=options, started=first, finished=last, folder=f"{RUNS}/{run.id}", **outcome)


def one_line(error: BaseException) -> str:
    """Error in one line, with its type unless it is peft-lab's."""
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
    """Remove the checkpoints of a recorded run.

    Of a search's run the adapter is removed too.
    """
    for path in place.iterdir():
        if path.name.startswith("checkpoint-") or (stage == "search" and path.name not in _KEPT):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def environment() -> dict[str, Any]:
    """Versions, device, threads, platform and commit of this process."""
    import torch

    from peft_lab.utils.versions import device_name, versions

    return {
        "versions": versions(),
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "commit": commit(),
    }


def commit() -> str:
    """Git commit of the checkout that peft_lab runs from.

    "+changes" is added if files differ from the commit. The result is "" if peft_lab is installed or git is missing.
    """
    root = Path(__file__).resolve().parents[3]
    # git would also find the repository of another project around an installed package
    if not (root / ".git").exists():
        return ""
    try:
        head = _git(root, "rev-parse", "HEAD")
        changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + ("+changes" if changes else "")


def _git(root: Path, *words: str) -> str:
    """Output of a git command in the checkout."""
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()
