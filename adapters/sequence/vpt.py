"""VPT: trainable tokens in the sequence of a frozen transformer (Visual Prompt Tuning).

Shallow, `p` prompts stand behind the class token at the input and pass through all blocks; deep, each block gets `p`
new ones in the place of those that the block before made. An optional projection lifts prompts of a smaller width.

Source: Jia et al. 2022, Visual Prompt Tuning, arXiv:2203.12119. Written from the paper's equations.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from peft_lab.errors import ConfigError
from peft_lab.registry import MethodInfo
from peft_lab.tuners.forward_context import Call
from peft_lab.tuners.sequence.stored_prompts import StaticConfig, StaticPrompts
from peft_lab.tuners.sequence.stored_tuner import register_static

METHOD = MethodInfo(
    name="vpt",
    title="VPT",
    paper="2203.12119",
    place="sequence",
    config="VPTConfig",
    roles=("block",),
    capabilities=("mixed_batch",),
    learning_rate=1e-2,
    budget=(1.2, 1.3),
)


@dataclass
class VPTConfig(StaticConfig):
    """Configuration of VPT. Trainable parameters: `num_prompts` x width for each block that writes prompts.

    Raises:
        ConfigError: a number of prompts, a dropout or a projection out of range; a projection with `domain_components`.
    """

    num_prompts: int | list[int] = field(
        default=10,
        metadata={"help": "Prompts of each block; a list gives one number per block that writes.", "other": 3},
    )
    deep: bool = field(default=True, metadata={"help": "New prompts before every block.", "other": False})
    dropout: float = field(
        default=0.0, metadata={"help": "Dropout on prompts, each sample for itself; the paper takes 0.1.", "other": 0.5}
    )
    projection: int | None = field(
        default=None, metadata={"help": "Width of the stored prompts, lifted by one shared linear map.", "other": 4}
    )
    position: str = field(
        default="after", metadata={"help": "Stand `after` or `before` class and register tokens.", "other": "before"}
    )

    def check(self) -> None:
        super().check()
        counts = self.num_prompts if isinstance(self.num_prompts, list) else [self.num_prompts]
        if not counts or min(counts) < 1:
            raise ConfigError(f"num_prompts={self.num_prompts} must be at least 1.")
        if isinstance(self.num_prompts, list) and not self.deep:
            raise ConfigError(f"num_prompts={self.num_prompts} has one number per block, which needs deep=True.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout} must be at least 0 and below 1.")
        if self.projection is not None and self.projection < 1:
            raise ConfigError(f"projection={self.projection} must be at least 1.")
        if self.projection is not None and self.domain_components is not None:
            raise ConfigError(
                f"domain_components={self.domain_components} gives prompts of the full width, and projection="
                f"{self.projection} stores narrower ones; leave one out."
            )
        if self.position not in ("after", "before"):
            raise ConfigError(f'position="{self.position}" must be "after" or "before".')


class VPTLayer(StaticPrompts):
    """A block before which prompts (p, width) are written; the first such block also holds the shared projection.

    Where stages have different widths, each has a projection of its own.
    """

    adapter_layer_names = ("vpt_prompts", "vpt_projection_weight", "vpt_projection_bias")

    def initial_values(self, adapter: str, config: VPTConfig) -> dict[str, Tensor]:
        writing = config.writing(self.depths)
        if self.depth not in writing:
            return {}
        order = writing.index(self.depth)
        counts = config.num_prompts if isinstance(config.num_prompts, list) else [config.num_prompts] * len(writing)
        if len(counts) != len(writing):
            raise ConfigError(f"num_prompts has {len(counts)} numbers, but {len(writing)} blocks get prompts.")
        width = config.projection or self.width
        values = {"vpt_prompts": self.uniform(counts[order], width)}
        if config.projection and all(self.widths[depth] != self.width for depth in writing[:order]):
            weight = nn.init.kaiming_normal_(torch.empty(self.width, width), mode="fan_out", nonlinearity="linear")
            values |= {"vpt_projection_weight": weight, "vpt_projection_bias": torch.zeros(self.width)}
        return values

    def stored(self, adapter: str, call: Call, rows: int | None = None) -> Tensor | None:
        prompts = super().stored(adapter, call, rows)
        if adapter in self.vpt_projection_weight:
            call.shared[adapter] = (self.vpt_projection_weight[adapter], self.vpt_projection_bias[adapter])
        if prompts is None or adapter not in call.shared:
            return prompts
        return nn.functional.linear(prompts, *call.shared[adapter])

    def prompts(self, adapter: str, tokens: Tensor, call: Call) -> Tensor | None:
        prompts = super().prompts(adapter, tokens, call)
        if prompts is None:
            return None
        return nn.functional.dropout(prompts, self.configs[adapter].dropout, self.training)

    def position(self, adapter: str) -> int:
        return self.prefix_tokens if self.configs[adapter].position == "after" else 0


register_static(METHOD, VPTConfig, VPTLayer)
