"""Rank one: adds the outer product of two trained vectors to each weight, W + scale * outer(left, right)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from peft_lab.tuners import AdapterConfig, MethodInfo, WeightLayer, register

METHOD = MethodInfo(
    name="rankone",
    title="Rank one",
    paper="https://example.org/rank-one",
    place="weight",
    config="RankOneConfig",
    roles=("attn.q", "attn.v"),
    capabilities=("linear", "conv1d", "merge", "mixed_batch", "identity_start"),
    learning_rate=1e-2,
)


@dataclass
class RankOneConfig(AdapterConfig):
    """Configuration of the rank-one method. Trainable parameters: out + in for each adapted weight."""

    scale: float = field(default=1.0, metadata={"help": "Factor of the delta.", "other": 2.0})


class RankOneLayer(WeightLayer):
    """A weight with the delta `scale * outer(left, right)`, zero at the start."""

    adapter_layer_names = ("rankone_left", "rankone_right")

    def initial_values(self, adapter: str, config: RankOneConfig) -> dict[str, Tensor]:
        rows, columns = self.op.matrix(self.base_layer.weight).shape
        return {"rankone_left": torch.zeros(rows), "rankone_right": torch.randn(columns) / columns**0.5}

    def delta_weight(self, adapter: str) -> Tensor:
        return self.configs[adapter].scale * torch.outer(self.rankone_left[adapter], self.rankone_right[adapter])


register(METHOD, RankOneConfig, RankOneLayer)
