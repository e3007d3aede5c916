"""Sparse supports: train chosen entries of each weight and no others.

Source: Thangarasa et al. 2023, SPDF: Sparse Pre-training and Dense Fine-tuning for Large Language Models,
arXiv:2303.10464. There the zeros of a sparsely pretrained model are trained together with the rest; here, after that
idea, `support="zeros"` gives a pruned base its zeros back as an adapter, and the other weights stay frozen. With the
entries of largest magnitude, or random ones, it is the idea of SHiRA (arXiv:2406.13175), which peft has as `shira`.

The delta S has values at fixed places and is zero elsewhere: y = (W + S) x. Unlike peft's `shira`, which takes the
gradient of a dense weight, the gradient is made of the chosen entries alone, no copy of the weight is kept for it,
places and values are stored as integers and floats in one file, and merging changes no other bit of the weight: a
pruned base stays pruned elsewhere.

Test accuracy after 60 steps of 16 rows at the default rate, seeds 0, 1, 2, on snips with MiniLM: 0.969, 0.960, 0.953;
the head alone has 0.843, 0.844, 0.840.

With `support="bip"` the entries are chosen on training data before the first step, by the bi-level steps of BiP (Zhang
et al. 2022, arXiv:2210.04092; equations in `peft_lab.tuners.pruning.bip`). The base weights are retrained at its lower
level, the scores of their entries, which start at magnitude, move at its upper one, and of each weight the entries with
the highest scores are trained. So they are those that BiP would keep if it pruned each adapted weight to the density,
and without any step they would be those of magnitude. The base itself stays as it is. BiP tells which entries a pruned
model needs; that these are good ones to train is an assumption.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from peft_lab.adapters.weight.sparse_support.kernels import entries_linear, with_entries
from peft_lab.errors import ConfigError
from peft_lab.tuners import (
    WIDE_DTYPES,
    AdapterConfig,
    AdapterTuner,
    MethodInfo,
    WeightLayer,
    matrix_shape,
    module_seed,
    register,
)
from peft_lab.tuners.pruning import solve_bip

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
#: Index of every entry before BiP has chosen them.
_UNREAD = -1
#: Options of BiP by the fields that give them, with the numbers where these give none.
_BIP = {
    "bip_steps": ("steps", 20),
    "bip_learning_rate": ("learning_rate", 0.01),
    "bip_mask_learning_rate": ("mask_learning_rate", 0.1),
    "bip_penalty": ("penalty", 10.0),
}
_UNTRIED = "needs training data"


@dataclass
class SparseSupportConfig(AdapterConfig):
    """Configuration of sparse supports.

    Trainable parameters: round(density * out * in) for each adapted weight, at least one; with `support="zeros"` and no
    density, the number of its zeros.

    Raises:
        ConfigError: a density that is no share, or a field that goes with another support.
    """

    support: Literal["random", "magnitude", "zeros", "bip"] = field(
        default="random",
        metadata={
            "help": "Entries: drawn by the seed, by magnitude, the zeros of a pruned base, or chosen on training data "
            "by BiP.",
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
    support_seed: int = field(
        default=0, metadata={"help": "Seed of the entries, or for BiP of the batches, that are drawn.", "other": 1}
    )
    bip_steps: int | None = field(
        default=None,
        metadata={"help": "Steps of BiP at each level, on two batches each; nothing means 20.", "untried": _UNTRIED},
    )
    bip_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the weights in BiP; nothing means 0.01.", "untried": _UNTRIED},
    )
    bip_mask_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of the scores in BiP, relative to their size; nothing means 0.1.",
            "untried": _UNTRIED,
        },
    )
    bip_penalty: float | None = field(
        default=None,
        metadata={
            "help": "Penalty of the weights in BiP; the smaller, the more its implicit gradient counts. Nothing means "
            "10.",
            "untried": _UNTRIED,
        },
    )

    def check(self) -> None:
        if self.density is not None and not 0 < self.density <= 1:
            raise ConfigError(f"density={self.density} must be above 0 and at most 1.")
        if not self.largest and self.support != "magnitude":
            raise ConfigError(f'largest=False goes with support="magnitude", not "{self.support}".')
        for name in _BIP:
            value = getattr(self, name)
            if value is not None and self.support != "bip":
                raise ConfigError(f'{name}={value} goes with support="bip", not "{self.support}".')
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{name}={value} must be above 0 and finite.")
        if self.support == "bip" and self.density == 1:
            raise ConfigError('density=1 leaves support="bip" no choice; give a smaller one.')

    def bip_options(self) -> dict[str, Any]:
        """Options of BiP, those that the fields leave out at their defaults."""
        given = {name: getattr(self, name) for name in _BIP}
        return {option: default if given[name] is None else given[name] for name, (option, default) in _BIP.items()}


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
        """Flat indices of the support, ascending; `_UNREAD` for all before BiP has chosen them.

        Raises:
            ConfigError: the zeros of a weight that has none are wanted.
        """
        shape = matrix_shape(self.base_layer, self.op)
        count = max(1, round((config.density or _DENSITY) * shape.numel()))
        if config.support == "bip":
            return torch.full((count,), _UNREAD)
        if config.support != "random" and self.base_weight.is_meta:
            raise RuntimeError(
                f'support="{config.support}" needs the base weights; load the backbone before the adapter.'
            )
        if config.support == "magnitude":
            sizes = self.op.matrix(self.dense_weight()).detach().float().abs()
            return _first(sizes, count, config.largest)
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

    def is_unread(self, adapter: str) -> bool:
        """Test whether BiP has still to choose the entries of an adapter."""
        if adapter not in self.configs or self.configs[adapter].support != "bip":
            return False
        return bool((self.sparse_support_indices[adapter] == _UNREAD).all())

    def choose(self, adapter: str, scores: Tensor) -> None:
        """Put the entries with the highest scores, given in the layout of the weight, into the support."""
        indices = self.sparse_support_indices[adapter]
        chosen = _first(self.op.matrix(scores), len(indices), largest=True)
        self.sparse_support_indices[adapter] = chosen.to(indices)

    def entries(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Values (K,) and flat indices (K,) of an adapter.

        Raises:
            ConfigError: a training begins before BiP has chosen the entries.
        """
        if self.training and torch.is_grad_enabled() and self.is_unread(adapter):
            raise ConfigError(
                'support="bip" chooses entries on the training data, and nobody has handed them over: add '
                "peft_lab.ReadTrainingData() to the callbacks of the Trainer, or call peft_lab.read_training_data("
                "model, batches)."
            )
        return self.sparse_support_values[adapter], self.sparse_support_indices[adapter]

    def check_values(self, adapter: str, values: Mapping[str, Tensor]) -> None:
        indices, size = values.get("sparse_support_indices"), matrix_shape(self.base_layer, self.op).numel()
        if indices is None or indices.is_meta:
            return
        if self.configs[adapter].support == "bip" and bool((indices == _UNREAD).all()):
            if bool(values["sparse_support_values"].any()):
                raise ConfigError(f'The adapter has values for "{self.path}" and no support of them; train it again.')
            return
        ascending = bool((indices[1:] > indices[:-1]).all())
        if not ascending or int(indices[0]) < 0 or int(indices[-1]) >= size:
            raise ConfigError(
                f'The support of "{self.path}" in the adapter must be ascending indices below {size}; train it again.'
            )

    def delta_weight(self, adapter: str) -> Tensor:
        values, indices = self.entries(adapter)
        zeros = values.new_zeros(matrix_shape(self.base_layer, self.op))
        return zeros.view(-1).index_put((indices.long(),), values).view(zeros.shape)

    def delta_output(self, adapter: str, x: Tensor) -> Tensor:
        (values, indices), shape = self.entries(adapter), matrix_shape(self.base_layer, self.op)
        return entries_linear(x.to(values.dtype), None, None, shape, values, indices)

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
        values, indices = self.entries(adapters[0])
        return entries_linear(x, weight, base.bias, weight.shape, values, indices)

    def folded(self, adapter: str, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        values = self.sparse_support_values[adapter].detach()
        matrix = with_entries(self.op.matrix(weight), values, self.sparse_support_indices[adapter])
        return self.op.weight(matrix, weight.shape), bias


class SparseSupportTuner(AdapterTuner):
    """Tuner of sparse supports; it lets BiP choose entries on the training data."""

    def wants_data(self) -> bool:
        """Test whether an active adapter has entries to be chosen on the training data."""
        return any(self._unread(adapter) for adapter in self.active_adapters)

    def read_data(self, batches: Iterable[Mapping[str, Any]], epoch: int) -> None:
        """Choose the entries of active adapters with `support="bip"` that have none.

        `peft_lab.ReadTrainingData` calls this before the first epoch. Batches are drawn over all the training data, two
        for each step, because rows may come sorted by their labels.

        Raises:
            ConfigError: there are less than two batches, or they give no loss.
        """
        for adapter in self.active_adapters:
            layers = self._unread(adapter)
            if not layers:
                continue
            config = layers[0].configs[adapter]
            options = config.bip_options()
            drawn = _drawn(batches, 2 * options["steps"], config.support_seed)
            modules = {layer.path: layer.base_layer for layer in layers}
            share = 1 - (config.density or _DENSITY)
            with _bare(layers):
                found = solve_bip(self.model, modules, drawn, share, by_layer=True, **options)
            for layer in layers:
                layer.choose(adapter, found.scores[layer.path])

    def _unread(self, adapter: str) -> list[SparseSupportLayer]:
        layers = [module for module in self.model.modules() if isinstance(module, SparseSupportLayer)]
        return [layer for layer in layers if layer.is_unread(adapter)]


def _first(sizes: Tensor, count: int, largest: bool) -> Tensor:
    """Flat indices, ascending, of the largest or smallest entries of a matrix."""
    # On the CPU, where ties fall alike for every device.
    return sizes.cpu().reshape(-1).argsort(descending=largest, stable=True)[:count].sort().values


def _drawn(batches: Iterable[Mapping[str, Any]], count: int, seed: int) -> list[Mapping[str, Any]]:
    """Batches drawn uniformly and in random order; all of them if there are no more than `count`."""
    # Reservoir sampling, because the number of batches is not known before the last one.
    generator = random.Random(seed)
    kept: list[Mapping[str, Any]] = []
    for seen, batch in enumerate(batches):
        if seen < count:
            kept.append(batch)
        elif (place := generator.randrange(seen + 1)) < count:
            kept[place] = batch
    generator.shuffle(kept)
    return kept


@contextmanager
def _bare(layers: Sequence[SparseSupportLayer]) -> Iterator[None]:
    """Run the base without the deltas, through which its weights get no gradient; heads stay as they are."""
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled


register(METHOD, SparseSupportConfig, SparseSupportLayer, SparseSupportTuner)
