"""Progress of a comparison: a live bar on a terminal, seldom lines elsewhere."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from peft_lab.comparison.records.run import Record
from peft_lab.utils.terminal import SafeConsole, shown
from peft_lab.utils.verbosity import level

#: Seconds between two lines where there is no terminal.
_SELDOM = 30.0
#: Runs under way that are named; of more the number is said.
_NAMED = 3


class Progress:
    """Display of runs done, running and failed, and the expected end.

    On a terminal every run that ends has a line above the bar. Elsewhere there is a line at the first run, then at most
    one every 30 seconds, one for each run that failed, and one at the end.

    Args:
        name: the study's.
        total: number of runs.
        workers: runs at once.
    """

    def __init__(self, name: str, total: int, workers: int) -> None:
        self._console = SafeConsole(stderr=True, highlight=False, soft_wrap=True, quiet=level() == "quiet")
        self._name, self._total, self._workers = name, total, workers
        self._done = self._failed = self._fresh = 0
        self._running: list[str] = []
        self._seconds: list[float] = []
        self._kept_seconds: list[float] = []
        self._last_line: float | None = None
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
        # a single run has a line of its own
        elif self._fresh > 1:
            self._line()

    def done(self, record: Record, fresh: bool) -> None:
        """Count an ended run; `fresh` if it was made just now."""
        self._done += 1
        self._failed += not record.ok
        self._fresh += fresh
        # a run that fails may end early, so its time says little about the others
        if record.ok:
            (self._seconds if fresh else self._kept_seconds).append(seconds(record))
        if fresh and (self._console.is_terminal or not record.ok or self._fresh == 1):
            # rich would take brackets in names and errors for its own markup
            self._console.print(f"[{self._done}/{self._total}] {_line(record)}", markup=False)
        self._show()

    def kept(self, count: int) -> None:
        """Say how many runs were there already."""
        if count:
            self._console.print(f"{count} of {self._total} runs {'is' if count == 1 else 'are'} there already.")

    def more(self, count: int) -> None:
        """Expect that many more runs."""
        self._total += count
        self._bar.update(self._task, total=self._total)

    def running(self, runs: Sequence[str]) -> None:
        """Show which runs are under way."""
        if list(runs) != self._running:
            self._running = list(runs)
            self._show()

    def _show(self) -> None:
        self._bar.update(self._task, completed=self._done, state=shown(self._state()))
        if self._console.is_terminal or not self._fresh:
            return
        now = time.monotonic()
        # the first run has a line of its own
        if self._last_line is None:
            self._last_line = now
        elif now - self._last_line >= _SELDOM:
            self._last_line = now
            self._line()

    def _line(self) -> None:
        self._console.print(f"{self._name}: {self._done} of {self._total} runs done, {self._state()}", markup=False)

    def _state(self) -> str:
        names = ", ".join(self._running[:_NAMED])
        more = ", ..." if len(self._running) > _NAMED else ""
        state = f"{len(self._running)} running" + (f" ({names}{more})" if names else "")
        if self._failed:
            state += f", {self._failed} failed"
        # runs that were found may have been made elsewhere, so they count only as long as no fresh one has ended
        known = self._seconds or self._kept_seconds
        if known and self._done < self._total:
            left = statistics.mean(known) * (self._total - self._done) / self._workers
            end = datetime.now().astimezone() + timedelta(seconds=left)
            state += f", done at about {end:%H:%M}" if left < 86400 else f", done on about {end:%d %b}"
        return state


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
