"""Weights that are sharded over several processes: whole values and shapes.

FSDP2 and tensor parallelism hold them as DTensors, DeepSpeed ZeRO-3 as partitions of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def is_partitioned(weight: Tensor) -> bool:
    """Test whether DeepSpeed ZeRO-3 manages a weight, of which a process then holds a partition."""
    return hasattr(weight, "ds_id")


def is_sharded(weight: Tensor) -> bool:
    """Test whether a process holds only a part of a weight."""
    return isinstance(weight, DTensor) or is_partitioned(weight)


def holds_shards(model: nn.Module) -> bool:
    """Test whether any weight of a model is sharded, or is so between two forwards."""
    # FSDP2 leaves some weights whole behind a forward
    return any(isinstance(module, FSDPModule) for module in model.modules()) or any(
        is_sharded(parameter) for parameter in model.parameters()
    )


def whole_weight(weight: Tensor) -> Tensor:
    """Gather the values of a sharded weight; any other one is returned as it is.

    Gathering is done by all processes together: each has to call this, for the same weights in the same order.
    """
    if isinstance(weight, DTensor):
        return weight.full_tensor().detach()
    if is_partitioned(weight):
        import deepspeed

        # the whole values are gone behind the block, so they are copied
        with torch.no_grad(), deepspeed.zero.GatheredParameters([weight]):
            return weight.detach().clone()
    return weight


def whole_shape(weight: Tensor) -> torch.Size:
    """Shape of a weight in all processes together."""
    # a DTensor tells this shape by itself, a partition of ZeRO-3 is empty
    return torch.Size(getattr(weight, "ds_shape", weight.shape))
