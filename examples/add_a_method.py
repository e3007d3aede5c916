"""A method of your own, in one file: it adds the outer product of two trained vectors to each weight.

Put the file into a package and name it in that package's pyproject.toml:

    [project.entry-points."peft_lab.methods"]
    rankone = "add_a_method"

From then on `peft-lab methods` lists it, `peft-lab train --method rankone` trains it, and `get_peft_model`,
`PeftModel.from_pretrained`, merging and mixed batches work with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from peft_lab.registry import MethodInfo
from peft_lab.tuners.config import AdapterConfig
from peft_lab.tuners.layer import WeightLayer
from peft_lab.tuners.registration import register

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
    """Configuration of the rank-one method."""

    scale: float = field(default=1.0, metadata={"help": "Factor of the delta."})


class RankOneLayer(WeightLayer):
    """A weight with the delta `scale * outer(left, right)`, zero at the start."""

    adapter_layer_names = ("rankone_left", "rankone_right")

    def initial_values(self, adapter: str, config: RankOneConfig) -> dict[str, Tensor]:
        rows, columns = self.op.matrix(self.base_layer.weight).shape
        return {"rankone_left": torch.zeros(rows), "rankone_right": torch.randn(columns) / columns**0.5}

    def delta_weight(self, adapter: str) -> Tensor:
        return self.configs[adapter].scale * torch.outer(self.rankone_left[adapter], self.rankone_right[adapter])


register(METHOD, RankOneConfig, RankOneLayer)
