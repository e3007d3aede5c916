"""Linear layer with a delta on chosen entries of its weight, and the gradient of these entries alone.

No matrix of the weight's size is kept for backward, and none is made for the gradient: it is summed up from gathered
columns, or from blocks of rows of the dense gradient, whichever is faster.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Numbers that a gathered piece or a block of the gradient holds at most.
_PIECE = 2**20
#: A multiplication of gathered numbers takes about as long as this many of a matrix product, measured on a CPU.
_GATHER_COST = 256


def with_entries(weight: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    """Copy of a matrix (out, in) with values (K,) added at flat indices (K,); all other bits stay.

    It lies in memory as the matrix does, so that a product with it rounds alike.
    """
    found, at = weight.clone(), indices.long()
    rows, columns = at // weight.shape[1], at % weight.shape[1]
    found[rows, columns] += values.to(found.dtype)
    return found


def entries_gradient(x: Tensor, grad: Tensor, indices: Tensor) -> Tensor:
    """Entries of gradᵀ x at flat indices.

    Args:
        x: (tokens, in); grad: (tokens, out).
        indices: (K,), ascending, of a matrix (out, in).

    Returns:
        (K,) in the dtype of `grad`.
    """
    width, indices = x.shape[1], indices.long()
    rows, columns = indices // width, indices % width
    if len(indices) * _GATHER_COST < width * grad.shape[1]:
        return _gathered(x, grad, rows, columns)
    return _blocked(x, grad, rows, columns)


def _gathered(x: Tensor, grad: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Sum over tokens of grad[:, row] x[:, column], a piece of the entries at a time."""
    size = max(1, _PIECE // max(1, len(x)))
    # Tokens last, so that what is gathered lies together.
    left, right = grad.t().contiguous(), x.t().contiguous()
    found = [torch.linalg.vecdot(left[r], right[c]) for r, c in zip(rows.split(size), columns.split(size), strict=True)]
    return torch.cat(found) if found else grad.new_zeros(0)


def _blocked(x: Tensor, grad: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Chosen entries of gradᵀ x, of which a block of rows is made at a time."""
    height = max(1, _PIECE // x.shape[1])
    starts = torch.arange(0, grad.shape[1] + height, height, device=rows.device)
    bounds = torch.searchsorted(rows, starts).tolist()
    found = []
    for block, (begin, end) in enumerate(pairwise(bounds)):
        if begin < end:
            part = grad[:, block * height : (block + 1) * height].t() @ x
            found.append(part[rows[begin:end] - block * height, columns[begin:end]])
    return torch.cat(found) if found else grad.new_zeros(0)


class _EntriesLinear(torch.autograd.Function):
    """x (W + S)ᵀ + b with a sparse S; W may be zero, given by its shape alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Any, values: Tensor, indices: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[4] else None, weight, values, indices)
        ctx.shape = shape
        return F.linear(x, _matrix(weight, shape, values, indices), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, values, indices = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_bias = grad_values = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ _matrix(weight, ctx.shape, values, indices)
        if ctx.needs_input_grad[2]:
            grad_bias = flat.sum(0)
        if ctx.needs_input_grad[4]:
            grad_values = entries_gradient(x.reshape(-1, x.shape[-1]), flat, indices)
        return grad_x, None, grad_bias, None, grad_values, None


def _matrix(weight: Tensor | None, shape: Any, values: Tensor, indices: Tensor) -> Tensor:
    if weight is None:
        weight = torch.zeros(shape, dtype=values.dtype, device=values.device)
    return with_entries(weight, values, indices)


def entries_linear(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Any, values: Tensor, indices: Tensor
) -> Tensor:
    """Product x (W + S)ᵀ + b, where S has values (K,) at flat indices and is zero elsewhere.

    Args:
        x: (..., in), in the dtype of `values` and of all others.
        weight: (out, in), frozen; None for zero.
        bias: (out,) or None.
        shape: (out, in).
        values: (K,).
        indices: (K,) integers, ascending.
    """
    # Autocast would compute the forward pass alone in another dtype.
    with torch.autocast(x.device.type, enabled=False):
        made: Tensor = _EntriesLinear.apply(x, weight, bias, shape, values, indices)
    return made
