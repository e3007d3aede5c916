"""BiP: bi-level pruning of weights, by entries or by filters.

Source: Zhang et al. 2022, Advancing Model Pruning via Bi-level Optimization, NeurIPS 2022, arXiv:2210.04092; code of
the authors: github.com/OPTML-Group/BiP. The mask m is chosen for weights θ that are retrained under it:

    min over m of l(m ⊙ θ*(m))     subject to     θ*(m) = argmin over θ of l(m ⊙ θ) + (γ / 2) ||θ||²

With z = m ⊙ θ and g = dl/dz, one step of each level, on a batch of its own, is

    lower:   θ <- θ - α (m ⊙ g + λ θ)
    upper:   s <- s - β c (θ - (1 / γ) m ⊙ g) ⊙ g,     m <- 1 for the largest scores s, 0 for the others

The second part of the upper gradient is the implicit gradient of θ*(m). It needs no second derivatives, because m and θ
enter the loss by their product alone, and the Hessian of l is left out beside γ.

Readings where paper and code are open or differ:

- scores start at |θ|, so the first mask is that of magnitude. They are not clamped, and a score that falls below zero
  is a low one (the authors' code takes |s|, by which it would rise again);
- a mask has the values 0 and 1, scores have the size of weights. The factor c, the root mean square of the first
  scores over that of their first gradient, both of what is ranked together, makes β a relative step: 0.1 moves the
  scores by a tenth at first;
- entries are ranked over all layers together, filters within each layer, as in the authors' code. A filter, which is an
  output row of a linear layer, has one score and one mask value: the score starts at the filter's L2 norm, and its
  gradient is the sum over the filter;
- in the paper γ stands at both levels. For pretrained weights no number fits both: a small γ lets the implicit part, a
  product of two gradients, outweigh the rest, and a large one wipes out the weights in a few steps. The authors' code
  has two numbers, and so has this: the weight decay λ in place of γ at the lower level, 1e-4 as there, and γ at the
  upper one, 10, which is the default there (its settings for CIFAR and ImageNet have 1e4);
- the implicit part is that of the equation above; the authors' code multiplies the mask's gradient by itself there;
- parameters outside of the layers that require a gradient, such as a new head, take plain steps at the lower level;
- the model runs in evaluation mode, without dropout and with frozen statistics of its norms.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from peft_lab.backbones.sharded_weights import holds_shards
from peft_lab.errors import ConfigError, DivergedError
from peft_lab.tuners.operations import Operation, operation

_PRUNABLE = ("linear", "conv1d", "conv2d")
_NO_PART = "The loss does not depend on the layers that BiP prunes; choose layers that the model uses."


@dataclass(frozen=True)
class BiPSolution:
    """Result of `solve_bip`, each by the layer's name.

    Attributes:
        masks: bool, of the weight's shape and on its device; True is kept.
        scores: float32, of the weight's shape, by filter (out,); the largest are kept.
        weights: retrained θ, float32, of the weight's shape and not masked.
    """

    masks: dict[str, Tensor]
    scores: dict[str, Tensor]
    weights: dict[str, Tensor]


def bip_masks(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Mapping[str, Any]],
    share: float,
    structured: bool = False,
    **options: Any,
) -> dict[str, Tensor]:
    """Masks of `solve_bip` alone: True for what is kept, of each weight's shape, by the layer's name."""
    return solve_bip(model, layers, batches, share, structured=structured, **options).masks


def solve_bip(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Mapping[str, Any]],
    share: float,
    *,
    structured: bool = False,
    steps: int = 20,
    learning_rate: float = 0.01,
    mask_learning_rate: float = 0.1,
    penalty: float = 10.0,
    weight_decay: float = 1e-4,
    by_layer: bool | None = None,
) -> BiPSolution:
    """Choose by bi-level steps what of some weights is pruned.

    The model is as before in the end, bit for bit: weights, modes and which parameters require a gradient. The same
    batches give the same masks.

    Args:
        model: a model whose forward returns an output with a `loss`.
        layers: modules of it by name: Linear, transformers' Conv1D, Conv2d.
        batches: keyword arguments of its forward with labels, on its device. At most 2 `steps` of them are drawn and
            kept; the first of each two is for the weights, the second for the scores. Fewer begin again.
        share: of the entries or filters, those that are pruned, above 0 and below 1; at least one stays in each layer
            where ranks are made by layer.
        structured: prune filters, which are output rows of a linear layer, instead of entries.
        steps: steps of each level.
        learning_rate: α of the weights.
        mask_learning_rate: β of the scores, relative to their size.
        penalty: γ, the divisor of the implicit gradient.
        weight_decay: λ of the lower level, at least 0.
        by_layer: prune the share in each layer, instead of over all; None for filters alone.

    Raises:
        ConfigError: there are no layers, or some that cannot be pruned; less than two batches; no loss, or one that
            does not depend on the layers; a number is out of its range.
        DivergedError: the loss is not finite.
    """
    _check(share, steps, learning_rate=learning_rate, mask_learning_rate=mask_learning_rate, penalty=penalty)
    if not 0 <= weight_decay < float("inf"):
        raise ConfigError(f"weight_decay={weight_decay} of BiP must be at least 0 and finite.")
    kept = list(islice(batches, 2 * steps))
    if len(kept) < 2:
        raise ConfigError(
            f"BiP takes two batches, for weights and scores, and there are {len(kept)}; give more rows or smaller "
            "batches."
        )
    if holds_shards(model):
        raise ConfigError("BiP prunes whole weights, and those of the model are sharded; prune it before.")
    pruned = [_Layer(name, module, structured) for name, module in layers.items()]
    _check_layers(pruned)
    by_layer = structured if by_layer is None else by_layer
    _project(pruned, share, by_layer)
    with _working_copies(model, pruned) as others:
        scales: list[float] = []
        for step in range(steps):
            weights, scores = kept[2 * step % len(kept)], kept[(2 * step + 1) % len(kept)]
            _lower_step(model, pruned, others, weights, learning_rate, weight_decay, step)
            gradients = _upper_gradients(model, pruned, scores, penalty, step)
            scales = scales or _scales(pruned, gradients, by_layer)
            for layer, gradient, scale in zip(pruned, gradients, scales, strict=True):
                layer.scores -= mask_learning_rate * scale * gradient
            _project(pruned, share, by_layer)
    return BiPSolution(
        masks={layer.name: layer.mask.expand(layer.theta.shape).clone() for layer in pruned},
        scores={layer.name: layer.scores for layer in pruned},
        weights={layer.name: layer.theta for layer in pruned},
    )


class _Layer:
    """State of one layer.

    `theta` is float32 in the layout of the weight, `scores` of its shape or (out,), `mask` bool and broadcasts over it.
    """

    def __init__(self, name: str, module: nn.Module, structured: bool) -> None:
        self.name, self.structured = name, structured
        self.op: Operation = operation(module, name)
        if self.op.op_type not in _PRUNABLE or self.op.quantization:
            raise ConfigError(
                f'BiP cannot prune "{name}", a {type(module).__name__}; it prunes Linear, Conv1D and Conv2d in '
                "float32, bfloat16 or float16."
            )
        self.weight: Any = module.weight
        if not isinstance(self.weight, nn.Parameter):
            raise ConfigError(f'The weight of "{name}" is computed from others, and BiP prunes parameters alone.')
        if self.weight.is_meta:
            raise ConfigError(f'BiP needs the values of "{name}", which are not loaded; load the base first.')
        self.theta = self.weight.detach().float().clone()
        self.scores = self.op.matrix(self.theta).norm(dim=1) if structured else self.theta.abs()
        self.mask = torch.ones_like(self.theta, dtype=torch.bool)

    def set_mask(self, kept: Tensor) -> None:
        """Set the mask from flat values, one for each score."""
        kept = kept.to(self.theta.device)
        self.mask = kept.view(self.op.scale_shape(self.theta.ndim) if self.structured else self.theta.shape)

    def reduced(self, values: Tensor) -> Tensor:
        """Sum values of the weight's shape to those of the scores."""
        return self.op.matrix(values).sum(1) if self.structured else values


def _check(share: float, steps: int, **positive: float) -> None:
    if not 0 < share < 1:
        raise ConfigError(f"share={share} of what BiP prunes must be above 0 and below 1.")
    if steps < 1:
        raise ConfigError(f"steps={steps} of BiP must be at least 1.")
    for name, value in positive.items():
        if not 0 < value < float("inf"):
            raise ConfigError(f"{name}={value} of BiP must be above 0 and finite.")


def _check_layers(layers: list[_Layer]) -> None:
    if not layers:
        raise ConfigError("BiP has no layers to prune; name some linear or convolution layers.")
    seen: dict[int, str] = {}
    for layer in layers:
        other = seen.setdefault(id(layer.weight), layer.name)
        if other != layer.name:
            raise ConfigError(f'"{other}" and "{layer.name}" have one weight together; give BiP one of them.')


def _project(layers: list[_Layer], share: float, by_layer: bool) -> None:
    """Set the masks: the largest scores are kept, among equal ones the first.

    Raises:
        ConfigError: the share of so few scores is none.
    """
    for group in [[layer] for layer in layers] if by_layer else [layers]:
        # On the CPU, where ties fall alike for every device.
        scores = torch.cat([layer.scores.cpu().reshape(-1) for layer in group])
        count = min(round(share * len(scores)), len(scores) - 1)
        if not count:
            raise ConfigError(f'share={share} prunes none of {len(scores)} in "{group[0].name}"; give a larger share.')
        kept = torch.ones(len(scores), dtype=torch.bool)
        kept[scores.argsort(descending=True, stable=True)[len(scores) - count :]] = False
        for layer, own in zip(group, kept.split([layer.scores.numel() for layer in group]), strict=True):
            layer.set_mask(own)


@contextmanager
def _working_copies(model: nn.Module, layers: list[_Layer]) -> Iterator[list[nn.Parameter]]:
    """Put copies in place of what BiP changes, and give the trained parameters that no layer has."""
    own = {id(layer.weight) for layer in layers}
    others = [value for value in model.parameters() if value.requires_grad and id(value) not in own]
    borrowed: list[Any] = [*(layer.weight for layer in layers), *others]
    before = [(value, value.data, value.requires_grad) for value in borrowed]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for value in borrowed:
            value.data = value.data.clone()
            value.requires_grad_(True)
        yield others
    finally:
        for value, data, requires_grad in before:
            value.data = data
            value.requires_grad_(requires_grad)
        for module, training in modes:
            module.training = training


def _gradients(
    model: nn.Module, layers: list[_Layer], others: list[nn.Parameter], batch: Mapping[str, Any], step: int
) -> list[Tensor]:
    """Gradients of the loss by the masked weights, float32, then by the other parameters."""
    for layer in layers:
        layer.weight.data.copy_(layer.theta * layer.mask)
    with torch.enable_grad():
        loss = getattr(model(**batch), "loss", None)
        if loss is None:
            raise ConfigError("BiP needs batches with labels, and the model returned no loss for them.")
        if not loss.requires_grad:
            raise ConfigError(_NO_PART)
        if not loss.isfinite():
            raise DivergedError(f"The loss of BiP is {loss.item()} at step {step + 1}; give a smaller learning rate.")
        values = [*(layer.weight for layer in layers), *others]
        found = torch.autograd.grad(loss, values, allow_unused=True, materialize_grads=True)
    return [gradient.float() for gradient in found]


@torch.no_grad()
def _lower_step(
    model: nn.Module,
    layers: list[_Layer],
    others: list[nn.Parameter],
    batch: Mapping[str, Any],
    rate: float,
    decay: float,
    step: int,
) -> None:
    """Step of gradient descent of the weights under the mask."""
    gradients = _gradients(model, layers, others, batch, step)
    for layer, gradient in zip(layers, gradients[: len(layers)], strict=True):
        layer.theta -= rate * (layer.mask * gradient + decay * layer.theta)
    for value, gradient in zip(others, gradients[len(layers) :], strict=True):
        value.sub_((rate * gradient).to(value.dtype))


@torch.no_grad()
def _upper_gradients(
    model: nn.Module, layers: list[_Layer], batch: Mapping[str, Any], penalty: float, step: int
) -> list[Tensor]:
    """Gradients of the scores, the implicit part included."""
    found = []
    for layer, gradient in zip(layers, _gradients(model, layers, [], batch, step), strict=True):
        found.append(layer.reduced((layer.theta - layer.mask * gradient / penalty) * gradient))
    return found


def _scales(layers: list[_Layer], gradients: list[Tensor], by_layer: bool) -> list[float]:
    """Root mean square of the scores over that of their gradients, for each layer; 0 where these are zero."""
    sizes = [float(layer.scores.double().norm()) for layer in layers]
    steps = [float(gradient.double().norm()) for gradient in gradients]
    if not any(steps):
        raise ConfigError(_NO_PART)
    if not by_layer:
        return [math.hypot(*sizes) / math.hypot(*steps)] * len(layers)
    return [size / step if step else 0.0 for size, step in zip(sizes, steps, strict=True)]
