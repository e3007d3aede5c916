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


def keep_statistics(model: nn.Module) -> None:
    """Let the frozen norms of `model` keep their statistics.

    That holds from now on, through every `model.train()`.
    """
    if _running_norms(model) and set_frozen_norms not in model._forward_pre_hooks.values():
        # not a hook on each norm: what a method folds into a norm, it cannot where the norm itself has hooks
        model.register_forward_pre_hook(set_frozen_norms)


def release_statistics(model: nn.Module) -> None:
    """Take back `keep_statistics`."""
    for key in [key for key, hook in model._forward_pre_hooks.items() if hook is set_frozen_norms]:
        del model._forward_pre_hooks[key]


def set_frozen_norms(model: nn.Module, args: Any = None) -> None:
    """Put the frozen norms of a model into evaluation mode.

    Also a pre-hook of the model; a model in evaluation mode stays as it is.
    """
    if model.training:
        for norm in frozen_norms(model):
            norm.training = False


def _running_norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, _RUNNING_NORMS) and m.track_running_stats]
