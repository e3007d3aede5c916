"""Bottleneck: a narrow two-layer perceptron on tokens, and its start values."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import dropout, gelu, linear, relu, silu


def quick_gelu(x: Tensor) -> Tensor:
    """GELU approximated by x sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


#: Activations between the two layers, by name.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": relu,
    "gelu": gelu,
    "silu": silu,
    "tanh": torch.tanh,
    "quick_gelu": quick_gelu,
}


def bottleneck_output(
    x: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    activation: Callable[[Tensor], Tensor],
    drop: float = 0.0,
) -> Tensor:
    """Output up(activation(down(x))) of a bottleneck, in the dtype of its weights.

    Args:
        x: tokens (..., width) of any float dtype.
        down: weight (r, width), with its bias (r,) or None.
        down_bias: see `down`.
        up: weight (width, r), with its bias (width,) or None.
        up_bias: see `up`.
        activation: function between the layers.
        drop: share of the activated units that is dropped; 0 in evaluation.
    """
    hidden = activation(linear(x.to(down.dtype), down, down_bias))
    # A dropout of nothing would still be kept for the backward pass.
    return linear(dropout(hidden, drop) if drop else hidden, up, up_bias)


def linear_start(rows: int, columns: int) -> Tensor:
    """Weight (rows, columns), float32, uniform in +-1 / sqrt(columns), as nn.Linear starts."""
    limit = 1 / math.sqrt(columns)
    return torch.empty(rows, columns).uniform_(-limit, limit)


def bias_start(rows: int, columns: int) -> Tensor:
    """Bias (rows,) of a layer with so many columns, as nn.Linear starts."""
    limit = 1 / math.sqrt(columns)
    return torch.empty(rows).uniform_(-limit, limit)
