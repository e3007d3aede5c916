"""Dtypes that kernels compute in."""

from __future__ import annotations

import torch
from torch import Tensor

#: Dtypes in which sums over channels and tokens are exact enough.
WIDE_DTYPES = (torch.float32, torch.float64)


def sum_dtype(*tensors: Tensor) -> torch.dtype:
    """Dtype in which products of these tensors are summed: float32 or wider."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
