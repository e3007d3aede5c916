"""SVDiff: train a shift of all singular values of every weight, norms included.

Source: Han et al. 2023, SVDiff: Compact Parameter Space for Diffusion Fine-Tuning, arXiv:2303.11305.

With the singular value decomposition W = U diag(sigma) Vh, the weight becomes U diag(relu(sigma + scale * delta)) Vh,
with delta = 0 at the start. Here in additive form: what is added to W is the difference to sigma, so that the model
begins bit-exactly as the base. A convolution is the matrix (out, in * height * width). The weight of a norm is a matrix
of one column, whose single singular value is its length; that of a norm which multiplies by (1 + weight) is taken of
this sum. The authors train the one value of a norm at a thousandth of the rate of the others; here all have one rate.

By default all weight layers and norms of the blocks are adapted, as the paper has it, which costs more FLOPs than full
fine-tuning where a batch has fewer tokens than a weight has rows; `target_modules` chooses fewer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from peft_lab.errors import ConfigError
from peft_lab.tuners import MethodInfo, norm_offset, register
from peft_lab.tuners.spectral import Bases, SpectralConfig, SpectralLayer

METHOD = MethodInfo(
    name="svdiff",
    title="SVDiff",
    paper="2303.11305",
    place="weight",
    config="SVDiffConfig",
    roles=("linear", "norm"),
    capabilities=(
        "linear",
        "conv1d",
        "conv2d",
        "embedding",
        "norm",
        "experts",
        "merge",
        "mixed_batch",
        "identity_start",
    ),
    learning_rate=3e-2,
    budget=(2.2, 2.7),
)


@dataclass
class SVDiffConfig(SpectralConfig):
    """Configuration of SVDiff.

    Trainable parameters: min(out, in) for each adapted weight, and one for each norm.

    Raises:
        ConfigError: a `scale` that is not above zero.
    """

    scale: float = field(
        default=1.0, metadata={"help": "Factor of delta in relu(sigma + scale * delta).", "other": 2.0}
    )

    def check(self) -> None:
        if not self.scale > 0:
            raise ConfigError(f"scale={self.scale} must be above zero, or the singular values stay as they are.")


class SVDiffLayer(SpectralLayer):
    """Frozen weight with a trained shift of its singular values.

    `svdiff_delta[adapter]` is float32 (min(out, in),), for a norm (1,), for the stacked weights of experts with the
    experts as first axis.
    """

    adapter_layer_names = ("svdiff_delta",)
    other_param_names = ("svdiff_u", "svdiff_s", "svdiff_vh")
    row_fields = MappingProxyType({"svdiff_delta": 0.0})
    decayed_vectors = ("svdiff_delta",)

    def initial_values(self, adapter: str, config: SVDiffConfig) -> dict[str, Tensor]:
        return {"svdiff_delta": torch.zeros(self.hold_bases(adapter, config, "full").s.shape)}

    def shift(self, adapter: str) -> Tensor:
        """Change of the singular values: relu(sigma + scale * delta) - sigma."""
        return self._shift(self.svdiff_delta[adapter], self.bases(adapter).s, self.configs[adapter])

    def delta_weight(self, adapter: str) -> Tensor:
        bases, shift = self.bases(adapter), self.shift(adapter)
        return (bases.u.to(shift.dtype) * shift.unsqueeze(-2)) @ bases.vh.to(shift.dtype)

    def delta_output(self, adapter: str, x: Tensor) -> Tensor:
        if self.op.op_type == "norm":
            return self._scaled(self._unmerged_output(x), self.shift(adapter), self.bases(adapter).s)
        return self.project(x, self.bases(adapter), self.shift(adapter))

    def adapted(self, x: Tensor, adapters: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        out = None
        if self.op.op_type == "norm" and not self.merged:
            # The output of the norm is at hand, so it need not run again.
            out = change = self.base_layer(x, *args, **kwargs)
            for name in adapters:
                out = self._add(out, self._scaled(change, self.shift(name), self.bases(name).s))
        elif len(adapters) == 1:
            out = self.diagonal_output(x, self.bases(adapters[0]), self.shift(adapters[0]))
        return super().adapted(x, adapters, *args, **kwargs) if out is None else out

    def row_values(self, values: Mapping[str, Tensor], config: SVDiffConfig) -> dict[str, Tensor]:
        return {"svdiff_delta": self._shift(values["svdiff_delta"], self.shared_bases.s, config)}

    def rows_output(
        self, x: Tensor, values: Mapping[str, Tensor], out: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        shift = values["svdiff_delta"]
        if self.op.op_type != "norm":
            return self.rows_diagonal(x, self.shared_bases, shift, out, *args, **kwargs)
        out = self.base_layer(x, *args, **kwargs) if out is None else out
        return self._add(out, self._scaled(out, shift.reshape(-1, *(1,) * (out.dim() - 1)), self.shared_bases.s))

    def bases_of_weight(self, rank: int | str) -> Bases:
        if self.op.op_type != "norm":
            return super().bases_of_weight(rank)
        weight = self.base_weight
        if weight.is_meta:
            sizes = ((len(weight), 1), (1,), (1, 1))
            return Bases(*(torch.empty(size, device="meta") for size in sizes))
        matrix = (self.dense_weight().detach().float() + norm_offset(self.base_layer))[:, None]
        length = matrix.norm().reshape(1)
        # A weight of zeros has no direction, and stays as it is.
        return Bases(matrix / length.clamp_min(torch.finfo(torch.float32).tiny), length, torch.ones_like(matrix[:1]))

    @staticmethod
    def _shift(delta: Tensor, s: Tensor, config: SVDiffConfig) -> Tensor:
        s = s.to(delta.dtype)
        return torch.relu(s + config.scale * delta) - s

    def _scaled(self, out: Tensor, shift: Tensor, s: Tensor) -> Tensor:
        """Change of a norm's output: the part before the bias times shift / sigma."""
        bias = getattr(self.base_layer, "bias", None)
        wide = out.to(shift.dtype)
        if bias is not None:
            shape = [1] * out.dim()
            shape[self.op.channel_dim] = -1
            wide = wide - bias.to(shift.dtype).reshape(shape)
        s = s.to(shift.dtype)
        return wide * torch.where(s > 0, shift / s.clamp_min(torch.finfo(s.dtype).tiny), 0.0)

    def _unmerged_output(self, x: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(self.base_layer, {"weight": self.base_weight}, (x,))
        return out


register(METHOD, SVDiffConfig, SVDiffLayer)
