"""DVPT: dynamic visual prompt tuning through a shared bottleneck beside the MLPs.

Source: He et al. 2023, Dynamic Visual Prompt Tuning, arXiv:2307.09787. Written from the equations.

Prompts stand in front of the class token and pass through all blocks. Beside each MLP a gated bottleneck S reads the
residual stream: x + MLP(x) + S(x). In the paper's form the prompts take the features of the image's patches by
cross-attention inside the bottleneck; the authors' code has the bottleneck alone. One bottleneck serves several blocks
in a row. The stack returns class and patch tokens alone, so a head for dense prediction can use them; to classify, the
authors' code reads the mean of class token and prompts (`readout`).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from peft_lab.errors import ConfigError
from peft_lab.tuners import (
    ForwardContext,
    MethodInfo,
    ResidualBranches,
    RowAdapters,
    bias_start,
    bottleneck_output,
    insert,
    linear_start,
    quick_gelu,
    split,
)
from peft_lab.tuners.sequence import PromptState, StaticConfig, StoredPrompts, register_static

METHOD = MethodInfo(
    name="dvpt",
    title="DVPT",
    paper="2307.09787",
    place="sequence",
    config="DVPTConfig",
    roles=("block",),
    capabilities=("mixed_batch", "images"),
    learning_rate=1e-2,
    budget=(2.0, 2.4),
)


@dataclass
class DVPTConfig(StaticConfig):
    """Configuration of DVPT.

    Trainable for width d: 2 d r + r + d + 1 for each bottleneck of width r, and 2 p d for p prompts.

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


@dataclass(frozen=True)
class _PromptPlaces:
    """Positions of an adapter's prompts in the sequence of a block.

    Attributes:
        at: number of tokens before the prompts.
        unused: prompts at the beginning that the adapter's rows do not have.
        count: prompts that they have.
    """

    at: int
    unused: int
    count: int


class DVPTLayer(ResidualBranches, StoredPrompts):
    """Block with a bottleneck beside its MLP, shared within a group."""

    adapter_layer_names = (
        *("dvpt_prompts", "dvpt_positions"),
        *("dvpt_down", "dvpt_down_bias", "dvpt_up", "dvpt_up_bias", "dvpt_gate"),
    )
    in_windows = False  # the bottleneck is as wide as the first block of its group

    def initial_values(self, adapter: str, config: DVPTConfig) -> dict[str, Tensor]:
        if self.depth not in config.prompted_block_indices(self.num_blocks):
            return {}
        return {
            "dvpt_prompts": torch.randn(config.num_prompts, self.width),
            "dvpt_positions": torch.randn(config.num_prompts, self.width) / math.sqrt(self.width),
        }

    def share_key(self, config: DVPTConfig) -> Hashable:
        # Groups are counted among the blocks that have a bottleneck.
        if not config.may_write(self.depth):
            return None
        order = sum(config.may_write(depth) for depth in range(self.depth))
        return order // config.share_group

    def shared_values(self, adapter: str, config: DVPTConfig) -> dict[str, Tensor]:
        if self.share_key(config) is None:
            return {}
        return {
            "dvpt_down": linear_start(config.bottleneck, self.width),
            "dvpt_down_bias": bias_start(config.bottleneck, self.width),
            "dvpt_up": linear_start(self.width, config.bottleneck),
            "dvpt_up_bias": bias_start(self.width, config.bottleneck),
            "dvpt_gate": torch.zeros(1),
        }

    def make_prompts(self, adapter: str, values: Tensor, state: PromptState) -> Tensor:
        return self.normed("norm.stem", values + self.dvpt_positions[adapter])

    def prepare_block(self, active: Sequence[str], rows: RowAdapters | None, state: PromptState, at: int) -> None:
        assert state.states is not None
        size = state.states.shape[1]
        places = {}
        # The rows of one adapter have the same prompts, so the first of them tells how many.
        for name, index in self.adapters_with_rows(state.states.shape[0], state.states.device):
            unused = 0
            if state.unused is not None and index is not None:
                unused = int(state.unused[index[0]].sum())
            places[name] = _PromptPlaces(at, unused, size - unused)
        state.context.shared[self, "places"] = places

    def branch(self, adapter: str, sub_layer: str, stream: Tensor) -> Tensor:
        context = ForwardContext.current()
        assert context is not None, "the stream was read from it"
        if not self.configs[adapter].may_write(self.depth):
            return torch.zeros_like(stream)
        places: _PromptPlaces = context.shared[self, "places"][adapter]
        if not places.unused:
            return self._bottleneck(adapter, stream, places)
        # Zero at prompts that the rows do not have.
        kept, end = stream.new_ones(stream.shape[1], dtype=torch.bool), places.at + places.unused
        kept[places.at : end] = False
        added = self._bottleneck(adapter, stream[:, kept], places)
        return added.new_zeros(stream.shape).index_copy(1, kept.nonzero().flatten(), added)

    def _bottleneck(self, adapter: str, x: Tensor, places: _PromptPlaces) -> Tensor:
        """Apply the gated bottleneck S to a stream.

        `x` is (rows, sequence, width) with prompts at `places.at`.
        """
        down, down_bias, up, up_bias, gate = (
            cast(Tensor, self.parameter(adapter, name)) for name in self.adapter_layer_names[2:]
        )
        if self.configs[adapter].variant == "author_code":
            return gate * bottleneck_output(x, down, down_bias, up, up_bias, quick_gelu)
        # Cross-attention at the width of the bottleneck: prompts are queries, patches are keys and values.
        x = x.to(down.dtype)
        tokens, prompts = split(linear(quick_gelu(x), down, down_bias), places.count, places.at)
        patches = tokens[:, self.stack.prefix_tokens :]
        prompts = (prompts @ patches.mT / math.sqrt(self.width)).softmax(-1) @ patches
        return gate * linear(insert(tokens, prompts, places.at), up, up_bias)


register_static(METHOD, DVPTConfig, DVPTLayer)
