"""Processes for runs, forked from a server that has imported everything once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from typing import Any


def forkserver(*preload: str) -> Any:
    """Multiprocessing context for runs: a fork server, else `spawn`.

    The server has imported the modules in `preload`. One run's peak memory says nothing about the run before it, and no
    run waits for the imports.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    # Threads that wait for one another should sleep: on a busy machine spinning costs more than it saves.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    context = multiprocessing.get_context("forkserver")
    # first, because the imports after it must not find modules in the working directory
    context.set_forkserver_preload(["peft_lab.utils._safe_path", *preload])
    return context


def quiet() -> None:
    """Silence warnings and progress bars of transformers and datasets."""
    import warnings

    import datasets
    import transformers

    # tokenizers warns after every fork otherwise
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def end_with_parent() -> None:
    """End this process when its parent is gone, even if killed.

    Ctrl+C reaches the processes of a terminal all at once, and is left to the parent, which ends this one.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        # it waits for the end of a pipe, which closes however the parent ends
        parent.join()
        os._exit(1)  # no clean-up: the main thread may be inside a long step

    threading.Thread(target=watch, daemon=True).start()
