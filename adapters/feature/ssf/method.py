"""SSF: scale and shift the deep features of a frozen backbone.

Source: Lian et al. 2022, Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning, arXiv:2210.08823.

A scale and shift stand behind every op: y = scale * op(x) + shift per channel, folded exactly into the op's weight and
bias at merge. Ops whose forward has no bias (RMSNorm) get a scale only: a shift there is a constant that the next
linear op's own shift already expresses. The stacked weights of experts get one scale per expert and output channel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from peft_lab.adapters.feature.ssf.kernels import recomputed, scale_shift, scale_shift_
from peft_lab.errors import ConfigError
from peft_lab.tuners import AdapterConfig, FeatureLayer, MethodInfo, RowAdapters, norm_offset, register

METHOD = MethodInfo(
    name="ssf",
    title="SSF",
    paper="2210.08823",
    place="feature",
    config="SSFConfig",
    roles=("op",),
    capabilities=("linear", "conv1d", "conv2d", "norm", "experts", "merge", "mixed_batch"),
    learning_rate=3e-3,
    budget=(1.03, 1.1),
)


@dataclass
class SSFConfig(AdapterConfig):
    """Configuration of SSF.

    Trainable parameters: two per output channel of each adapted op.

    Raises:
        ConfigError: a negative `init_std`.
    """

    init_std: float = field(
        default=0.02,
        metadata={
            "help": "Scales start at N(1, std), shifts at N(0, std); 0 starts exactly at the base model.",
            "other": 0.0,
        },
    )
    shift: bool = field(default=True, metadata={"help": "Train shifts as well as scales.", "other": False})

    def check(self) -> None:
        if not 0 <= self.init_std < 1:
            raise ConfigError(f"init_std={self.init_std} must be at least 0 and below 1; the paper takes 0.02.")


class SSFLayer(FeatureLayer):
    """Op with a trainable scale and shift behind it, both float32 (channels,), for experts (experts, channels)."""

    adapter_layer_names = ("ssf_scale", "ssf_shift")
    row_fields = MappingProxyType({"ssf_scale": 1.0, "ssf_shift": 0.0})
    per_channel = row_fields
    linear = True

    def initial_values(self, adapter: str, config: SSFConfig) -> dict[str, Tensor]:
        values = {"ssf_scale": 1 + config.init_std * torch.randn(self.op.channel_shape)}
        if config.shift and self.op.takes_bias:
            values["ssf_shift"] = config.init_std * torch.randn(self.op.channel_shape)
        return values

    def adapted(self, x: Tensor, adapters: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        if self.op.op_type != "norm" or args or kwargs:
            return super().adapted(x, adapters, *args, **kwargs)
        # A norm keeps its own input for the backward pass anyway, so its output need not be kept as well.
        out = recomputed(self.base_layer, x, *self._values(adapters[0]), self.op.channel_dim)
        for name in adapters[1:]:
            out = self.transform(name, out)
        return out

    def transform(self, adapter: str, out: Tensor) -> Tensor:
        scale, shift = (self.own_values(value, out) for value in self._values(adapter))
        return scale_shift(out, scale, shift, self.op.channel_dim)

    def transform_rows(self, rows: RowAdapters, out: Tensor) -> Tensor:
        # Rows of the base or of another method's adapter get the scale and shift that change nothing.
        like = next(iter(self.ssf_scale.values()))
        one, zero = torch.ones_like(like), torch.zeros_like(like)
        index = rows.index(out.shape[0], out.device)
        values = {"ssf_scale": torch.stack([self.ssf_scale.get(n, one) for n in rows.names])[index]}
        if len(self.ssf_shift):
            values["ssf_shift"] = torch.stack([self.ssf_shift.get(n, zero) for n in rows.names])[index]
        return self.rows_transform(values, out)

    def rows_transform(self, values: Mapping[str, Tensor], out: Tensor) -> Tensor:
        scale, shift = values["ssf_scale"], values.get("ssf_shift")
        shift = torch.zeros_like(scale) if shift is None else shift
        scale, shift = self.own_values(scale, out), self.own_values(shift, out)
        return scale_shift_(out, scale, shift, self.op.channel_dim)

    def folded(self, adapter: str, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        scale, shift = self._values(adapter)
        scale = scale.to(weight.dtype)
        # A norm multiplies by (offset + weight), and that sum is scaled.
        if self.op.op_type == "norm":
            offset = norm_offset(self.base_layer)
            weight = (weight + offset) * scale - offset
        else:
            weight = weight * scale.reshape(self.op.scale_shape(weight.dim()))
        bias = None if bias is None else bias * scale
        if adapter in self.ssf_shift:
            shift = shift.to(weight.dtype)
            bias = shift if bias is None else bias + shift
        return weight, bias

    def _values(self, adapter: str) -> tuple[Tensor, Tensor]:
        scale = self.ssf_scale[adapter]
        return scale, self.ssf_shift[adapter] if adapter in self.ssf_shift else torch.zeros_like(scale)


register(METHOD, SSFConfig, SSFLayer)
