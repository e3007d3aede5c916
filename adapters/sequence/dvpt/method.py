"""DVPT: prompts that mine each image's features through a shared bottleneck beside the MLPs.

Prompts stand in front of the class token and pass through all blocks. Beside each MLP a gated bottleneck S reads the
residual stream: x + MLP(x) + S(x). In the paper's form the prompts look, inside the bottleneck, at the features of the
patches by cross-attention, and take what they find; the authors' code has the bottleneck alone. One bottleneck serves
several blocks in a row. The stack returns class and patch tokens alone, so a head for dense prediction can use them;
where the authors' code classifies, it reads the mean of class token and prompts (`readout`).

Source: He et al. 2023, Dynamic Visual Prompt Tuning, arXiv:2307.09787. Written from the equations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from peft_lab.errors import ConfigError
from peft_lab.registry import MethodInfo
from peft_lab.tuners.forward_context import Call
from peft_lab.tuners.residual_layer import BranchLayer, Part
from peft_lab.tuners.sequence.stored_prompts import StaticConfig
from peft_lab.tuners.sequence.stored_tuner import register_static
from peft_lab.tuners.tokens import insert, split

METHOD = MethodInfo(
    name="dvpt",
    title="DVPT",
    paper="2307.09787",
    place="sequence",
    config="DVPTConfig",
    roles=("block",),
    capabilities=("mixed_batch", "images"),
    learning_rate=5e-3,
    budget=(2.0, 2.4),
)


@dataclass
class DVPTConfig(StaticConfig):
    """Configuration of DVPT. Trainable for width d: 2 d r + r + d + 1 for each bottleneck of width r, and 2 p d.

    `layers_to_transform` says which blocks have a bottleneck; prompts enter before the first of them.

    Raises:
        ConfigError: a number below 1; a readout of prompts where no class token is read behind a final norm.
    """

    deep = False
    variant: Literal["paper", "author_code"] = field(
        default="paper",
        metadata={"help": "Cross-attention in the bottleneck, or the bottleneck alone.", "other": "author_code"},
    )
    readout: Literal["class", "prompts"] = field(
        default="class",
        metadata={
            "help": "The head reads the class token, or its mean with the prompts, as the authors' code does.",
            "other": "prompts",
        },
    )
    num_prompts: int = field(default=50, metadata={"help": "Prompts in the sequence.", "other": 3})
    bottleneck: int = field(default=20, metadata={"help": "Width of the bottleneck.", "other": 5})
    share_group: int = field(default=3, metadata={"help": "Blocks in a row that share one bottleneck.", "other": 1})

    def check(self) -> None:
        super().check()
        for name in ("num_prompts", "bottleneck", "share_group"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1.")

    def reads_out(self) -> bool:
        return self.readout == "prompts"


class DVPTLayer(BranchLayer):
    """A block with a bottleneck, kept at the first block of its group; the first block of all keeps the prompts."""

    adapter_layer_names = (
        *("dvpt_prompts", "dvpt_positions"),
        *("dvpt_down", "dvpt_down_bias", "dvpt_up", "dvpt_up_bias", "dvpt_gate"),
    )

    def initial_values(self, adapter: str, config: DVPTConfig) -> dict[str, Tensor]:
        if not config.writes(self.depth):
            return {}
        values: dict[str, Tensor] = {}
        width, order = self.width, sum(config.writes(depth) for depth in range(self.depth))
        if order == 0:
            values["dvpt_prompts"] = torch.randn(config.num_prompts, width)
            values["dvpt_positions"] = torch.randn(config.num_prompts, width) / math.sqrt(width)
        if order % config.share_group == 0:
            inner, outer = 1 / math.sqrt(width), 1 / math.sqrt(config.bottleneck)  # as nn.Linear starts
            values["dvpt_down"] = torch.empty(config.bottleneck, width).uniform_(-inner, inner)
            values["dvpt_down_bias"] = torch.empty(config.bottleneck).uniform_(-inner, inner)
            values["dvpt_up"] = torch.empty(width, config.bottleneck).uniform_(-outer, outer)
            values["dvpt_up_bias"] = torch.empty(width).uniform_(-outer, outer)
            values["dvpt_gate"] = torch.zeros(1)
        return values

    def stored(self, adapter: str, call: Call, rows: int | None = None) -> Tensor | None:
        prompts = super().stored(adapter, call, rows)
        if prompts is None:
            return None
        return self.normed("norm.stem", prompts + self.dvpt_positions[adapter])

    def branch_weights(self, adapter: str, call: Call) -> tuple[Tensor, ...] | None:
        if not self.configs[adapter].writes(self.depth):
            return None
        if adapter in self.dvpt_down:
            call.shared[adapter] = tuple(getattr(self, name)[adapter] for name in self.adapter_layer_names[2:])
        return call.shared[adapter]

    def branch(self, x: Tensor, part: Part) -> Tensor:
        down, down_bias, up, up_bias, gate = part.weights
        x = x.to(down.dtype)
        if self.configs[part.adapter].variant == "author_code":
            z = _quick_gelu(linear(x, down, down_bias))
        else:
            tokens, prompts = split(linear(_quick_gelu(x), down, down_bias), part.count, part.at)
            patches = tokens[:, self.prefix_tokens :]
            prompts = (prompts @ patches.mT / math.sqrt(self.width)).softmax(-1) @ patches
            z = insert(tokens, prompts, part.at)
        return gate * linear(z, up, up_bias)


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


register_static(METHOD, DVPTConfig, DVPTLayer)
