"""Training data read by an adapter itself, between the epochs: statistics and start values that no gradient gives."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader
from transformers import TrainerCallback


class ReadTrainingData(TrainerCallback):
    """Lets adapters read the training data, in order and without shuffling, at the start of each epoch.

    An adapter that wants it has a tuner with `read_data(batches, epoch)`: `batches` are as the model takes them and on
    its device, `epoch` counts from 0, the model is in eval mode. `peft_lab.train` adds this callback by itself; a
    script with a `Trainer` of its own adds it by `trainer.add_callback`. All processes read all rows, so they find
    the same. A training resumed within an epoch does not read again: what was found is in the checkpoint. The rows
    must have a length.
    """

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hand the training data to the tuners that read it."""
        model, loader = kwargs["model"], kwargs["train_dataloader"]
        readers = [module for module in model.modules() if hasattr(module, "read_data")]
        if not readers or state.global_step % math.ceil(len(loader) / args.gradient_accumulation_steps):
            return  # nothing to do, or resumed within an epoch
        training = model.training
        model.eval()
        for reader in readers:
            reader.read_data(_batches(loader, args), int(state.epoch or 0))
        model.train(training)


def _batches(loader: Any, args: Any) -> Iterator[dict[str, Any]]:
    """The rows in order: a loader of our own leaves the random state of the training's alone."""
    own: DataLoader[Any] = DataLoader(loader.dataset, batch_size=args.train_batch_size, collate_fn=loader.collate_fn)
    for batch in own:
        yield {name: value.to(args.device) if hasattr(value, "to") else value for name, value in batch.items()}
