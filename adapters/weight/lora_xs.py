"""LoRA-XS: train a small square matrix between frozen singular bases.

Source: Balazy et al. 2024, LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters, arXiv:2405.17604.

With the leading r singular triplets of a frozen weight, W' = W + (alpha / r) U_r R (Sigma_r Vh_r), and R (r, r) alone
is trained. R starts at zero, so that the model begins bit-exactly as the base; `init_std=1e-5` is the authors' start,
drawn from a normal distribution. The sign of a singular pair is free, and R has its meaning for one choice of signs
alone: they are canonical here, and `save_bases` keeps the bases themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_lab.errors import ConfigError
from peft_lab.tuners import MethodInfo, register
from peft_lab.tuners.spectral import SpectralConfig, SpectralLayer

METHOD = MethodInfo(
    name="lora_xs",
    title="LoRA-XS",
    paper="2405.17604",
    place="weight",
    config="LoraXSConfig",
    roles=("attn.q", "attn.v"),
    capabilities=("linear", "conv1d", "conv2d", "embedding", "experts", "merge", "mixed_batch", "identity_start"),
    learning_rate=3e-2,
    budget=(1.0, 1.02),
)


@dataclass
class LoraXSConfig(SpectralConfig):
    """Configuration of LoRA-XS.

    Trainable parameters: r * r for each adapted weight.

    Raises:
        ConfigError: a rank below 1, an `alpha` that is not above zero, or a negative `init_std`.
    """

    exports_lora = True

    r: int = field(default=16, metadata={"help": "Leading singular triplets that R mixes.", "other": 3})
    alpha: float = field(default=16.0, metadata={"help": "The delta is scaled by alpha / r.", "other": 24.0})
    init_std: float = field(
        default=0.0,
        metadata={
            "help": "Standard deviation of R at the start: zero for the exact base, the authors' 1e-5.",
            "other": 0.02,
        },
    )

    def check(self) -> None:
        if self.r < 1:
            raise ConfigError(f"r={self.r} must be at least 1.")
        if not self.alpha > 0:
            raise ConfigError(f"alpha={self.alpha} must be above zero, or the delta stays zero.")
        if self.init_std < 0:
            raise ConfigError(f"init_std={self.init_std} is a standard deviation and must not be negative.")


class LoraXSLayer(SpectralLayer):
    """Frozen weight with a trained matrix between its leading singular vectors.

    `lora_xs_core[adapter]` is R, float32 (r, r), for the stacked weights of experts (experts, r, r).
    """

    adapter_layer_names = ("lora_xs_core",)
    other_param_names = ("lora_xs_u", "lora_xs_s", "lora_xs_vh")
    row_fields = MappingProxyType({"lora_xs_core": 0.0})
    linear = True

    def initial_values(self, adapter: str, config: LoraXSConfig) -> dict[str, Tensor]:
        shape = self.hold_bases(adapter, config, config.r).s.shape
        return {"lora_xs_core": config.init_std * torch.randn(*shape, shape[-1])}

    def core(self, adapter: str) -> Tensor:
        """Matrix (r, r) between U and Vh: (alpha / r) R Sigma."""
        return self._scaled(self.lora_xs_core[adapter], self.bases(adapter).s, self.configs[adapter])

    def delta_weight(self, adapter: str) -> Tensor:
        bases, core = self.bases(adapter), self.core(adapter)
        return bases.u.to(core.dtype) @ core @ bases.vh.to(core.dtype)

    def lora_factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        bases, core = self.bases(adapter), self.core(adapter).detach()
        return bases.u.to(core.dtype) @ core, bases.vh.to(core.dtype)

    def delta_output(self, adapter: str, x: Tensor) -> Tensor:
        return self.project_core(x, self.bases(adapter), self.core(adapter))

    def row_values(self, values: Mapping[str, Tensor], config: LoraXSConfig) -> dict[str, Tensor]:
        value, shared = values["lora_xs_core"], self.shared_bases
        core = self._scaled(value, shared.s[..., : value.shape[-1]], config)
        # Rows of several ranks meet in one batch; the triplets of the larger ones are not used by the others.
        missing = shared.rank - value.shape[-1]
        return {"lora_xs_core": F.pad(core, (0, missing, 0, missing))}

    def rows_delta(self, x: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        core = values["lora_xs_core"]
        return self.project_core(x, self.shared_bases.select(core.shape[-1], "principal"), core)

    @staticmethod
    def _scaled(core: Tensor, s: Tensor, config: LoraXSConfig) -> Tensor:
        return config.alpha / config.r * core * s.to(core.dtype).unsqueeze(-2)


register(METHOD, LoraXSConfig, LoraXSLayer)
