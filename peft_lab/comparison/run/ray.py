"""Runs on a Ray cluster.

Ray places them, restarts none, and gives each a process and, if there are any, a GPU.

The folder of the comparison must be the same file system on all machines, and peft-lab installed on each.
"""

from __future__ import annotations

import os
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from peft_lab.comparison.run.worker import Job, execute
from peft_lab.errors import ConfigError
from peft_lab.utils.cores import usable_cores


def _execute(job: Job) -> None:
    """Carry out a job in a process of Ray.

    Ray puts the driver's working directory on the module path, from which it is taken off again.
    """
    import peft_lab.utils._safe_path  # noqa: F401

    execute(job)


class RayBackend:
    """Runs as Ray tasks; see `peft_lab.comparison.run.backends.Backend`.

    Args:
        workers: runs at once; by default one for each GPU of the cluster, else one for every two cores.
        address: of the cluster, "auto" for the one that runs on this machine; None uses the one that this process is
            connected to, or starts one here that ends with it.

    Raises:
        ConfigError: Ray is not installed, or there is no cluster at that address.
    """

    def __init__(self, workers: int | None = None, address: str | None = None) -> None:
        try:
            import ray
        except ImportError as error:
            raise ConfigError("The backend ray needs the package ray: pip install 'peft-lab[ray]'.") from error
        self._ray = ray
        self._started = not ray.is_initialized()
        if self._started:
            os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # CPU runs keep CUDA_VISIBLE_DEVICES
            options: dict[str, Any] = {"address": address, "logging_level": "warning", "log_to_driver": False}
            if address is None:
                options |= {
                    "address": "local",
                    # each run needs a CPU of Ray's count, or workers beyond the cores would wait
                    "num_cpus": max(workers or 1, usable_cores()),
                    "include_dashboard": False,
                }
            try:
                ray.init(**options)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise ConfigError(f'There is no Ray cluster at "{address}": {" ".join(str(error).split())}') from error
        found = ray.cluster_resources()
        cores, devices = max(1, int(found.get("CPU", 1))), int(found.get("GPU", 0))
        self.workers = workers or devices or max(1, cores // 2)
        self._threads = max(1, cores // self.workers)
        # workers beyond the GPUs get fractions of one, or Ray would not run them at once
        needs: dict[str, Any] = {"num_cpus": self._threads, "num_gpus": min(1.0, devices / self.workers)}
        # a process is used once, so that no run's memory is counted for the next
        self._execute = ray.remote(max_calls=1, max_retries=0, **needs)(_execute)
        self._references: dict[Future[None], Any] = {}

    def submit(self, job: Job) -> Future[None]:
        """Carry out a job somewhere in the cluster."""
        threads = int(os.environ.get("OMP_NUM_THREADS") or self._threads)
        reference = self._execute.remote(replace(job, threads=threads))
        future: Future[None] = reference.future()
        # kept while the job runs, because `close` cancels jobs by their references
        self._references[future] = reference
        future.add_done_callback(lambda done: self._references.pop(done, None))
        return future

    def close(self) -> None:
        """End all runs, and the cluster if it was started here."""
        for reference in list(self._references.values()):
            # without force Ray only raises KeyboardInterrupt in the process
            self._ray.cancel(reference, force=True)
        if self._started:
            self._ray.shutdown()
