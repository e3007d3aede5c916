"""Magnitude pruning of a frozen base, reversible.

The base is pruned for one adapter at a time, and the dense weights come back.
"""

from __future__ import annotations

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn
from torch.nn.utils import prune

from peft_lab.errors import ConfigError


class Pruning(nn.Module):
    """Global unstructured L1 pruning of linear and convolution weights.

    Layers whose weights are all zero count for nothing: a share of them would be no pruning. The dense weights are kept
    in buffers meanwhile. The pruned entries are found on the CPU, so that ties fall alike on every device.

    Args:
        model: the base.
        spared: modules that are never pruned, the task head for one.
    """

    def __init__(self, model: nn.Module, spared: list[nn.Module]) -> None:
        super().__init__()
        kept: set[nn.Module] = set()
        for module in spared:
            kept.update(module.modules())
        layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        self.layers = [layer for layer in layers if layer not in kept]  # parts of the base, not of this module
        self.dense, self.masks = BufferDict(), BufferDict()
        self.sparsity = 0.0

    @torch.inference_mode(False)  # for training may come after
    def set(self, sparsity: float) -> None:
        """Set a share of the weights to zero.

        A share of 0 restores the dense base bit for bit.

        Raises:
            ConfigError: the base has no weights of numbers to prune, or they are not loaded.
        """
        if sparsity == self.sparsity:
            return
        # Back to the dense weights first: the masks of another sparsity are made from them.
        for module, dense in zip(self.layers, self.dense.values(), strict=False):
            module.weight.data = dense.to(module.weight)
        self.dense, self.sparsity = BufferDict(), 0.0
        if not sparsity:
            return
        # Masks are kept, so that switching between adapters searches once per sparsity.
        names = [f"{sparsity}/{index}".replace(".", "_") for index in range(len(self.layers))]
        if not names or names[0] not in self.masks:
            self.masks.update(zip(names, self._find(sparsity), strict=True))
        for name, module in zip(names, self.layers, strict=True):
            self.dense[name] = module.weight.data
            module.weight.data = module.weight.data * self.masks[name].to(module.weight.device)
        self.sparsity = sparsity

    def _find(self, sparsity: float) -> list[Tensor]:
        """Masks of the weights by module, bool, False at pruned entries."""
        weights: list[Tensor] = [module.weight for module in self.layers]
        if any(w.is_meta or type(w) is not nn.Parameter or not w.is_floating_point() for w in weights):
            raise ConfigError(
                f"sparsity={sparsity} prunes the base by the size of its weights: load it into memory, not quantised."
            )
        copies = [_Copy(weight) for weight in weights if bool(weight.any())]
        if not copies:
            raise ConfigError(f"sparsity={sparsity}: the base has no linear or convolution weights to prune.")
        prune.global_unstructured([(copy, "weight") for copy in copies], prune.L1Unstructured, amount=sparsity)
        found = iter(copies)
        masks = []
        for weight in weights:
            # Weights that are all zero have no copy and stay as they are.
            mask = next(found).weight_mask.bool() if bool(weight.any()) else torch.ones(weight.shape, dtype=torch.bool)
            masks.append(mask)
        return masks


class _Copy(nn.Module):
    """Copy of a weight on the CPU for torch's pruning."""

    weight_mask: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().cpu().clone())

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        # Not torch's own, which stores no values while peft loads with low_cpu_mem_usage.
        self._parameters[name] = param
