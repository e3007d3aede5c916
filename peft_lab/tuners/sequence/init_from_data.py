"""Initialisation of prompts from training data, by particles of a mixture.

The mixture is fitted to the mean token of each row. The tokens are the hidden states that enter the block which writes
the prompts, as the frozen backbone makes them: the space that the prompts themselves are in. Padding counts for
nothing, and neither do the class and register tokens of a vision transformer. (The authors' code takes word embeddings,
before positions and norms, and averages over the padded length.) The backbone runs up to that block only, once for each
row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peft_lab.backbones.sharded_weights import holds_shards
from peft_lab.errors import ConfigError
from peft_lab.tuners.sequence.particles import Points, particles
from peft_lab.tuners.sequence.prompt_state import PromptState
from peft_lab.tuners.sequence.stored_prompts import StoredPrompts

#: Most rows that a mixture is fitted to, sampled uniformly from all that are read.
MAX_ROWS = 10_000


def domain_prompts(model: nn.Module, batches: Iterable[Mapping[str, Any]], seed: int = 0) -> None:
    """Initialise the active adapter's prompts from training data.

    For adapters with `domain_components`.

    With `peft_lab.train`, or a `Trainer` with the callback `ReadTrainingData`, this happens by itself before the first
    step. Prompts of other blocks than the first one that writes some keep what they have.

    Args:
        model: a model with the adapter on it.
        batches: keyword arguments for the model's forward, for instance from a `DataLoader`.
        seed: the same seed and data give the same particles.

    Raises:
        ConfigError: not exactly one active adapter takes values from data, the data have fewer than two different rows,
            or the weights are sharded over processes.
    """
    found: list[tuple[StoredPrompts, str]] = []
    for layer in model.modules():
        if isinstance(layer, StoredPrompts) and not layer.disable_adapters:
            found += [(layer, adapter) for adapter in layer.active_adapters if layer.initialises_from_data(adapter)]
    if len(found) != 1:
        raise ConfigError(
            f"Domain prompts are for one active adapter with domain_components at a time; this model has {len(found)}."
        )
    ((layer, adapter),) = found
    if holds_shards(model):
        raise ConfigError(
            "The model is sharded, and prompts that are read from data would be lost when it is gathered; read them "
            "before it is sharded, as peft_lab.train does with FSDP2, or use DeepSpeed ZeRO-2."
        )
    config, target = layer.configs[adapter], layer.stored_values[adapter]
    rows = _sample(_pooled(model, layer, batches), seed)
    # Stored particles are (prompts, particles, width); without draws a prompt starts at the mean of its particles.
    prompts = target.shape[: -2 if layer.draws_particles(adapter) else -1]
    each = config.domain_share(prompts.numel())
    points = particles(rows, prompts.numel() * each, config.domain_components, config.domain_dimensions, seed)
    values = torch.from_numpy(points).reshape(*prompts, each, target.shape[-1])
    with torch.no_grad():
        target.copy_(values if layer.draws_particles(adapter) else values.mean(-2))
    layer.awaiting_data.discard(adapter)


class _Reached(Exception):
    """Signal that ends a forward at the block whose input was read."""


def _pooled(model: nn.Module, layer: StoredPrompts, batches: Iterable[Mapping[str, Any]]) -> Iterator[Tensor]:
    """Mean hidden states (rows, width) that enter a block, batch by batch."""
    found: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Class and register tokens, and padding, are not part of the mean.
        state = PromptState.current()
        tokens = (args[0] if args else kwargs["hidden_states"])[:, layer.stack.prefix_tokens :].float()
        mask = None if state is None else state.mask
        if mask is None:
            found.append(tokens.mean(1))
        else:
            weights = mask.to(tokens)[..., None]
            found.append(((tokens * weights).sum(1) / weights.sum(1))[mask.any(1)])
        # The blocks behind are not needed, so the forward ends here.
        raise _Reached

    handle = layer.register_forward_pre_hook(look, with_kwargs=True)
    training, device = model.training, next(model.parameters()).device
    try:
        model.eval()
        for batch in batches:
            inputs = {}
            for name, value in batch.items():
                inputs[name] = value.to(device) if isinstance(value, Tensor) else value
            try:
                with torch.no_grad():
                    model(**inputs)
            except _Reached:
                yield found.pop()
    finally:
        handle.remove()
        model.train(training)


def _sample(batches: Iterable[Tensor], seed: int) -> Points:
    """Sample `MAX_ROWS` rows (n, width) uniformly; all, if there are no more."""
    # Reservoir sampling, because the number of rows is not known before the last batch.
    random = np.random.default_rng(seed)
    kept: list[Tensor] = []
    seen = 0
    for batch in batches:
        for row in batch.cpu():
            if seen < MAX_ROWS:
                kept.append(row.clone())  # not a view that keeps its batch
            elif (place := int(random.integers(seen + 1))) < MAX_ROWS:
                kept[place] = row.clone()
            seen += 1
    return torch.stack(kept).double().numpy() if kept else np.zeros((0, 1))
