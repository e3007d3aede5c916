"""Objective of aTLAS beside the task's loss: penalty, negation, choice of blocks by gradient."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_lab.errors import ConfigError
from peft_lab.tuners import ForwardContext, LossTerm

#: Row input, and column of the task, that marks the rows whose answers are to be kept: 1 for these, 0 for the others.
CONTROL = "control"
#: Value in `atlas_chosen` before the blocks are chosen.
UNREAD = -1.0
_NO_LOSS = "The model returned no loss, so l1, l2 and negate of atlas have no effect; pass labels to its forward."


def run_with_objective(model: nn.Module, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Run a model's forward, and add terms to the loss that it returns in training as its adapters say.

    Raises:
        ConfigError: a negation of another loss than that of one label for each row.
    """
    out = forward(**arguments)
    if not (model.training and torch.is_grad_enabled()):
        return out
    layers = _active_layers(model)
    configs = {name: layer.configs[name] for layer, name in layers}
    if not any(config.l1 or config.l2 or config.negate for config in configs.values()):
        return out
    if getattr(out, "loss", None) is None:
        warnings.warn(_NO_LOSS, stacklevel=2)
        return out
    context = ForwardContext.current()
    assert context is not None, "this runs in the call of a whole model"
    # as terms, which count by the rows of this batch where a step has several batches or processes
    if any(config.negate for config in configs.values()):
        context.loss_terms.append(LossTerm(_negated(context, out.logits, arguments.get("labels")), own=0.0))
    for name, config in configs.items():
        own = [layer.atlas_lambda[name] for layer, of_layer in layers if of_layer == name]
        context.loss_terms.append(LossTerm(penalty(own, config.l1, config.l2)))
    return out


def penalty(coefficients: Sequence[Tensor], l1: float, l2: float) -> Tensor:
    """Penalty of coefficients: norms over the vectors of a block, averaged over the blocks.

    Args:
        coefficients: (vectors, partitions) of each weight.
        l1: factor of the sum of absolute values.
        l2: factor of the root of the sum of squares; its gradient at zero is zero.
    """
    norms = [l1 * value.abs().sum() + l2 * torch.linalg.vector_norm(value) for value in coefficients]
    return torch.stack(norms).mean()


def _negated(context: ForwardContext, logits: Tensor, labels: Tensor | None) -> Tensor:
    """Mean loss of the control rows minus that of the others; a part without rows counts zero."""
    if labels is None or logits.ndim != 2 or labels.ndim != 1 or labels.is_floating_point():
        raise ConfigError("negate needs a classification with one label for each row; leave it out for other tasks.")
    control = context.row_input(CONTROL, len(labels))
    assert control is not None, "the config declares it with a column"
    losses = F.cross_entropy(logits.float(), labels, reduction="none")
    keep = control.to(losses)
    kept, forgotten = losses @ keep / keep.sum().clamp_min(1), losses @ (1 - keep) / (1 - keep).sum().clamp_min(1)
    return kept - forgotten


def choose_blocks(model: Any, layers: Sequence[Any], adapter: str, batches: Iterable[Mapping[str, Any]]) -> None:
    """Choose the pairs of a vector and a weight whose coefficients are trained.

    These are the `blocks` with the largest gradients of the loss, summed over the training rows, in absolute value;
    with partitions, by their norm.

    Raises:
        ConfigError: there are fewer pairs, or the batches give no loss.
    """
    count = layers[0].configs[adapter].blocks
    for layer in layers:
        layer.atlas_chosen[adapter].fill_(1)
    values = [layer.atlas_lambda[adapter] for layer in layers]
    sums = [torch.zeros_like(value) for value in values]
    with torch.enable_grad():
        for batch in batches:
            loss = model(**batch).loss
            if loss is None:
                raise ConfigError("blocks needs batches with labels, and the model returned no loss for them.")
            for total, gradient in zip(sums, torch.autograd.grad(loss, values), strict=True):
                # a mean over the batch counts for its rows
                total += len(batch["labels"]) * gradient
    sizes = torch.cat([total.norm(dim=1) for total in sums])
    if count > len(sizes):
        raise ConfigError(f"blocks={count} is more than the {len(sizes)} pairs of a vector and a weight; leave it out.")
    chosen = torch.zeros_like(sizes)
    chosen[sizes.topk(count).indices] = 1
    for layer, own in zip(layers, chosen.split([len(value) for value in values]), strict=True):
        layer.atlas_chosen[adapter].copy_(own)


def _active_layers(model: nn.Module) -> list[tuple[Any, str]]:
    """Layers of aTLAS with each of their active adapters."""
    found: list[tuple[Any, str]] = []
    module: Any
    for module in model.modules():
        if hasattr(module, "atlas_lambda") and not module.disable_adapters:
            found += [(module, name) for name in module.active_adapters if name in module.configs]
    return found
