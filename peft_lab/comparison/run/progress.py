"""Progress of a comparison: a live bar, or lines without a terminal."""

from __future__ import annotations

import statistics
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from peft_lab.comparison.records.run import Record
from peft_lab.utils.terminal import SafeConsole, shown


class Progress:
    """Display of runs done, running and failed, and the expected end.

    Args:
        name: the study's.
        total: number of runs.
        workers: runs at once.
    """

    def __init__(self, name: str, total: int, workers: int) -> None:
        self._console = SafeConsole(stderr=True, highlight=False, soft_wrap=True)
        self._total, self._workers = total, workers
        self._done = self._failed = self._running = 0
        self._seconds: list[float] = []
        columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = RichProgress(*columns, TextColumn("{task.fields[state]}"), console=self._console)
        self._task = self._bar.add_task(shown(name), total=total, state="")

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *exception: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def done(self, record: Record, fresh: bool) -> None:
        """Count an ended run; `fresh` if it was made just now."""
        self._done += 1
        self._failed += not record.ok
        if fresh:
            # a run that fails may end early, so its time says little about the others
            if record.ok:
                self._seconds.append(seconds(record))
            # rich would take brackets in names and errors for its own markup
            self._console.print(f"[{self._done}/{self._total}] {_line(record)}", markup=False)
        self._show()

    def more(self, count: int) -> None:
        """Expect that many more runs."""
        self._total += count
        self._bar.update(self._task, total=self._total)

    def running(self, count: int) -> None:
        """Show how many runs are under way."""
        if count != self._running:
            self._running = count
            self._show()

    def _show(self) -> None:
        state = f"{self._running} running"
        if self._failed:
            state += f", [red]{self._failed} failed[/]"
        if self._seconds:
            # runs that were found in the results took no time now, so only fresh ones count
            left = statistics.mean(self._seconds) * (self._total - self._done) / self._workers
            end = datetime.now().astimezone() + timedelta(seconds=left)
            state += f", done at {end:%H:%M}" if left < 86400 else f", done on {end:%d %b}"
        self._bar.update(self._task, completed=self._done, state=state)


def seconds(record: Record) -> float:
    """Duration of a run in seconds, from start to record."""
    started, finished = (datetime.fromisoformat(text) for text in (record.started, record.finished))
    return (finished - started).total_seconds()


def _line(record: Record) -> str:
    where = f"{record.task} on {record.backbone}"
    what = f"{record.arm}, {where}: seed {record.seed}, learning rate {record.learning_rate:g}"
    if record.tuned:
        what += ", " + ", ".join(f"{name} {value}" for name, value in record.tuned.items())
    if not record.ok:
        return f"{what}: failed: {record.error}"
    split = "test" if record.stage == "final" else "validation"
    return f"{what}: {split} {record.main_metric} {_number(record.score(split))}, {seconds(record):.0f} s"


def _number(value: Any) -> str:
    return "not measured" if value is None else f"{value:.4f}"
