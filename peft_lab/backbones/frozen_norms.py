"""Frozen normalisation layers with running statistics.

An adapter file does not hold the statistics that they would gather.
"""

from __future__ import annotations

from typing import Any

from torch import nn

#: Normalisation layers that keep running statistics.
_RUNNING_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def frozen_norms(model: nn.Module) -> list[nn.Module]:
    """Return the norms with running statistics that are not trained.

    A layer without parameters of its own counts as frozen if anything in the model is.
    """
    running = _running_norms(model)
    if not running:
        return []
    some_frozen = not all(p.requires_grad for p in model.parameters())
    found: list[nn.Module] = []
    for module in running:
        own = [p.requires_grad for p in module.parameters(recurse=False)]
        if not any(own) and (own or some_frozen):
            found.append(module)
    return found


def set_frozen_norms(model: nn.Module, *arguments: Any) -> None:
    """Put the frozen norms of a model into evaluation mode.

    Also runs before each forward of a model, with its arguments; a model in evaluation mode stays as it is.
    """
    if model.training:
        for norm in frozen_norms(model):
            norm.training = False


def has_running_norms(model: nn.Module) -> bool:
    """Test whether a model has norms with running statistics."""
    return bool(_running_norms(model))


def _running_norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, _RUNNING_NORMS) and m.track_running_stats]
