"""Sparse supports: train chosen entries of each weight and no others.

Source: Thangarasa et al. 2023, SPDF: Sparse Pre-training and Dense Fine-tuning for Large Language Models,
arXiv:2303.10464. There the zeros of a sparsely pretrained model are trained together with the rest; here, after that
idea, `support="zeros"` gives a pruned base its zeros back as an adapter, and the other weights stay frozen. With the
entries of largest magnitude, or random ones, it is the idea of SHiRA (arXiv:2406.13175), which peft has as `shira`.

The delta S has values at fixed places and is zero elsewhere: y = (W + S) x. Unlike peft's `shira`, which takes the
gradient of a dense weight, the gradient is made of the chosen entries alone, no copy of the weight is kept for it,
places and values are stored as integers and floats in one file, and merging changes no other bit of the weight: a
pruned base stays pruned elsewhere.

Measured with one seed alone (snips, MiniLM, 60 steps of 16 rows): validation accuracy 0.954, the head alone 0.856.

Choosing entries by trained scores (BiP, NeurIPS 2022) needs a bi-level loop of its own and is not built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from peft_lab.adapters.weight.sparse_support.kernels import entries_linear, with_entries
from peft_lab.errors import ConfigError
from peft_lab.tuners import WIDE_DTYPES, AdapterConfig, MethodInfo, WeightLayer, matrix_shape, module_seed, register

METHOD = MethodInfo(
    name="sparse_support",
    title="Sparse support",
    paper="2303.10464",
    place="weight",
    config="SparseSupportConfig",
    roles=("attn.q", "attn.v"),
    capabilities=("linear", "conv1d", "merge", "mixed_batch", "identity_start"),
    learning_rate=1e-1,
    budget=(1.1, 1.15),
)

#: Share of the entries that is trained where none is given.
_DENSITY = 0.01


@dataclass
class SparseSupportConfig(AdapterConfig):
    """Configuration of sparse supports.

    Trainable parameters: round(density * out * in) for each adapted weight, at least one; with `support="zeros"` and no
    density, the number of its zeros.

    Raises:
        ConfigError: a density that is no share.
    """

    support: Literal["random", "magnitude", "zeros"] = field(
        default="random",
        metadata={
            "help": "Entries: drawn by the seed, by magnitude, or the zeros of a pruned base.",
            "other": "magnitude",
        },
    )
    density: float | None = field(
        default=None,
        metadata={
            "help": "Share of the entries of each weight; nothing means 0.01, or all of the zeros.",
            "other": 0.05,
        },
    )
    largest: bool = field(
        default=True,
        metadata={
            "help": "By magnitude: the largest entries, or the smallest.",
            "other": False,
            "with": {"support": "magnitude"},
        },
    )
    support_seed: int = field(default=0, metadata={"help": "Seed of the entries that are drawn.", "other": 1})

    def check(self) -> None:
        if self.density is not None and not 0 < self.density <= 1:
            raise ConfigError(f"density={self.density} must be above 0 and at most 1.")
        if not self.largest and self.support != "magnitude":
            raise ConfigError(f'largest=False goes with support="magnitude", not "{self.support}".')


class SparseSupportLayer(WeightLayer):
    """Weight with trained values (K,) at the flat indices (K,), int32, of its matrix (out, in); zero at the start."""

    adapter_layer_names = ("sparse_support_values",)
    other_param_names = ("sparse_support_indices",)
    decayed_vectors = ("sparse_support_values",)

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__(base_layer, name)
        self.path = name
        self.sparse_support_indices = BufferDict({}, persistent=True)

    def initial_values(self, adapter: str, config: SparseSupportConfig) -> dict[str, Tensor]:
        indices = self._chosen(config)
        self.sparse_support_indices[adapter] = indices.to(device=self.base_weight.device, dtype=torch.int32)
        return {"sparse_support_values": torch.zeros(len(indices))}

    def _chosen(self, config: SparseSupportConfig) -> Tensor:
        """Flat indices of the support, ascending.

        Raises:
            ConfigError: the zeros of a weight that has none are wanted.
        """
        shape = matrix_shape(self.base_layer, self.op)
        if config.support != "random" and self.base_weight.is_meta:
            raise RuntimeError(
                f'support="{config.support}" needs the base weights; load the backbone before the adapter.'
            )
        count = max(1, round((config.density or _DENSITY) * shape.numel()))
        if config.support == "magnitude":
            # On the CPU, where ties fall alike for every device.
            sizes = self.op.matrix(self.dense_weight()).detach().float().abs().cpu().reshape(-1)
            return sizes.argsort(descending=config.largest, stable=True)[:count].sort().values
        candidates = torch.arange(shape.numel())
        if config.support == "zeros":
            candidates = (self.op.matrix(self.dense_weight()).detach().cpu().reshape(-1) == 0).nonzero()[:, 0]
            if not len(candidates):
                raise ConfigError(
                    f'"{self.path}" has no zeros for support="zeros": prune the base first, or choose another support.'
                )
            if config.density is None:
                return candidates
        with torch.device("cpu"):
            generator = torch.Generator().manual_seed(module_seed(config.support_seed, self.path))
            drawn = torch.randperm(len(candidates), generator=generator)[:count]
        return candidates[drawn.sort().values]

    def check_values(self, adapter: str, values: Mapping[str, Tensor]) -> None:
        indices, size = values.get("sparse_support_indices"), matrix_shape(self.base_layer, self.op).numel()
        if indices is None or indices.is_meta:
            return
        ascending = bool((indices[1:] > indices[:-1]).all())
        if not ascending or int(indices[0]) < 0 or int(indices[-1]) >= size:
            raise ConfigError(
                f'The support of "{self.path}" in the adapter must be ascending indices below {size}; train it again.'
            )

    def delta_weight(self, adapter: str) -> Tensor:
        values = self.sparse_support_values[adapter]
        zeros = values.new_zeros(matrix_shape(self.base_layer, self.op))
        return zeros.view(-1).index_put((self.sparse_support_indices[adapter].long(),), values).view(zeros.shape)

    def delta_output(self, adapter: str, x: Tensor) -> Tensor:
        values, shape = self.sparse_support_values[adapter], matrix_shape(self.base_layer, self.op)
        return entries_linear(x.to(values.dtype), None, None, shape, values, self.sparse_support_indices[adapter])

    def adapted(self, x: Tensor, adapters: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        # Added into the weight the delta needs no product of its own; in half precision it would round away.
        base: Any = self.base_layer
        plain = len(adapters) == 1 and not (self.op.quantization or self.is_sharded)
        plain = plain and not torch.is_autocast_enabled(x.device.type)
        if not plain or not (x.dtype == base.weight.dtype == self.sparse_support_values[adapters[0]].dtype):
            return super().adapted(x, adapters, *args, **kwargs)
        if x.dtype not in WIDE_DTYPES:
            return super().adapted(x, adapters, *args, **kwargs)
        weight = self.op.matrix(base.weight)
        values, indices = self.sparse_support_values[adapters[0]], self.sparse_support_indices[adapters[0]]
        return entries_linear(x, weight, base.bias, weight.shape, values, indices)

    def folded(self, adapter: str, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        values = self.sparse_support_values[adapter].detach()
        matrix = with_entries(self.op.matrix(weight), values, self.sparse_support_indices[adapter])
        return self.op.weight(matrix, weight.shape), bias


register(METHOD, SparseSupportConfig, SparseSupportLayer)
