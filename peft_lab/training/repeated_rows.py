"""Rows that accelerate repeats in an evaluation of several processes, so that all of them have whole batches.

Trainer leaves them out of the metrics, but their losses are part of the mean of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import find_batch_size
from torch import Tensor


class RepeatedRows:
    """Repeated rows of the batch that is evaluated.

    Attributes:
        count: how many rows of this process's batch are left out.
        are_there: True while a batch is evaluated of which any process has repeated rows. Its loss is the mean of each
            process's own rows, which Trainer weighs by their number.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.count, self.are_there = 0, False

    def leave_out(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Inputs of a batch without its repeated rows.

        All stay where a process has none but repeated rows, whose loss Trainer leaves out, and where a tensor has other
        than one entry for each row.
        """
        state = self.accelerator.gradient_state
        self.are_there = self.accelerator.num_processes > 1 and state.end_of_dataloader and state.remainder > 0
        tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
        rows = (find_batch_size(inputs) or 0) if self.are_there else 0
        # the rows of a step lie in the order of the processes, and the repeated ones behind all others
        own = min(state.remainder - self.accelerator.process_index * rows, rows)
        if own <= 0 or own == rows or any(value.ndim == 0 or len(value) != rows for value in tensors):
            return inputs
        self.count = rows - own
        return {name: value[:own] if isinstance(value, Tensor) else value for name, value in inputs.items()}

    def put_back(self, outputs: Any) -> Any:
        """Outputs with as many rows as the other processes have: the last one again for each that was left out."""
        count, self.count, self.are_there = self.count, 0, False
        return _lengthened(outputs, count)


def _lengthened(outputs: Any, count: int) -> Any:
    if isinstance(outputs, Tensor) and count and outputs.ndim:
        return torch.cat([outputs, outputs[-1:].expand(count, *outputs.shape[1:])])
    if isinstance(outputs, Mapping):
        return {name: _lengthened(value, count) for name, value in outputs.items()}
    if isinstance(outputs, tuple | list):
        return tuple(_lengthened(value, count) for value in outputs)
    return outputs
