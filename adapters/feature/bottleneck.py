"""Bottleneck adapters: a small perceptron behind or beside the sub-layers of each block.

Sources: Houlsby et al. 2019, Parameter-Efficient Transfer Learning for NLP, arXiv:1902.00751; Pfeiffer et al. 2020,
AdapterFusion, arXiv:2005.00247; Chen et al. 2022, AdaptFormer, arXiv:2205.13535; Lu et al. 2023, UniAdapter,
arXiv:2302.06605. Written from the equations.

A(x) = s up(f(down(x))), by `placement`:

- "houlsby": z + A(z) for the output z of attention (cross-attention too) and of the MLP, behind their dropout and
  before the addition to the residual stream.
- "pfeiffer": the same behind the MLP alone. The papers and their code differ in what this adapter reads. Built is the
  reading with one residual, that of the adapter, and no norm before it: z + A(z). Other implementations let A read the
  block's own norm of z and stream, which they then apply a second time; `norm="before"` trains a norm of its own.
- "parallel": MLP(norm(h)) + A(h), where h is the residual stream that the MLP's norm reads. The equation of AdaptFormer
  has A read the normed stream, its released settings the stream itself, which is built; `norm="before"` is the other.

`share_down` is UniAdapter's: the blocks of one number in all stacks of the model have one down projection (and norm and
learned scale), stored once, and an up projection each. It goes with one adapter a block. Stacks of different widths
cannot share, so there each width has its own. Where text attends to images in blocks that read text alone too (BLIP),
each such block has a second up projection for the fused tokens, and their sum acts on them. UniAdapter puts a norm
behind that sum; at a zero start its gradient has no bound, so it is left out here. The visual up projection starts at
zero too, which in the authors' code only that of the text does.

Test accuracy after 60 steps of 16 rows at the default rate: on snips with MiniLM all three placements and the preset
"uniadapter" are above the head alone in 3 of 3 seeds; on sign-digits with a small ViT "pfeiffer" is in 3, "houlsby" in
2, "parallel" and "uniadapter" in 1.

The up projection starts at zero, where Houlsby's code starts both near zero: the first output is that of the base.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from peft_lab.errors import ConfigError
from peft_lab.tuners import (
    ACTIVATIONS,
    AdapterConfig,
    BranchSource,
    MethodInfo,
    ResidualLayer,
    bottleneck_output,
    linear_start,
    register_residual,
)

METHOD = MethodInfo(
    name="bottleneck",
    title="Bottleneck adapter",
    paper="1902.00751",
    place="feature",
    config="BottleneckConfig",
    roles=("block",),
    capabilities=("mixed_batch", "identity_start"),
    learning_rate=1e-2,
    budget=(1.1, 1.25),
    presets={
        "houlsby": {"placement": "houlsby", "activation": "gelu"},
        "pfeiffer": {"placement": "pfeiffer", "activation": "relu"},
        "parallel": {"placement": "parallel", "activation": "relu", "scale": 0.1},
        "uniadapter": {
            "placement": "parallel",
            "activation": "relu",
            "norm": "before",
            "scale": 0.1,
            "share_down": True,
        },
    },
)

_SUB_LAYERS = ("attention", "cross_attention", "mlp")
#: Parts that stacks may share, and those that each block has of its own.
_SHARED = ("norm", "norm_bias", "down", "down_bias", "scale")
_OWN = ("up", "up_bias", "up_fused", "up_fused_bias")


@dataclass
class BottleneckConfig(AdapterConfig):
    """Configuration of bottleneck adapters.

    Trainable for each adapter of width w on a stream of width d: d w + w + w d + d, and 2 d with a norm; shared down
    projections count once.

    Raises:
        ConfigError: both `width` and `reduction_factor`; a size, scale or dropout out of range; shared projections
            with several adapters a block.
    """

    placement: Literal["houlsby", "pfeiffer", "parallel"] = field(
        default="houlsby",
        metadata={
            "help": "Behind attention and MLP (houlsby), behind the MLP alone (pfeiffer), or beside it (parallel).",
            "other": "parallel",
        },
    )
    width: int | None = field(
        default=None,
        metadata={"help": "Width of the bottleneck; 64 where reduction_factor is not given either.", "other": 5},
    )
    reduction_factor: float | None = field(
        default=None,
        metadata={"help": "Width of the stream divided by that of the bottleneck, in place of width.", "other": 4},
    )
    activation: Literal["relu", "gelu", "silu", "tanh", "quick_gelu"] = field(
        default="gelu", metadata={"help": "Activation in the bottleneck.", "other": "relu"}
    )
    norm: Literal["none", "before"] = field(
        default="none", metadata={"help": "A trained LayerNorm of the adapter's own before it.", "other": "before"}
    )
    scale: float | Literal["learned"] = field(
        default=1.0,
        metadata={"help": 'Factor of the output, or "learned": one trained number, 1 at the start.', "other": 0.1},
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout of the activated units.", "other": 0.5})
    use_bias: bool = field(default=True, metadata={"help": "Biases of both projections.", "other": False})
    share_down: bool = field(
        default=False,
        metadata={
            "help": "One down projection for the blocks of one number in all stacks, such as CLIP's towers.",
            "other": True,
            "family": "clip",
            "with": {"placement": "parallel"},
        },
    )

    def check(self) -> None:
        if self.width is not None and self.reduction_factor is not None:
            raise ConfigError(
                f"width={self.width} and reduction_factor={self.reduction_factor} both set the width of the "
                "bottleneck; give one of them."
            )
        # Written out, so that the adapter's file says the width that it has.
        if self.width is None and self.reduction_factor is None:
            self.width = 64
        if self.width is not None and self.width < 1:
            raise ConfigError(f"width={self.width} must be at least 1.")
        if self.reduction_factor is not None and self.reduction_factor <= 0:
            raise ConfigError(f"reduction_factor={self.reduction_factor} must be above 0; 16 is usual.")
        if self.scale == 0:
            raise ConfigError('scale=0 would leave the adapter without effect; give another number or "learned".')
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout} must be at least 0 and below 1.")
        if self.share_down and self.placement == "houlsby":
            raise ConfigError('share_down needs one adapter a block; give placement="parallel" or "pfeiffer" with it.')

    def width_for(self, stream: int) -> int:
        """Width of the bottleneck on a stream of a width, at least 1."""
        return self.width or max(1, int(stream / cast(float, self.reduction_factor)))

    def source(self, sub_layer: str) -> BranchSource:
        """Source of the adapter at a sub-layer; "" where the placement has none."""
        if self.placement != "houlsby" and sub_layer != "mlp":
            return ""
        return "stream" if self.placement == "parallel" else "output"


class BottleneckLayer(ResidualLayer):
    """Block with bottleneck adapters at its sub-layers, all parameters float32.

    For each sub-layer: down (w, d), up (d, w), biases (w,) and (d,), norm weight and bias (d,), scale (1,).

    Attributes:
        fuses: True if its cross-attention reads images.
    """

    adapter_layer_names = tuple(f"bottleneck_{name}_{part}" for name, part in product(_SUB_LAYERS, (*_SHARED, *_OWN)))
    sub_layers = _SUB_LAYERS
    fuses: bool = False

    def hook_sub_layers(self, model: nn.Module, path: str) -> None:
        super().hook_sub_layers(model, path)
        if "cross_attention" in self.hooked:
            self.fuses = any(getattr(part, "main_input_name", "") == "pixel_values" for part in model.modules())

    def branch_source(self, adapter: str, sub_layer: str) -> BranchSource:
        return self.configs[adapter].source(sub_layer)

    def share_key(self, config: BottleneckConfig) -> Hashable:
        return (self.block_numbers, self.width) if config.share_down else None

    def initial_values(self, adapter: str, config: BottleneckConfig) -> dict[str, Tensor]:
        return self._values(config, _OWN if config.share_down else (*_SHARED, *_OWN))

    def shared_values(self, adapter: str, config: BottleneckConfig) -> dict[str, Tensor]:
        return self._values(config, _SHARED) if config.share_down else {}

    def _values(self, config: BottleneckConfig, parts: tuple[str, ...]) -> dict[str, Tensor]:
        """Start values of the named parts at all sub-layers that have an adapter."""
        width, stream = config.width_for(self.width), self.width
        found: dict[str, Tensor] = {}
        for sub_layer in self.hooked:
            if not config.source(sub_layer):
                continue
            values = {"down": linear_start(width, stream), "up": torch.zeros(stream, width)}
            if config.use_bias:
                values |= {"down_bias": torch.zeros(width), "up_bias": torch.zeros(stream)}
            if config.norm == "before":
                values |= {"norm": torch.ones(stream), "norm_bias": torch.zeros(stream)}
            if config.scale == "learned":
                values["scale"] = torch.ones(1)
            if config.share_down and self.fuses:
                values["up_fused"] = torch.zeros(stream, width)
                if config.use_bias:
                    values["up_fused_bias"] = torch.zeros(stream)
            found |= {f"bottleneck_{sub_layer}_{part}": values[part] for part in parts if part in values}
        return found

    def branch(self, adapter: str, sub_layer: str, x: Tensor) -> Tensor:
        config: BottleneckConfig = self.configs[adapter]
        part = partial(self._part, adapter, sub_layer)
        down, up, up_bias = cast(Tensor, part("down")), cast(Tensor, part("up")), part("up_bias")
        # Tokens that have seen the image take both projections, whose sum is one.
        fused = part("up_fused") if self.has_run("cross_attention") else None
        if fused is not None:
            up = up + fused
            up_bias = None if up_bias is None else up_bias + cast(Tensor, part("up_fused_bias"))
        if config.norm == "before":
            x = layer_norm(x.to(down.dtype), (self.width,), part("norm"), part("norm_bias"))
        drop = config.dropout if self.training else 0.0
        out = bottleneck_output(x, down, part("down_bias"), up, up_bias, ACTIVATIONS[config.activation], drop)
        if config.scale == "learned":
            return cast(Tensor, part("scale")) * out
        return out if config.scale == 1 else config.scale * out

    def _part(self, adapter: str, sub_layer: str, part: str) -> Tensor | None:
        """Tensor of the adapter at a sub-layer; None for a part that it has not."""
        return self.parameter(adapter, f"bottleneck_{sub_layer}_{part}")


register_residual(METHOD, BottleneckConfig, BottleneckLayer)
