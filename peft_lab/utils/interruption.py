"""Signals that end a command, in one line that says how to go on."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

#: Seconds after a first signal in which others change nothing: terminals and launchers send several at once.
_GRACE = 2.0
#: Seconds between two looks whether an import is over, and after which it is no longer waited for.
_AGAIN, _LONGEST_IMPORT = 0.05, 20.0
_USUAL = "Stopped; the same command starts again."


class Stopped(SystemExit):
    """End of the process by a signal, with exit code 128 + its number as in shells.

    Attributes:
        hint: sentence on how to go on.
        result: what was reached until then, for a caller that can use it.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.hint = ""
        self.result: Any = None


@contextmanager
def going_on(hint: Callable[[], str]) -> Iterator[None]:
    """Give a `Stopped` that passes the sentence on how to go on.

    The innermost sentence counts.
    """
    try:
        yield
    except Stopped as stop:
        stop.hint = stop.hint or hint()
        raise


@contextmanager
def signals_as_stops() -> Iterator[None]:
    """Raise SIGINT and SIGTERM as `Stopped`, so that clean-up runs.

    A signal that this process was started to ignore stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process, asked, first = os.getpid(), [0.0], [0.0]

    def again(number: int) -> None:
        if signal.getsignal(number) is stop:
            os.kill(process, number)

    def stop(number: int, frame: FrameType | None) -> None:
        # a process forked from this one, such as one that loads data
        if os.getpid() != process:
            os._exit(128 + number)
        if not first[0]:
            # C++ code that imports a module aborts at an exception, so the signal comes again until the import is over
            asked[0] = asked[0] or time.monotonic()
            if _is_importing(frame) and time.monotonic() - asked[0] < _LONGEST_IMPORT:
                later = threading.Timer(_AGAIN, again, (number,))
                later.daemon = True
                later.start()
                return
            first[0] = time.monotonic()
            raise Stopped(number)
        # the first was caught by a library, or the clean-up hangs
        if time.monotonic() - first[0] > _GRACE:
            sys.stderr.write(f"{_USUAL}\n")
            sys.stderr.flush()
            os._exit(128 + number)

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_importing(frame: FrameType | None) -> bool:
    """Test whether a module is being imported at this place."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


@contextmanager
def stopped_in_one_line() -> Iterator[None]:
    """End the process after SIGINT or SIGTERM with one line on standard error."""
    try:
        with signals_as_stops():
            yield
    except Stopped as stop:
        # of the processes of a distributed run one speaks
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"{stop.hint or _USUAL}\n")
        raise
