"""Training data read by an adapter itself, between the epochs.

It gets statistics and start values from them that no gradient gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from peft_lab.backbones.sharded_weights import is_partitioned
from peft_lab.errors import ConfigError
from peft_lab.training.process_arrays import share_arrays


def read_training_data(model: nn.Module, batches: Iterable[Mapping[str, Any]], epoch: int = 0) -> None:
    """Let the adapters of a model read the training data.

    A training loop of one's own calls it at the start of each epoch. With `peft_lab.train`, or a `Trainer` with the
    callback `ReadTrainingData`, this happens by itself. It does nothing where no adapter wants data. The model is in
    eval mode meanwhile, and what is drawn at random afterwards is the same with and without readers.

    Args:
        model: a model with adapters on it; wrapped (DistributedDataParallel) or not.
        batches: all training rows, as keyword arguments for the model's forward with `labels`, for instance a
            `DataLoader`; the same rows in every process. They are brought to the model's device as they are drawn.
        epoch: number of the epoch that begins, from 0: some adapters read once, others at each epoch.

    Raises:
        ConfigError: the rows are not such as an adapter can read, or ZeRO-3 has partitioned the weights.
    """
    training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):  # a loader draws a seed for its workers
            _in_forward(model, lambda: _read(model, batches, epoch))
        share_arrays(model)
    finally:
        model.train(training)


def _read(model: nn.Module, batches: Iterable[Mapping[str, Any]], epoch: int) -> None:
    for reader in _readers(model):
        reader.read_data(_on_device(model, batches), epoch)


def _in_forward(model: nn.Module, read: Callable[[], None]) -> None:
    """Call `read` with the weights at hand that FSDP2 gathers for a forward of the whole model."""
    if not isinstance(model, FSDPModule):
        read()
        return
    # readers call parts of the model, whose forward gathers their own weights and not those of the whole
    whole: Any = model
    whole.read_data_in_forward = read
    register_fsdp_forward_method(model, "read_data_in_forward")
    try:
        whole.read_data_in_forward()
    finally:
        del whole.read_data_in_forward


class ReadTrainingData(TrainerCallback):
    """Callback that lets adapters read the training data before each epoch.

    The rows come in order, without shuffling.

    An adapter that wants it has a tuner or a layer with `read_data(batches, epoch)`: `batches` are as the model takes
    them and on its device, made anew as they are drawn, so a reader that needs none draws none; `epoch` counts from 0,
    the model is in eval mode. With `wants_data()` beside it, it reads only while that is true, and no adapter reads
    while it is switched off. `peft_lab.train` adds this callback by itself; a script with a `Trainer` of its own adds
    it by `trainer.add_callback`, and a loop without one calls `read_training_data`. All processes read all rows, so
    they find the same. A training resumed within an epoch does not read again: what was found is in the checkpoint.

    Raises:
        ConfigError: an adapter draws training data that have no length.
    """

    def __init__(self) -> None:
        self._has_begun = False

    def before_sharding(self, model: nn.Module, loader: Any, batch_size: int) -> None:
        """Read for the first epoch while the parameters are whole, into which an adapter writes what it finds."""
        self._has_begun = True
        if _readers(model):
            read_training_data(model, _InOrder(loader, batch_size))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hand the training data to the modules that read it."""
        model, loader = kwargs["model"], kwargs["train_dataloader"]
        if not _readers(model) or (self._has_begun and state.global_step == 0):
            return
        # the last step of an epoch may have fewer batches, and counts all the same
        steps = math.ceil(len(loader) / args.gradient_accumulation_steps) if _has_length(loader) else 0
        if steps and state.global_step % steps:  # resumed within an epoch
            return
        # the training's own loader would shuffle, and its draws would change those of the training
        rows = _InOrder(loader, args.eval_batch_size)
        read_training_data(model, rows, state.global_step // steps if steps else 0)


def reads_training_data(model: nn.Module) -> bool:
    """Test whether an adapter of a model reads the training data."""
    return bool(_readers(model))


class _InOrder:
    """Rows of a loader in order; a stream raises `ConfigError`."""

    def __init__(self, loader: Any, batch_size: int) -> None:
        self.loader, self.batch_size = loader, batch_size

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        if not _has_length(self.loader):
            raise ConfigError("The adapter reads the training data between epochs, and a stream of rows has no epochs.")
        return iter(DataLoader(self.loader.dataset, self.batch_size, collate_fn=self.loader.collate_fn))


def _readers(model: nn.Module) -> list[Any]:
    # by class: peft's wrappers answer for the modules inside them, which would then read twice
    able: list[Any] = [module for module in model.modules() if hasattr(type(module), "read_data")]
    able = [module for module in able if not _is_switched_off(module)]
    return [module for module in able if not hasattr(type(module), "wants_data") or module.wants_data()]


def _is_switched_off(module: nn.Module) -> bool:
    """Test whether a layer of adapters, or every layer of a tuner, is switched off."""
    layers = [part for part in module.modules() if isinstance(part, BaseTunerLayer)]
    return bool(layers) and all(layer.disable_adapters for layer in layers)


def _on_device(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    if any(is_partitioned(parameter) for parameter in model.parameters()):
        raise ConfigError(
            "The adapter reads the training data, and DeepSpeed ZeRO-3 does not gather the weights for that; use "
            "ZeRO-2 or FSDP2."
        )
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    for batch in batches:
        moved = {name: value.to(device) for name, value in batch.items() if hasattr(value, "to")}
        yield {**batch, **moved}


def _has_length(loader: Any) -> bool:
    return isinstance(loader.dataset, Sized)
