"""Kernels for spectral deltas with minimal memory and FLOPs.

Training keeps and computes no more than it must:

``spectral_linear``   ``x Wᵀ + b + ((x Vhᵀ) * delta) Uᵀ`` by the cheapest of three plans.
``spectral_conv2d``   the same for a convolution; ``spectral_delta`` for a Linear, without the base.

All of them equal the plain expression, in value and in first derivatives, and fall back to it under ``torch.compile``,
whose own partitioner chooses what to keep. Second derivatives are refused with an error rather than given wrongly.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from peft_lab.tuners.dtypes import WIDE_DTYPES, sum_dtype

Plan = Literal["factored", "projected", "materialised"]


def spectral_flops(
    plan: Plan,
    tokens: int,
    in_features: int,
    out_features: int,
    rank: int,
    *,
    fusable: bool,
    train: bool,
    input_grad: bool,
) -> int:
    """FLOPs of a plan beyond those of the frozen layer.

    The frozen layer takes 2NMK in forward and 2NMK for the input gradient, for N tokens, M in, K out.

    ============  =====================================  ==========================================================
    plan          forward                                backward
    ============  =====================================  ==========================================================
    factored      2Nr(M+K)                               g U: 2NKr; input gradient: 2NMr
    projected     W' = W + U diag(delta) Vh: 2KMr,       g U: 2NKr; W' again if it was not kept: 2KMr
                  x Vhᵀ: 2NMr
    materialised  W': 2KMr                               A = gᵀ x: 2NMK; diag(Uᵀ A Vhᵀ): 2KMr
    ============  =====================================  ==========================================================

    Where the delta cannot be added into W (``fusable`` false) a materialised delta costs 2NMK more in forward and again
    for the input gradient, and there is no projected plan; nor is there without training.
    """
    weight, build = 2 * tokens * in_features * out_features, 2 * out_features * in_features * rank
    down, up = 2 * tokens * in_features * rank, 2 * tokens * out_features * rank
    if plan == "factored":
        return down + up + train * (up + input_grad * down)
    if plan == "projected":
        rebuilt = input_grad and not _keeps_weight(tokens, in_features, out_features, rank)
        return build + train * (down + up + rebuilt * build)
    # A delta that is not added into W needs products of its own with input and output gradient.
    apart = 0 if fusable else weight
    return build + apart + train * (weight + build + input_grad * apart)


def spectral_plan(*sizes: int, fusable: bool, train: bool = True, input_grad: bool = True, plain: bool = False) -> Plan:
    """Plan with the fewest FLOPs for the sizes of :func:`spectral_flops`.

    Of equals it is the one that keeps least. ``plain`` leaves out the projected plan, which needs a backward of its
    own.

    Kept for backward: factored N r; projected N r, and the M K of W' where that is less; materialised N M + M K.
    """
    # In the order of what they keep, so that min() takes the first of equals.
    plans: tuple[Plan, ...] = ("factored", "materialised")
    if fusable and train and not plain:
        plans = ("factored", "projected", "materialised")
    costs = {plan: spectral_flops(plan, *sizes, fusable=fusable, train=train, input_grad=input_grad) for plan in plans}
    return min(plans, key=costs.__getitem__)


def spectral_linear(x: Tensor, weight: Tensor, bias: Tensor | None, u: Tensor, delta: Tensor, vh: Tensor) -> Tensor:
    """Linear layer with a spectral delta, by the cheapest plan.

    It computes ``x Wᵀ + b + ((x Vhᵀ) * delta) Uᵀ``.

    W, U and Vh are frozen. With delta = 0 the result equals ``F.linear(x, weight, bias)`` exactly, whatever the plan.
    Nothing is added to a weight of half precision, nor under autocast: small deltas would round away; base and delta
    are computed apart.

    Args:
        x: ``(..., in)``.
        weight: ``(out, in)``, any strides; bias: ``(out,)`` or None.
        u: ``(out, r)``; vh: ``(r, in)``; both frozen.
        delta: ``(r,)``, or ``(B, r)`` for one delta per row of the batch.

    Source: SVFit (arXiv 2409.05926) for the parametrisation; the plans are ours.
    """
    if not _fusable(x, weight, u, delta, vh):
        return F.linear(x, weight, bias) + spectral_delta(x, u, delta, vh)
    plan = _plan_for(_rows(x), x, u, delta, vh, fusable=True)
    if plan == "factored":
        return F.linear(x, weight, bias) + _factored(x, u, delta, vh)
    if plan == "projected":
        return _ProjectedLinear.apply(x, weight, bias, u, delta, vh)
    return F.linear(x, _compose(weight, u, delta, vh), bias)  # autograd's own backward is the cheapest here


def spectral_conv2d(x: Tensor, conv: nn.Conv2d, u: Tensor, delta: Tensor, vh: Tensor) -> Tensor:
    """Compute ``conv(x)`` with ``U diag(delta) Vh`` added to its weight.

    The weight is seen as the matrix ``(out, in * height * width)``. Factored (a convolution to r channels and a 1x1
    one) or through ``W'``, by the count of ``spectral_linear`` with the positions of the output as tokens. Delta = 0
    gives the bits of ``conv(x)``, and half precision is kept apart.

    Args:
        x: ``(B, C, H, W)``.
        conv: a frozen convolution without groups, any padding mode.
        u, delta, vh: as for ``spectral_linear``, ``vh`` of shape ``(r, in * height * width)``.

    Raises:
        ValueError: the convolution has groups, across which no channels mix.
    """
    if conv.groups != 1:
        raise ValueError(f"spectral_conv2d needs a convolution without groups, not one of {conv.groups}.")
    weight = conv.weight
    if weight.is_contiguous() and _fusable(x, weight.flatten(1), u, delta, vh):
        # Rounded up, which counts the positions of the output well enough for a choice of plan.
        sides = [-(-side // step) for side, step in zip(x.shape[2:], conv.stride, strict=True)]
        positions = x.shape[0] * math.prod(sides)
        if _plan_for(positions, x, u, delta, vh, fusable=True, plain=True) == "materialised":
            composed = _compose(weight.flatten(1), u, delta, vh).view_as(weight)
            return conv._conv_forward(x, composed, conv.bias)
    # Factored: Vh as a convolution to r channels, then U as a 1x1 convolution.
    hidden = conv._conv_forward(x, vh.to(x.dtype).reshape(-1, *weight.shape[1:]), None)
    scaled = (hidden * delta.reshape(-1, delta.shape[-1], 1, 1)).to(x.dtype)
    return conv(x) + F.conv2d(scaled, u.to(x.dtype)[:, :, None, None])


def spectral_delta(x: Tensor, u: Tensor, delta: Tensor, vh: Tensor) -> Tensor:
    """Compute the delta ``((x Vhᵀ) * delta) Uᵀ`` alone.

    For a base that is no plain Linear. Shapes as for ``spectral_linear``. Computed in the dtype of x (or of autocast);
    products with delta in the wider of the two dtypes.
    """
    if delta.ndim != 1 or _plan_for(_rows(x), x, u, delta, vh, fusable=False) == "factored":
        return _factored(x, u, delta, vh)
    return F.linear(x, (u * delta).to(x.dtype) @ vh.to(x.dtype))


def _fusable(x: Tensor, weight: Tensor, u: Tensor, delta: Tensor, vh: Tensor) -> bool:
    """Test whether U diag(delta) Vh may be added to W.

    It may if none of it rounds away, W is frozen, and the sum can have W's layout.
    """
    if weight.requires_grad or delta.ndim != 1 or torch.is_autocast_enabled(x.device.type):
        return False
    if not (weight.dtype == x.dtype == delta.dtype == u.dtype == vh.dtype and weight.dtype in WIDE_DTYPES):
        return False
    return weight.is_contiguous() or weight.t().is_contiguous()


def _plan_for(
    tokens: int, x: Tensor, u: Tensor, delta: Tensor, vh: Tensor, *, fusable: bool, plain: bool = False
) -> Plan:
    train, plain = torch.is_grad_enabled() and delta.requires_grad, plain or torch.compiler.is_compiling()
    sizes = (tokens, vh.shape[1], u.shape[0], vh.shape[0])
    return spectral_plan(*sizes, fusable=fusable, train=train, input_grad=x.requires_grad, plain=plain)


def _rows(x: Tensor) -> int:
    return x.numel() // max(1, x.shape[-1])


def _keeps_weight(tokens: int, in_features: int, out_features: int, rank: int) -> bool:
    """Test whether the projected plan keeps W' for backward.

    It does if W' is no larger than the projection kept beside it.
    """
    return in_features * out_features <= tokens * rank


def _factored(x: Tensor, u: Tensor, delta: Tensor, vh: Tensor) -> Tensor:
    """Factored plan: project down, scale, project up."""
    # One delta per row of the batch is broadcast over the dimensions in between.
    if delta.ndim == 2:
        delta = delta.view(delta.shape[0], *[1] * (x.ndim - 2), delta.shape[1])
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    # Without casts autograd keeps the bases themselves, so a backward of our own would save nothing.
    if u.dtype == vh.dtype == dtype or torch.compiler.is_compiling():
        projected = F.linear(x, vh.to(x.dtype))
        return F.linear((projected * delta).to(x.dtype), u.to(x.dtype))
    return _FactoredDelta.apply(x, u, delta, vh, dtype)


class _FactoredDelta(torch.autograd.Function):
    """Factored plan for bases in a wider dtype than the activations.

    Backward makes the casts of the bases again instead of keeping them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, u: Tensor, delta: Tensor, vh: Tensor, dtype: torch.dtype) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            projected = F.linear(x.to(dtype), vh.to(dtype))
            ctx.x_dtype = x.dtype
            ctx.save_for_backward(projected if ctx.needs_input_grad[2] else None, u, delta, vh)
            return F.linear((projected * delta).to(dtype), u.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        projected, u, delta, vh = ctx.saved_tensors
        grad_scaled = (grad @ u.to(grad.dtype)).to(sum_dtype(grad, delta))
        grad_x = grad_delta = None
        if ctx.needs_input_grad[0]:
            grad_x = ((grad_scaled * delta).to(grad.dtype) @ vh.to(grad.dtype)).to(ctx.x_dtype)
        if ctx.needs_input_grad[2]:
            grad_delta = (grad_scaled * projected).sum_to_size(delta.shape).to(delta.dtype)
        return grad_x, None, grad_delta, None, None


def _compose(weight: Tensor, u: Tensor, delta: Tensor, vh: Tensor) -> Tensor:
    """Compute W + U diag(delta) Vh in W's own memory layout.

    So a matrix product rounds as with W itself.
    """
    if weight.is_contiguous():
        return torch.addmm(weight, u * delta, vh)
    return torch.addmm(weight.t(), vh.t() * delta, u.t()).t()


class _ProjectedLinear(torch.autograd.Function):
    """Projected plan: forward through W', gradient of delta from two projections.

    W' costs no FLOPs per token; the projections are those of input and output gradient on the subspace.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, u: Tensor, delta: Tensor, vh: Tensor
    ) -> Tensor:
        composed = _compose(weight, u, delta, vh)
        projected = F.linear(x, vh) if ctx.needs_input_grad[4] else None
        ctx.composed = _keeps_weight(_rows(x), weight.shape[1], weight.shape[0], delta.shape[0])
        ctx.save_for_backward(projected, composed if ctx.composed else weight, u, delta, vh)
        return F.linear(x, composed, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        projected, weight, u, delta, vh = ctx.saved_tensors
        grad_x = grad_bias = grad_delta = None
        # W' is composed again where keeping it would have taken more memory than the projection.
        if ctx.needs_input_grad[0]:
            grad_x = grad @ (weight if ctx.composed else _compose(weight, u, delta, vh))
        if ctx.needs_input_grad[2]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        if ctx.needs_input_grad[4]:
            grad_delta = ((grad @ u) * projected).reshape(-1, delta.shape[0]).sum(0)
        return grad_x, None, grad_bias, None, grad_delta, None
