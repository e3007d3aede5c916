"""Peak memory of a training.

The kernel's own high-water mark (`ru_maxrss`, `VmHWM`) belongs to the whole life of a process: it would report the
loading of the backbone, or an earlier and larger training. Linux alone can reset it. So the memory is sampled.
"""

from __future__ import annotations

import threading

import psutil
import torch


class PeakMemory:
    """Context manager that measures the peak memory of its block.

    On CUDA it is the allocator's peak. Else the resident set of this process is sampled by a thread that sleeps in
    between: an allocation shorter than `interval` can be missed.

    Args:
        device: the device that is trained on.
        interval: seconds between two samples.

    Attributes:
        peak: bytes, valid after leaving the context.
        before: bytes on entry.
    """

    def __init__(self, device: torch.device | str = "cpu", interval: float = 0.02) -> None:
        self.interval = interval
        self.peak = self.before = 0
        self._cuda = torch.device(device).type == "cuda"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        if self._cuda:  # the allocator counts exactly, and its peak can be reset
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            self.before = self.peak = self._resident()
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._cuda:
            self.peak = torch.cuda.max_memory_allocated()
        else:
            self._stop.set()
            self._thread.join()
            # once more, because a block shorter than the interval was never sampled
            self.peak = max(self.peak, self._resident())

    def _sample(self) -> None:
        # waiting on the event ends the thread at once, where a sleep would delay the end of the block
        while not self._stop.wait(self.interval):
            self.peak = max(self.peak, self._resident())

    @staticmethod
    def _resident() -> int:
        return psutil.Process().memory_info().rss
