"""Arrays that adapters take from training rows, made the same in all processes."""

from __future__ import annotations

import torch
from torch import distributed, nn

from peft_lab.tuners.layer import AdapterLayer


@torch.no_grad()
def share_arrays(model: nn.Module) -> None:
    """Give all processes the first one's arrays of the adapters, which are those that are saved.

    Each process takes running statistics from its own rows, and draws views of rows on its own, so that otherwise an
    evaluation in several processes is not one of the saved adapter. Nothing happens in one process.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return
    for layer in model.modules():
        if not isinstance(layer, AdapterLayer):
            continue
        for name in layer.data_param_names:
            for adapter, values in sorted(getattr(layer, name).items()):
                if adapter in layer.active_adapters:
                    distributed.broadcast(values, src=0)
