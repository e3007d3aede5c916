"""Plain expressions and measures that the tests of the autograd functions compare with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def broadcast(value: Tensor, y: Tensor, channel_dim: int) -> Tensor:
    """Independent of the code under test: moves the channels last instead of building a shape."""
    if value.ndim == 2:
        value = value.reshape(value.shape[0], *[1] * (y.ndim - 2), value.shape[1]) if y.ndim > 2 else value
    expanded = value.expand_as(y.movedim(channel_dim, -1))
    return expanded.movedim(-1, channel_dim)


def plain(y: Tensor, scale: Tensor, shift: Tensor, channel_dim: int = -1) -> Tensor:
    return y * broadcast(scale, y, channel_dim) + broadcast(shift, y, channel_dim)


def projection(out: Tensor) -> Tensor:
    return torch.linspace(-1, 1, out.numel(), dtype=torch.float64).to(out.dtype).view(out.shape)


def gradients(function: Callable[..., Tensor], *inputs: Tensor, weights: Tensor | None = None) -> list[Tensor]:
    """Output and gradients of a fixed random projection of it."""
    leaves = [value.detach().clone().requires_grad_(value.requires_grad) for value in inputs]
    out = function(*leaves)
    weights = projection(out) if weights is None else weights
    (out * weights).sum().backward()  # not autograd.grad, which the reentrant checkpoint refuses
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.requires_grad)]


def assert_same(actual: list[Tensor], expected: list[Tensor], **tolerance: float) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def kept_bytes(function: Callable[[], Tensor]) -> dict[int, int]:
    """Address and size of each storage that autograd keeps for the graph of the function."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return storages


def parameters(channels: int, rows: int | None = None, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    shape = (channels,) if rows is None else (rows, channels)
    scale = (1 + 0.3 * torch.randn(shape, dtype=dtype)).requires_grad_()
    return scale, torch.randn(shape, dtype=dtype).requires_grad_()
