"""A call in a process of its own, with what it took: time, memory, and how it ended."""

from __future__ import annotations

import os
import pickle
import resource
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_lab.errors import PeftLabError

#: A call that is not refused may load a model; one that never ends is killed then.
_SECONDS, _BYTES = 60, 6 * 2**30


@dataclass(frozen=True)
class Outcome:
    """How a call ended.

    Attributes:
        how: "done", "refused", the type of another error, or "killed".
        words: the message, or the traceback.
        seconds: processor time.
        megabytes: growth of the largest memory in use.
    """

    how: str
    words: str
    seconds: float
    megabytes: float


def outcome(call: Callable[[], Any]) -> Outcome:
    """Call in a child, which a crash of the interpreter does not take along."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        # the library prints what it likes, and warns
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + _BYTES, size + _BYTES))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        how, words = _ended(call)
        used = resource.getrusage(resource.RUSAGE_SELF)
        found = Outcome(how, words, used.ru_utime + used.ru_stime, (used.ru_maxrss - before) / 1024)
        os.write(write, pickle.dumps(found)[:60_000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        data = pipe.read()
    os.waitpid(child, 0)
    return pickle.loads(data) if data else Outcome("killed", "", 0.0, 0.0)


def _ended(call: Callable[[], Any]) -> tuple[str, str]:
    try:
        call()
    except PeftLabError as error:
        return "refused", str(error)
    except BaseException as error:
        return type(error).__name__, traceback.format_exc()[-3000:]
    return "done", ""
