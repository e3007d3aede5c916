"""Start of several processes by `accelerate launch`, in a group that a signal ends as a whole."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock

from peft_lab.utils.interruption import Stopped, signals_as_stops


def launch(flags: Mapping[str, Any], command: Sequence[str], lock: Path | None = None) -> int:
    """Run `python -m peft_lab` in several processes to their end; a signal to this process ends them too.

    Args:
        flags: flags of `accelerate launch`, as its `--help` lists them, without dashes.
        command: arguments of `peft-lab`.
        lock: file that the processes hold a lock of, which may outlive this one.

    Returns:
        The exit code of the first process that failed; 128 + the number of a signal that ended it.
    """
    started = [sys.executable, "-m", "peft_lab.utils.accelerate_launch", *(["--lock", str(lock)] if lock else [])]
    started += [*_as_flags({"main_process_port": _free_port(), **flags}), "-m", "peft_lab", *command]
    # the module path begins with the working directory otherwise, and a file there could be imported for a library
    env = {**os.environ, "PYTHONSAFEPATH": "1"}
    # a group of its own, to which the launcher passes the signal on
    with signals_as_stops(), subprocess.Popen(started, start_new_session=True, env=env) as process:
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            raise


def _as_flags(values: Mapping[str, Any]) -> list[str]:
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
    """Run `accelerate launch` with the given flags, perhaps while holding a lock (`--lock FILE` comes first)."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    locked, flags = (arguments[1], arguments[2:]) if arguments[0] == "--lock" else ("", arguments)
    try:
        with FileLock(locked) if locked else nullcontext(), signals_as_stops():
            _run(lambda: launch_command(launch_command_parser().parse_args(list(flags))))
    except Stopped:
        # accelerate leaves its children to themselves
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.killpg(0, signal.SIGTERM)
        raise


def _run(start: Any) -> None:
    """Call `start`; the exit code of this process becomes that of the first process that failed."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # the process itself has said what is wrong, and a second traceback would bury that
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        start()
    except SignalException as error:
        raise Stopped(error.sigval) from None
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
    except subprocess.CalledProcessError as error:
        code = error.returncode
    else:
        return
    if code < 0:
        sys.stderr.write(f"Error: a process of the run was ended by {signal.Signals(-code).name}.\n")
        code = 128 - code
    sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
