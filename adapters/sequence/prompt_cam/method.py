"""Prompt-CAM: class prompts that score the classes and explain them by attention.

Source: Chowdhury et al. 2025, Prompt-CAM, arXiv:2501.09333. Written from the paper's equations.

There is one prompt per class: its output scores the class, and its attention shows the patches that the class depends
on. The prompts stand in front of the class token. Deep, each block has its own; shallow, those of the first block pass
through all; interpolated (`class_block`), blocks before one in between have prompts of no class, and the class prompts
of that one pass on to the last. What the last block makes of them goes through the final norm and one scoring vector,
the same for all classes: that gives the logits, and the model's own head is neither used nor trained.
`attention_maps.py` beside this file draws the attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from peft_lab.errors import ConfigError
from peft_lab.tuners import MethodInfo
from peft_lab.tuners.sequence import PromptState, StaticConfig, StoredPrompts, register_static

METHOD = MethodInfo(
    name="prompt_cam",
    title="Prompt-CAM",
    paper="2501.09333",
    place="sequence",
    config="PromptCAMConfig",
    roles=("block",),
    capabilities=("mixed_batch", "images"),
    learning_rate=1e-2,
    budget=(1.4, 1.5),
)


@dataclass
class PromptCAMConfig(StaticConfig):
    """Configuration of Prompt-CAM.

    Trainable: classes x width for each block that writes prompts, and width + 1. The number of classes is the model's
    `config.num_labels`. With `class_block` = i: i x `num_prompts` x width + classes x width + width + 1.
    The authors keep the backbone in evaluation mode, which is the default of `backbone_eval`.

    Raises:
        ConfigError: a dropout out of range; prompts that are sampled; a class block that the model does not have, or
            without `deep`; the model is no image classifier; its head in `modules_to_save`.
    """

    produces_logits = True
    authors_backbone_eval = True

    deep: bool = field(default=True, metadata={"help": "New prompts before every block.", "other": False})
    class_block: int | None = field(
        default=None,
        metadata={
            "help": "Index of the block whose class prompts pass on to the last (interpolated); blocks before it have "
            "prompts of no class. Nothing: every block its own, or with deep=False block 0.",
            "other": 0,
        },
    )
    num_prompts: int | None = field(
        default=None,
        metadata={
            "help": "Prompts of no class in each block before `class_block`; nothing means as many as classes.",
            "other": 2,
            "with": {"class_block": 1},
        },
    )
    dropout: float = field(
        default=0.0,
        metadata={"help": "Dropout on prompts, one for the whole batch; the paper takes 0.1.", "other": 0.5},
    )

    def check(self) -> None:
        super().check()
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout} must be at least 0 and below 1.")
        if self.domain_draws is not None:
            raise ConfigError(
                f"domain_draws={self.domain_draws} leaves prompts untrained, so they stand for no class; leave it out."
            )
        if self.class_block is not None and not (self.deep and self.class_block >= 0):
            raise ConfigError(f"class_block={self.class_block} must be at least 0, and goes with deep=True.")
        if self.num_prompts is not None and (self.class_block is None or self.num_prompts < 1):
            raise ConfigError(f"num_prompts={self.num_prompts} must be at least 1, and goes with class_block.")

    def prompted_block_indices(self, num_blocks: int) -> list[int]:
        chosen = super().prompted_block_indices(num_blocks)
        if self.class_block is None:
            return chosen
        if self.class_block not in chosen:
            raise ConfigError(f"class_block={self.class_block} is none of the blocks that may write prompts: {chosen}.")
        return [depth for depth in chosen if depth <= self.class_block]


class PromptCAMLayer(StoredPrompts):
    """Block before which class prompts (classes, width) are written.

    The last block also holds the scoring vector (1, width) and its bias.
    """

    adapter_layer_names = ("prompt_cam_prompts", "prompt_cam_weight", "prompt_cam_bias")
    in_windows = False  # a class prompt looks at the whole image

    def initial_values(self, adapter: str, config: PromptCAMConfig) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        if self.depth in config.prompted_block_indices(self.num_blocks):
            stands_for_classes = config.class_block is None or self.depth == config.class_block
            count = self.stack.classes if stands_for_classes else config.num_prompts or self.stack.classes
            values["prompt_cam_prompts"] = self.uniform(count, self.width)
        # The scores are read behind the last block, so that block stores the scoring vector.
        if self.depth == self.num_blocks - 1:
            bound = 1 / math.sqrt(self.width)
            values["prompt_cam_weight"] = torch.empty(1, self.width).uniform_(-bound, bound)
            values["prompt_cam_bias"] = torch.zeros(1)
        return values

    def make_prompts(self, adapter: str, values: Tensor, state: PromptState) -> Tensor:
        return nn.functional.dropout(values, self.configs[adapter].dropout, self.training)

    def logits(self, adapter: str, prompts: Tensor) -> Tensor:
        hidden = self.normed("norm.final", prompts)
        return (hidden * self.prompt_cam_weight[adapter]).sum(-1) + self.prompt_cam_bias[adapter]


register_static(METHOD, PromptCAMConfig, PromptCAMLayer)
