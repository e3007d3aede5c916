"""Timer of training steps, which can end the training after a time."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

#: Steps at the start of a process that are not typical: memory is allocated, kernels are chosen.
WARM_UP_STEPS = 2


class StepTimer(TrainerCallback, ExportableState):
    """Callback that times training steps and ends the training after `max_seconds`.

    The time of a step goes from the end of the step before it to its own: loading of the batch, forward, backward and
    optimiser. Evaluations and the writing of checkpoints are left out. With several processes the first one's clock
    counts. The time is kept in checkpoints, so a resumed training has what is left of it.

    Attributes:
        elapsed: seconds of all steps, those before a resume included.
        earlier: seconds of `elapsed` that were spent before the resume.
    """

    def __init__(self, max_seconds: float | None = None) -> None:
        self.max_seconds = max_seconds
        self.elapsed = self.earlier = 0.0
        self._steps: list[float] = []
        self._mark = 0.0

    @property
    def step_seconds(self) -> float | None:
        """Median seconds of a step; None before the first one.

        The first steps of the process are left out, because they allocate memory and choose kernels.
        """
        typical = self._steps[WARM_UP_STEPS:] or self._steps[-1:]
        return statistics.median(typical) if typical else None

    @property
    def progress(self) -> float:
        """Share of `max_seconds` that has passed; 0 without a limit."""
        return min(1.0, self.elapsed / self.max_seconds) if self.max_seconds else 0.0

    def state(self) -> dict[str, Any]:
        """State for a checkpoint of Trainer."""
        # a resume sets these attributes, so all that has elapsed by now is then earlier time
        return {
            "args": {"max_seconds": self.max_seconds},
            "attributes": {"elapsed": self.elapsed, "earlier": self.elapsed},
        }

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self._mark = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Add a step; stop the training when the time is over."""
        now = time.perf_counter()
        self._steps.append(now - self._mark)
        self.elapsed += now - self._mark
        self._mark = now
        if self.max_seconds is not None:
            if PartialState().num_processes > 1:  # all processes must stop at the same step
                self.elapsed = float(broadcast(torch.tensor(self.elapsed, device=PartialState().device)))
            if self.elapsed >= self.max_seconds:
                control.should_training_stop = True

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        """Leave the evaluation out."""
        self._mark = time.perf_counter()

    def on_save(self, *_: Any, **__: Any) -> None:
        """Leave the writing of the checkpoint out."""
        self._mark = time.perf_counter()


def factor(progress: float, warm_up: float) -> float:
    """Learning rate of a linear schedule over time relative to its peak.

    Args:
        progress: part of the time that has passed.
        warm_up: part of the time in which it rises from 0; then it falls to 0.
    """
    return progress / warm_up if progress < warm_up else (1 - progress) / (1 - warm_up)
