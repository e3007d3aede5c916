"""Tensor parallelism: the part of an op's inputs and outputs that a process holds.

transformers splits the weight of a linear op over the processes by its outputs or by its inputs, as a DTensor, and the
op's output or input with it (`from_pretrained(..., tp_plan="auto")`). Adapters keep whole parameters in every process,
with the same gradients in all of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def is_split(module: nn.Module) -> bool:
    """Test whether an op is split over processes by tensor parallelism."""
    return _mesh(module) is not None


def whole_channels(module: nn.Module, x: Tensor, channels: int) -> Tensor:
    """Gather `x` (..., part of channels) of an op that is split over processes.

    Its gradient is the same in all processes, of which each takes its part. Any other `x` is returned as it is.

    Args:
        module: the op.
        x: its input, or its output.
        channels: number of channels in all processes together.
    """
    mesh = _mesh(module)
    if mesh is None or not x.is_floating_point() or x.shape[-1] == channels:
        return x
    from torch.distributed.tensor import DTensor, Shard

    shape = torch.Size((*x.shape[:-1], channels))
    # the parts may differ in size, so the whole one is not known from them
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(x, mesh, [Shard(-1)], run_check=False, shape=shape, stride=stride).full_tensor()


def own_channels(module: nn.Module, values: Tensor, like: Tensor) -> Tensor:
    """Take this process's part of `values` (..., channels) if the op's output `like` is only a part.

    The gradients of the parts are gathered, so that every process has the whole one.
    """
    mesh = _mesh(module)
    if mesh is None or values.shape[-1] == like.shape[-1]:
        return values
    from torch.distributed.tensor import DTensor, Replicate, Shard

    whole = DTensor.from_local(values, mesh, [Replicate()], run_check=False)
    return whole.redistribute(placements=[Shard(-1)]).to_local()


def _mesh(module: Any) -> Any:
    """Processes that share the op's weight by tensor parallelism; None if they do not."""
    mesh = getattr(getattr(module, "weight", None), "device_mesh", None)
    # FSDP2 has a mesh of its own, or another dimension of the same one
    if mesh is None or "tp" not in (mesh.mesh_dim_names or ("tp",)):
        return None
    return mesh["tp"] if mesh.ndim > 1 else mesh
