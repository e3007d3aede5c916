"""Progress of work that goes batch by batch, shown on a terminal alone.

What works says `advance`, wherever it stands; what calls it decides whether a bar follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from peft_lab.utils.terminal import SafeConsole, shown
from peft_lab.utils.verbosity import level

_FOLLOWER: ContextVar[Callable[[int], None] | None] = ContextVar("peft_lab_batch_progress", default=None)


def advance(count: int) -> None:
    """Tell that `count` more rows are done; without a bar nothing happens."""
    follower = _FOLLOWER.get()
    if follower is not None:
        follower(count)


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[None]:
    """Show a bar of `total` rows on standard error, if that is a terminal and the level is not quiet."""
    console = SafeConsole(stderr=True, highlight=False)
    if not console.is_terminal or level() == "quiet":
        yield
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(shown(title), total=total)
        token = _FOLLOWER.set(lambda count: bar.advance(task, count))
        try:
            yield
        finally:
            _FOLLOWER.reset(token)
