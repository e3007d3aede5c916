"""SVFit: train only singular values of the pretrained weights.

Source: Sun et al. 2024, SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values,
arXiv:2409.05926.

With the singular value decomposition W = U diag(sigma) Vh of a frozen weight, SVFit trains the leading r singular
values (by `selection` the smallest, or some of both) and nothing else. Here in additive form, y = W x + U_r diag(delta)
Vh_r x with delta = 0 at the start: the model begins bit-exactly as the base, and weight decay leads back to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from peft_lab.errors import ConfigError
from peft_lab.tuners import MethodInfo, register
from peft_lab.tuners.spectral import SpectralConfig, SpectralLayer, leading, parse_rank

METHOD = MethodInfo(
    name="svfit",
    title="SVFit",
    paper="2409.05926",
    place="weight",
    config="SVFitConfig",
    roles=("attn.q", "attn.v"),
    capabilities=("linear", "conv1d", "conv2d", "embedding", "experts", "merge", "mixed_batch", "identity_start"),
    learning_rate=3e-2,
    budget=(1.22, 1.25),
)


@dataclass
class SVFitConfig(SpectralConfig):
    """Configuration of SVFit.

    Trainable parameters: the sum of the ranks of the adapted modules.

    Raises:
        ConfigError: a rank that is no positive integer, "full" or "energy:<share>".
    """

    exports_lora = True

    rank: int | str = field(
        default="full",
        metadata={"help": 'Singular values to train: an int, "full", or "energy:0.99" of the squared sum.', "other": 3},
    )
    selection: Literal["principal", "minor", "mixed"] = field(
        default="principal",
        metadata={
            "help": "Which singular values: the largest, the smallest (`minor`), or half of each (`mixed`).",
            "other": "minor",
            "with": {"rank": 3},
        },
    )
    parametrization: Literal["additive", "relative"] = field(
        default="additive",
        metadata={"help": "Train delta (additive), or s with delta = sigma * s (relative).", "other": "relative"},
    )

    def check(self) -> None:
        if not isinstance(parse_rank(self.rank), int) and self.selection != "principal":
            raise ConfigError(f'selection="{self.selection}" needs a number as rank, not "{self.rank}".')


class SVFitLayer(SpectralLayer):
    """Frozen weight with trainable singular values.

    `svfit_delta[adapter]` is float32 (r,), for the stacked weights of experts (experts, r).
    """

    adapter_layer_names = ("svfit_delta",)
    other_param_names = ("svfit_u", "svfit_s", "svfit_vh")
    row_fields = MappingProxyType({"svfit_delta": 0.0})
    linear = True
    decayed_vectors = ("svfit_delta",)

    def initial_values(self, adapter: str, config: SVFitConfig) -> dict[str, Tensor]:
        bases = self.hold_bases(adapter, config, config.rank, config.selection)
        return {"svfit_delta": torch.zeros(bases.s.shape)}

    def chosen(self, adapter: str) -> tuple[int, str]:
        return self.ranks[adapter], self.configs[adapter].selection

    def delta(self, adapter: str) -> Tensor:
        """Change of the singular values (r,)."""
        value = self.svfit_delta[adapter]
        relative = self.configs[adapter].parametrization == "relative"
        return value * self.bases(adapter).s.to(value.dtype) if relative else value

    def delta_weight(self, adapter: str) -> Tensor:
        bases, delta = self.bases(adapter), self.delta(adapter)
        return (bases.u.to(delta.dtype) * delta.unsqueeze(-2)) @ bases.vh.to(delta.dtype)

    def lora_factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        bases, delta = self.bases(adapter), self.delta(adapter).detach()
        return bases.u.to(delta.dtype) * delta.unsqueeze(-2), bases.vh.to(delta.dtype)

    def delta_output(self, adapter: str, x: Tensor) -> Tensor:
        return self.project(x, self.bases(adapter), self.delta(adapter))

    def adapted(self, x: Tensor, adapters: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        out = None
        # The kernels take one adapter; several adapters and embeddings take the general form.
        if len(adapters) == 1:
            out = self.diagonal_output(x, self.bases(adapters[0]), self.delta(adapters[0]))
        return super().adapted(x, adapters, *args, **kwargs) if out is None else out

    def row_values(self, values: Mapping[str, Tensor], config: SVFitConfig) -> dict[str, Tensor]:
        # Rows of both parametrizations meet in one batch, so all are brought to the additive one.
        value = values["svfit_delta"]
        relative = config.parametrization == "relative"
        value = value * self.shared_bases.select(len(value), config.selection).s.to(value) if relative else value
        # Shared bases hold the triplets of all adapters, so a change of some of them is zero for the others.
        first = leading(len(value), config.selection)
        others = value.new_zeros(self.shared_bases.rank - len(value))
        return {"svfit_delta": torch.cat([value[:first], others, value[first:]])}

    def rows_output(
        self, x: Tensor, values: Mapping[str, Tensor], out: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        delta = values["svfit_delta"]
        bases = self.shared_bases.select(delta.shape[1], "principal")
        return self.rows_diagonal(x, bases, delta, out, *args, **kwargs)


register(METHOD, SVFitConfig, SVFitLayer)
