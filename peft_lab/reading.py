"""Training data read by an adapter itself, between the epochs: statistics and start values that no gradient gives."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from peft_lab.errors import ConfigError


class ReadTrainingData(TrainerCallback):
    """Lets adapters read the training data, in order and without shuffling, at the start of each epoch.

    An adapter that wants it has a tuner or a layer with `read_data(batches, epoch)`: `batches` are as the model takes
    them and on its device, made anew as they are drawn, so a reader that needs none draws none; `epoch` counts from 0,
    the model is in eval mode. `peft_lab.train` adds this callback by itself; a script with a `Trainer` of its own adds
    it by `trainer.add_callback`. All processes read all rows, so they find the same. A training resumed within an epoch
    does not read again: what was found is in the checkpoint. What training draws at random is the same with and
    without readers.

    Raises:
        ConfigError: an adapter draws training data that have no length.
    """

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hand the training data to the modules that read it."""
        model, loader = kwargs["model"], kwargs["train_dataloader"]
        # by class: peft's wrappers answer for the modules inside them, which would then read twice
        readers = [module for module in model.modules() if hasattr(type(module), "read_data")]
        if not readers:
            return
        steps = math.ceil(len(loader) / args.gradient_accumulation_steps) if _has_length(loader) else 0
        if steps and state.global_step % steps:  # resumed within an epoch
            return
        training = model.training
        model.eval()
        with torch.random.fork_rng(devices=[]):  # a loader draws a seed for its workers
            for reader in readers:
                reader.read_data(_batches(loader, args), state.global_step // steps if steps else 0)
        model.train(training)


def _batches(loader: Any, args: Any) -> Iterator[dict[str, Any]]:
    """The rows in order, on the device of the training; raises `ConfigError` when drawn from a stream."""
    if not _has_length(loader):
        raise ConfigError("The adapter reads the training data between epochs, and a stream of rows has no epochs.")
    own: DataLoader[Any] = DataLoader(loader.dataset, batch_size=args.eval_batch_size, collate_fn=loader.collate_fn)
    for batch in own:
        yield {name: value.to(args.device) if hasattr(value, "to") else value for name, value in batch.items()}


def _has_length(loader: Any) -> bool:
    return isinstance(loader.dataset, Sized)
