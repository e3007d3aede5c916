"""Magnitude pruning of a frozen base that comes off again.

The base is pruned for one adapter at a time, and the dense weights come back.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from peft_lab.tuners.pruning.masks import candidate_layers, layers_with_values, magnitude_masks


class ReversiblePruning(nn.Module):
    """Pruning of the smallest linear and convolution weights, with the dense ones kept in buffers meanwhile.

    Args:
        model: the base.
        spared: modules that are never pruned, the task head for one.
    """

    def __init__(self, model: nn.Module, spared: list[nn.Module]) -> None:
        super().__init__()
        # a dict, and so no part of this module: the layers belong to the base
        self.layers: dict[str, Any] = candidate_layers(model, spared)
        self.dense, self.masks = BufferDict(), BufferDict()
        self.sparsity = 0.0

    @torch.inference_mode(False)  # because training may come after
    def set(self, sparsity: float) -> None:
        """Set a share of the weights to zero.

        A share of 0 restores the dense base bit for bit.

        Raises:
            ConfigError: the base has no weights of numbers to prune, or they are not loaded.
        """
        if sparsity == self.sparsity:
            return
        # Back to the dense weights first: the masks of another sparsity are made from them.
        for module, dense in zip(self.layers.values(), self.dense.values(), strict=False):
            module.weight.data = dense.to(module.weight)
        self.dense, self.sparsity = BufferDict(), 0.0
        if not sparsity:
            return
        # Masks are kept, so that switching between adapters searches once per sparsity.
        names = [f"{sparsity}/{index}".replace(".", "_") for index in range(len(self.layers))]
        if not names or names[0] not in self.masks:
            self.masks.update(zip(names, self._find(sparsity), strict=True))
        for name, module in zip(names, self.layers.values(), strict=True):
            self.dense[name] = module.weight.data
            module.weight.data = module.weight.data.masked_fill(~self.masks[name].to(module.weight.device), 0.0)
        self.sparsity = sparsity

    def _find(self, sparsity: float) -> list[Tensor]:
        """Masks of the weights by layer, bool, False at pruned entries."""
        found = magnitude_masks(layers_with_values(self.layers, f"sparsity={sparsity}"), sparsity)
        masks = []
        for path, layer in self.layers.items():
            # Weights that are all zero have no mask and stay as they are.
            masks.append(found.get(path, torch.ones(layer.weight.shape, dtype=torch.bool)))
        return masks
