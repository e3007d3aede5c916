"""Backends of a comparison, which turn jobs into futures."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Protocol

from peft_lab.comparison.run.worker import REFUSED, Job, execute_in_process
from peft_lab.errors import ConfigError, WriteError, did_you_mean
from peft_lab.utils.cores import usable_cores
from peft_lab.utils.processes import forkserver

BACKENDS = ("local", "ray")
#: Seconds for runs to end in once they are asked to.
_GRACE = 10.0


class RunEndedError(RuntimeError):
    """Error of a run whose process ended without having recorded a result."""


class Backend(Protocol):
    """Interface of a backend.

    Attributes:
        workers: number of jobs that are carried out at once.
    """

    workers: int

    def submit(self, job: Job) -> Future[None]:
        """Carry out a job.

        The future ends with an error if the job's process died before it recorded a result.
        """

    def close(self) -> None:
        """End what is still running."""


def make_backend(name: str, workers: int | None = None, address: str | None = None) -> Backend:
    """Make a backend by name.

    Args:
        name: "local" or "ray".
        workers: runs at once; by default one for each GPU, else one for every two cores.
        address: of a Ray cluster ("auto" for the one that runs on this machine); None starts one here.

    Raises:
        ConfigError: no such backend, its package is missing, or the cluster cannot be reached.
    """
    if name not in BACKENDS:
        raise ConfigError(f'Unknown backend "{name}".{did_you_mean(name, BACKENDS)} Known: {", ".join(BACKENDS)}.')
    if workers is not None and workers < 1:
        raise ConfigError(f"workers must be at least 1, got {workers}.")
    if name == "ray":
        from peft_lab.comparison.run.ray import RayBackend

        return RayBackend(workers, address)
    if address is not None:
        raise ConfigError('"address" is for the backend ray; leave it out, or pass --backend ray.')
    return LocalBackend(workers)


class LocalBackend:
    """Backend of this machine, with a new process for each run.

    The server has imported everything once.
    With GPUs, each process sees one of them. Else the cores are shared out: `cores // workers` threads each, or as many
    as OMP_NUM_THREADS says.
    """

    def __init__(self, workers: int | None = None) -> None:
        # what every run imports, so that it is imported once
        self._context = forkserver("peft_lab.training.run", "evaluate", "sklearn.metrics")
        devices, cores = gpus(), usable_cores()
        self.workers = workers or len(devices) or max(1, cores // 2)
        # threads beyond the cores would slow all runs
        self._threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, cores // self.workers))
        # as many slots as workers; more workers than GPUs share them in turn
        self._slots: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        for index in range(self.workers):
            self._slots.put(devices[index % len(devices)] if devices else None)
        self._threads_pool = ThreadPoolExecutor(self.workers, thread_name_prefix="peft-lab-run")
        self._processes: set[Any] = set()
        self._closed = False

    def submit(self, job: Job) -> Future[None]:
        """Carry out a job in a process of its own."""
        return self._threads_pool.submit(self._run, job)

    def _run(self, job: Job) -> None:
        if self._closed:
            raise RunEndedError("The comparison was ended.")
        device = self._slots.get()
        job = replace(job, threads=self._threads, device=device)
        process = self._context.Process(target=execute_in_process, args=(job,))
        try:
            process.start()
            self._processes.add(process)
            process.join()
        finally:
            self._processes.discard(process)
            self._slots.put(device)
        if process.exitcode == REFUSED:
            raise WriteError(
                f'"{job.folder}" cannot be written: the disk refused the files of a run (the log in its folder runs '
                "says more); make room, and repeat the command: finished runs are kept."
            )
        # a run that fails records that itself and exits with 0
        if process.exitcode:
            raise RunEndedError(ending(process.exitcode))

    def close(self) -> None:
        """End what is still running."""
        # set first, so that no waiting thread starts another process after this
        self._closed = True
        running = list(self._processes)
        # asked to end first, because a run of several processes passes that on; nothing is lost by either
        for process in running:
            process.terminate()
        deadline = time.monotonic() + _GRACE
        for process in running:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
        self._threads_pool.shutdown(wait=True, cancel_futures=True)


def ending(exitcode: int) -> str:
    """Describe the exit code of a run's process."""
    # a process that has ended itself after signal N leaves with 128 + N
    if exitcode - 128 in (signal.SIGINT, signal.SIGTERM):
        exitcode = 128 - exitcode
    if exitcode >= 0:
        return f"The run's process left with exit code {exitcode}; its log says more."
    # multiprocessing gives -N as the exit code if signal N ended the process
    name = signal.Signals(-exitcode).name
    cause = "; most likely memory ran out" if name == "SIGKILL" else ""
    return f"The run's process was ended from outside by {name}{cause}."


def gpus() -> list[str]:
    """List the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    # asked of the driver, not of CUDA: a process that has touched CUDA cannot be forked from
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import torch

    if not torch.cuda.is_available():
        return []
    # a child's value replaces this one, so it must use the same names
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").replace(" ", "").split(",")
    visible = list(filter(None, names))
    return visible or [str(index) for index in range(torch.cuda.device_count())]


def is_import_of_main() -> bool:
    """Test whether this is a child process importing the user's script."""
    # multiprocessing sets this attribute while it imports the script, and has no public one
    return bool(getattr(multiprocessing.current_process(), "_inheriting", False))
