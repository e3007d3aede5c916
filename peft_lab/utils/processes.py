"""Processes for runs: forked from a server that has imported everything once, quiet, and with their parent's life."""

from __future__ import annotations

import multiprocessing
import os
import threading
from typing import Any


def forkserver(*preload: str) -> Any:
    """The multiprocessing context for runs: a fork server with these modules imported, or `spawn` where there is none.

    One run's peak memory says nothing about the run before it, and no run waits for the imports.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    # Threads that wait for one another should sleep: on a busy machine spinning costs more than it saves.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["peft_lab.utils._safe_path", *preload])
    return context


def quiet() -> None:
    """Leave out what the loading of well-known backbones and data has to say."""
    import warnings

    import datasets
    import transformers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def end_with_parent() -> None:
    """End this process as soon as the one that started it is gone, however that came about."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
