"""MP+: moment probing with a partially shared recalibration (PSRP) in each block.

Source: Gao et al. 2023, Tuning Pre-trained Model via Moment Probing, arXiv:2307.11342. Written from the paper's
equations.

The recalibration reads the residual stream before the MLP and makes a scale w and a shift b of the MLP's output, by two
up-projections behind one shared down-projection: x + MLP(norm(x)) becomes x + b + (1 + w) * MLP(norm(x)). Here the
summand b + w * MLP(norm(x)) is a residual branch beside the MLP. In post-norm blocks it stands before the norm, and x
is the stream behind attention's norm. Maps start at N(0, 0.02^2), as the authors' do, so that the start is near the
backbone but not at it. Convolutional nets, for which the authors recalibrate the MLP by its own output, are refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_lab.adapters.head.moment_probing.method import MOMENT_NAMES, MomentConfig, MomentHead
from peft_lab.errors import ConfigError
from peft_lab.tuners import (
    AdapterLayer,
    HeadTuner,
    MethodInfo,
    ResidualLayer,
    ResidualTuner,
    RowAdapters,
    modules_by_role,
    register,
)

METHOD = MethodInfo(
    name="mp_plus",
    title="Moment Probing (MP+)",
    paper="2307.11342",
    place="head",
    config="MPPlusConfig",
    roles=("head", "block"),
    capabilities=("mixed_batch",),
    learning_rate=3e-3,
    budget=(1.0, 1.25),
)

_HEAD = tuple(f"mp_plus_{name}" for name in MOMENT_NAMES)
_BLOCK = ("mp_plus_down", "mp_plus_up_weight", "mp_plus_up_bias")


@dataclass
class MPPlusConfig(MomentConfig):
    """Configuration of MP+.

    Trainable: the head of moment probing, and 3 x `bottleneck_dim` x width for each block: 442,368 for ViT-B.

    Raises:
        ConfigError: as for moment probing; a width out of range; a block without an MLP behind a norm.
    """

    bottleneck_dim: int = field(default=16, metadata={"help": "Width of the shared down-projection.", "other": 4})

    def check(self) -> None:
        super().check()
        if self.bottleneck_dim < 1:
            raise ConfigError(f"bottleneck_dim={self.bottleneck_dim} must be at least 1.")


class MPPlusPart(AdapterLayer):
    """Layer of MP+, in a block or around the head."""

    adapter_layer_names = (*_HEAD, *_BLOCK)

    def mixed(self, x: Tensor, rows: RowAdapters, *args: Any, **kwargs: Any) -> Tensor:
        """Output for rows with adapters of their own, which each sort of layer gives in its way."""
        raise NotImplementedError


class MPPlusHead(MomentHead, MPPlusPart):
    """Head of first and second moments."""

    adapter_layer_names = _HEAD

    def initial_values(self, adapter: str, config: MPPlusConfig) -> dict[str, Tensor]:
        return self.moment_values(config)


class MPPlusBlock(ResidualLayer, MPPlusPart):
    """Block whose MLP is recalibrated.

    `down` (bottleneck, width) is shared, `up_weight` and `up_bias` (width, bottleneck) give scale and shift.
    """

    adapter_layer_names = _BLOCK

    def initial_values(self, adapter: str, config: MPPlusConfig) -> dict[str, Tensor]:
        down, up_weight, up_bias = torch.empty(3, config.bottleneck_dim, self.width).normal_(std=0.02).unbind()
        return dict(zip(_BLOCK, (down.clone(), up_weight.T.clone(), up_bias.T.clone()), strict=True))

    def branch_beside(self, adapter: str, sub_layer: str, stream: Tensor, output: Tensor) -> Tensor:
        down = self.mp_plus_down[adapter]
        hidden = F.relu(F.linear(stream.to(down.dtype), down))
        weight = F.linear(hidden, self.mp_plus_up_weight[adapter])
        return F.linear(hidden, self.mp_plus_up_bias[adapter]) + weight * output.to(weight.dtype)


class MPPlusTuner(HeadTuner, ResidualTuner):
    """Tuner that replaces the head and wraps the blocks of the backbone."""

    def layer_class(self, path: str) -> type[AdapterLayer]:
        return MPPlusHead if path in self.head_facts().heads else MPPlusBlock

    def targets(self) -> list[str]:
        return [*super().targets(), *modules_by_role(self.model, "block")]


register(METHOD, MPPlusConfig, MPPlusPart, MPPlusTuner)
