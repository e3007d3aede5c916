"""Random projections from d numbers to a weight by fast Walsh-Hadamard transforms, with the exact adjoint.

Fastfood (Le et al. 2013, Fastfood: Approximating Kernel Expansions in Loglinear Time): P = c H G Pi H B, with random
signs B, a permutation Pi, a Gaussian diagonal G and the Hadamard matrix H, which is symmetric. It takes O(n log n) adds
and n numbers of memory where a dense projection takes n d.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def fwht(x: Tensor) -> Tensor:
    """Walsh-Hadamard transform H x, not normalised, of a vector whose length is a power of two.

    H has the natural order: H[i, j] = (-1) ** (number of bits that i and j have in common).
    """
    source, target = x.clone(), torch.empty_like(x)
    half = len(x) // 2
    while half:
        pairs, out = source.view(-1, 2, half), target.view(-1, 2, half)
        torch.add(pairs[:, 0], pairs[:, 1], out=out[:, 0])
        torch.sub(pairs[:, 0], pairs[:, 1], out=out[:, 1])
        source, target = target, source
        half //= 2
    return source


def padded(length: int) -> int:
    """Smallest power of two that is at least `length`."""
    return 1 << max(0, length - 1).bit_length()


@dataclass(frozen=True)
class Fastfood:
    """Projection of d numbers to n, an isometry on the mean over its draws, scale included.

    Transforms have length N, the power of two that holds both d and n. The d numbers are padded with zeros, so the
    first transform repeats itself, and is made of the power of two that holds d alone.

    Attributes:
        signs: (d,) int8, +1 or -1.
        permutation: (N,) int32.
        bits: (N,) int32, the bits of float32 numbers: the Gaussian diagonal times 1 / sqrt(n sum(gaussian ** 2)). As
            integers they stay whole when a model is cast to another dtype.
    """

    signs: Tensor
    permutation: Tensor
    bits: Tensor

    @classmethod
    def draw(cls, d: int, size: int, seed: int, device: torch.device | str = "cpu") -> Fastfood:
        """Draw a projection of d numbers to `size` by its seed.

        The generator is the CPU's, so the numbers are the same on every device.
        """
        length = padded(max(d, size))
        # A model may be loaded in inference mode and trained afterwards.
        with torch.inference_mode(False), torch.device("cpu"):
            generator = torch.Generator().manual_seed(seed)
            signs = torch.randint(0, 2, (d,), generator=generator, dtype=torch.int8) * 2 - 1
            permutation = torch.randperm(length, generator=generator, dtype=torch.int32)
            gaussian = torch.randn(length, generator=generator)
            gaussian = (gaussian / (gaussian.double().square().sum() * size).sqrt()).float()
            return cls(signs.to(device), permutation.to(device), gaussian.view(torch.int32).to(device))

    def gaussian(self, dtype: torch.dtype) -> Tensor:
        """Scaled Gaussian diagonal (N,)."""
        return self.bits.view(torch.float32).to(dtype)

    def forward(self, x: Tensor, size: int) -> Tensor:
        """First `size` values of P x for a vector x (d,), in the dtype of x."""
        short = fwht(_extended(x * self.signs, padded(len(x))))
        spread = short.index_select(0, self._places(len(short)))
        return fwht(spread * self.gaussian(x.dtype))[:size]

    def adjoint(self, y: Tensor) -> Tensor:
        """Transposed P on a vector y of `size` values: (d,), in the dtype of y."""
        d = len(self.signs)
        spread = fwht(_extended(y, len(self.permutation))) * self.gaussian(y.dtype)
        short = y.new_zeros(padded(d))
        return fwht(short.index_add_(0, self._places(len(short)), spread))[:d] * self.signs

    def _places(self, length: int) -> Tensor:
        """Places in the first transform of this length, which repeats itself, in the order of the permutation."""
        return self.permutation & (length - 1)


def _extended(x: Tensor, length: int) -> Tensor:
    """Vector with zeros behind it."""
    return torch.cat([x, x.new_zeros(length - len(x))])


class _Projected(torch.autograd.Function):
    """factor * P x; backward keeps x and the factor, not the projected vector."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor | None, projection: Fastfood, size: int) -> Tensor:
        ctx.save_for_backward(x, factor)
        ctx.projection = projection
        made = projection.forward(x, size)
        return made if factor is None else made * factor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, factor = ctx.saved_tensors
        back = ctx.projection.adjoint(grad)
        if factor is None:
            return back, None, None, None
        # The derivative by the factor, <grad, P x>, is that of the adjoint with x.
        return back * factor, (back @ x).reshape(factor.shape), None, None


def project(x: Tensor, factor: Tensor | None, projection: Fastfood, size: int) -> Tensor:
    """Projected vector factor * P x, (size,), of x (d,) and a factor (1,) or None."""
    made: Tensor = _Projected.apply(x, factor, projection, size)
    return made
