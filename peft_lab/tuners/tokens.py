"""Insertion and removal of prompt tokens, and names of a forward's parameters."""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def insert(tensor: Tensor, new: Tensor, at: int, dim: int = 1) -> Tensor:
    """Insert `new` before position `at` of a dimension of `tensor`."""
    # Prompts mostly stand at the left: one concatenation without an empty part.
    if at == 0:
        return torch.cat([new, tensor], dim)
    return torch.cat([tensor.narrow(dim, 0, at), new, tensor.narrow(dim, at, tensor.shape[dim] - at)], dim)


def split(tensor: Tensor, count: int, at: int, dim: int = 1) -> tuple[Tensor, Tensor]:
    """Split `count` prompts at position `at` of a dimension from the tokens.

    Returns the tokens and the prompts; the inverse of `insert`.
    """
    prompts = tensor.narrow(dim, at, count)
    rest = tensor.narrow(dim, at + count, tensor.shape[dim] - at - count)
    return (torch.cat([tensor.narrow(dim, 0, at), rest], dim) if at else rest), prompts


@lru_cache(maxsize=256)
def parameter_names(forward: Any) -> tuple[str, ...]:
    """Names of a forward's positional parameters, without `self`."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(forward).parameters
    positional = [name for name, parameter in parameters.items() if parameter.kind in kinds]
    return tuple(name for name in positional if name != "self")
