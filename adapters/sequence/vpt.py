"""VPT: visual prompt tuning by trainable tokens in a frozen transformer.

Source: Jia et al. 2022, Visual Prompt Tuning, arXiv:2203.12119. Written from the paper's equations.

Shallow, `p` prompts stand behind the class token at the input and pass through all blocks; deep, each block gets `p`
new ones in the place of those that the block before made. An optional projection lifts prompts of a smaller width.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from torch import Tensor, nn

from peft_lab.errors import ConfigError
from peft_lab.tuners import MethodInfo
from peft_lab.tuners.sequence import PromptState, StaticConfig, StoredPrompts, register_static

METHOD = MethodInfo(
    name="vpt",
    title="VPT",
    paper="2203.12119",
    place="sequence",
    config="VPTConfig",
    roles=("block",),
    capabilities=("mixed_batch",),
    learning_rate=3e-2,
    budget=(1.2, 1.3),
)


@dataclass
class VPTConfig(StaticConfig):
    """Configuration of VPT.

    Trainable parameters: `num_prompts` x width for each block that writes prompts. The authors keep the backbone in
    evaluation mode, which is the default of `backbone_eval`.

    Raises:
        ConfigError: a number of prompts, a dropout or a projection out of range; a projection with `domain_components`.
    """

    authors_backbone_eval = True

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


class VPTLayer(StoredPrompts):
    """Block before which prompts (p, width) are written.

    Blocks of one width share the projection.
    """

    adapter_layer_names = ("vpt_prompts", "vpt_projection_weight", "vpt_projection_bias")

    def initial_values(self, adapter: str, config: VPTConfig) -> dict[str, Tensor]:
        writing = config.prompted_block_indices(self.num_blocks)
        if self.depth not in writing:
            return {}
        counts = config.num_prompts if isinstance(config.num_prompts, list) else [config.num_prompts] * len(writing)
        # The number of blocks is known with the model only, so the list is checked here.
        if len(counts) != len(writing):
            raise ConfigError(f"num_prompts has {len(counts)} numbers, but {len(writing)} blocks get prompts.")
        return {"vpt_prompts": self.uniform(counts[writing.index(self.depth)], config.projection or self.width)}

    def share_key(self, config: VPTConfig) -> Hashable:
        # Where stages have different widths, each has a projection of its own.
        writes = self.depth in config.prompted_block_indices(self.num_blocks)
        return self.width if writes else None

    def shared_values(self, adapter: str, config: VPTConfig) -> dict[str, Tensor]:
        if config.projection is None or self.share_key(config) is None:
            return {}
        # As the authors start it: the weight by Kaiming's rule with a gain of sqrt(2), the bias as any nn.Linear's.
        start = nn.Linear(config.projection, self.width)
        nn.init.kaiming_normal_(start.weight, mode="fan_out")
        return {"vpt_projection_weight": start.weight.detach(), "vpt_projection_bias": start.bias.detach()}

    def make_prompts(self, adapter: str, values: Tensor, state: PromptState) -> Tensor:
        config, weight = self.configs[adapter], self.parameter(adapter, "vpt_projection_weight")
        if weight is not None:
            values = nn.functional.linear(values, weight, self.parameter(adapter, "vpt_projection_bias"))
        # Each sample drops for itself, so the prompts are expanded before dropout.
        if config.dropout and self.training:
            values = values.expand(state.batch, -1, -1)
        return nn.functional.dropout(values, config.dropout, self.training)

    def position(self, adapter: str) -> int:
        return self.stack.prefix_tokens if self.configs[adapter].position == "after" else 0


register_static(METHOD, VPTConfig, VPTLayer)
