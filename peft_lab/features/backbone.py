"""Backbone that looks its output up in stored features, in place of computing it.

The model is called with row numbers as its main input. Its backbone answers with an output from which the model's own
pooling makes the stored feature, so that dropout in front of the head, loss and head stay the model's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from peft_lab.backbones.head_features import HeadFeatures
from peft_lab.features.extract import POOLED, TOKENS


@dataclass
class LookedUpOutput(BaseModelOutputWithPooling):
    """Output of the backbone of any family, as far as a head reads it."""

    reshaped_hidden_states: tuple[Tensor, ...] | None = None


@contextmanager
def looked_up(model: nn.Module, facts: HeadFeatures, tables: Sequence[Mapping[str, np.ndarray]]) -> Iterator[None]:
    """Let the backbone of a model answer from stored features inside the block.

    Its modules are out of the model meanwhile, because a step of training walks over all modules and parameters several
    times, which takes longer than a head does.

    Args:
        model: the model.
        facts: facts of its head.
        tables: stored features; row numbers go through one table behind the other.
    """
    backbone: Any = model.get_submodule(facts.backbone)
    before = backbone.__dict__.get("forward")
    parameter = next(backbone.parameters())
    joined = _Tables(tables)

    def forward(*args: Any, **kwargs: Any) -> LookedUpOutput:
        index = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
        rows = index.detach().cpu().numpy().reshape(-1)
        pooled = joined.rows(POOLED, rows).to(parameter.device, parameter.dtype)
        hidden = joined.rows(TOKENS, rows) if joined.has(TOKENS) else None
        hidden = _hidden(pooled, facts) if hidden is None else hidden.to(parameter.device, parameter.dtype)
        return LookedUpOutput(last_hidden_state=hidden, pooler_output=pooled)

    modules, backbone._modules = backbone._modules, {}
    backbone.forward = forward
    try:
        yield
    finally:
        backbone._modules = modules
        backbone.train(backbone.training)  # of the modules that were out
        if before is None:
            del backbone.forward
        else:
            backbone.forward = before


class _Tables:
    """Rows of several tables of the same arrays, counted through."""

    def __init__(self, tables: Sequence[Mapping[str, np.ndarray]]) -> None:
        self.tables = tables
        self.starts = np.cumsum([0, *(len(table[POOLED]) for table in tables)])
        self.longest = max(table[TOKENS].shape[1] for table in tables) if self.has(TOKENS) else 0

    def has(self, name: str) -> bool:
        """Test whether an array is stored."""
        return name in self.tables[0]

    def rows(self, name: str, index: np.ndarray) -> Tensor:
        """Rows of an array by their numbers; texts get zeros at the right up to the longest of all."""
        parts = np.searchsorted(self.starts, index, side="right") - 1
        found = [self.tables[part][name][row - self.starts[part]] for part, row in zip(parts, index, strict=True)]
        # Rows of a pooled feature and of a feature map have other numbers of axes.
        if found[0].ndim == 2:
            found = [np.pad(row, ((0, self.longest - len(row)), (0, 0))) for row in found]
        return torch.from_numpy(np.stack(found))


def _hidden(pooled: Tensor, facts: HeadFeatures) -> Tensor:
    """Hidden states (rows, tokens, token width) that a head pools to the feature.

    A head takes the first token, the mean of the patches, or both one behind the other; others read the pooled output.
    """
    tokens = facts.prefix_tokens + 1
    if facts.width == 2 * facts.token_width:
        first, mean = pooled.split(facts.token_width, 1)
        return torch.stack([first, *[mean] * tokens], 1)
    return pooled[:, None].expand(-1, tokens + 1, -1)
