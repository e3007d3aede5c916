"""Refusal of losses that take the place of a model's own, to which an adapter adds terms."""

from __future__ import annotations

from torch import nn

from peft_lab.errors import ConfigError
from peft_lab.tuners.layer import AdapterLayer


def check_own_loss(model: nn.Module, replaced: bool) -> None:
    """Refuse a loss computed outside of the model for adapters that add terms to the model's own.

    Raises:
        ConfigError: the model's loss is replaced, and an adapter adds terms to it.
    """
    adding = [m for m in model.modules() if isinstance(m, AdapterLayer) and m.adds_loss]
    if adding and replaced:
        raise ConfigError(
            f'Method "{adding[0].info.name}" adds terms to the loss of the model, and label_smoothing_factor, '
            "compute_loss_func, weights of rows or tokens, or unsupervised takes another loss in its place; leave that "
            "out."
        )
