"""Batches of training rows for pruning that looks at the loss, before there is a Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from peft_lab.data.kind import Kind
from peft_lab.data.splits import Splits, subset
from peft_lab.runs.run_config import RunConfig
from peft_lab.training.model_rows import chosen_rows, model_rows

if TYPE_CHECKING:
    from peft_lab.data.task_schema import Task


class PruningBatches:
    """Batches of a run's training rows for its base, drawn by the run's seed.

    Args:
        config, arguments: options of the run, and those of Trainer; batches have the size of those of training.
        kind, task, processor, splits: of the run.
    """

    def __init__(
        self, config: RunConfig, arguments: TrainingArguments, kind: Kind, task: Task, processor: Any, splits: Splits
    ) -> None:
        self.config, self.arguments, self.kind, self.task = config, arguments, kind, task
        self.processor, self.splits = processor, splits
        self.device = arguments.device

    def __call__(self, base: nn.Module, count: int) -> Iterator[dict[str, Any]]:
        """At most `count` batches for the base, on the device of the training."""
        size, seed = self.arguments.train_batch_size, self.arguments.seed
        chosen = subset(chosen_rows(self.config, self.splits, seed)["train"], count * size)
        _, rows = model_rows({"train": chosen}, self.kind, self.processor, self.task, base, False, None)
        collator = self.kind.data_collator(self.processor, self.task, base)
        order = torch.Generator().manual_seed(seed)
        whole = len(rows["train"]) >= size
        loader = DataLoader(rows["train"], size, shuffle=True, collate_fn=collator, generator=order, drop_last=whole)
        for batch in loader:
            yield {name: value.to(self.device) for name, value in batch.items()}
