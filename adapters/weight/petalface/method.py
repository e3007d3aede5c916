"""PETALface: two low-rank deltas, mixed for each image by its quality.

Source: Narayan et al. 2024, PETALface: Parameter Efficient Transfer Learning for Low-resolution Face Recognition,
arXiv:2412.07771. Written from the paper.

y = W x + (1 - a) s B1 A1 x + a s B2 A2 x with a = 0.5 + (quality - threshold), which is not clipped: the second delta
serves good images, the first one bad ones. A quality of one number per row travels with the call and is repeated to
windows and tokens.

Readings where paper and code leave a choice: A ~ N(0, 1 / r^2) and B = 0 as the class of the authors has it (their Swin
draws B anew, so that their adapter does not start at the base); dropout acts on the output of each branch (0.1 there,
off by default here); the projection behind the backbone, which the paper gives one LoRA, belongs to the task head here
and is trained whole.

Test accuracy after 60 steps of 16 rows at the default rate, seeds 0, 1, 2, on sign-digits with a small ViT: 0.430,
0.352, 0.383; the head alone has 0.338, 0.335, 0.335, the most frequent class 0.085.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_lab.adapters.weight.petalface.quality import GIVEN, check_quality, score_call
from peft_lab.errors import ConfigError
from peft_lab.tuners import AdapterConfig, MethodInfo, RowInput, WeightLayer, register

METHOD = MethodInfo(
    name="petalface",
    title="PETALface",
    paper="2412.07771",
    place="weight",
    config="PETALfaceConfig",
    roles=("attn.q", "attn.k", "attn.v"),
    capabilities=("linear", "conv1d", "mixed_batch", "identity_start"),
    learning_rate=1e-2,
    budget=(1.03, 1.13),
    row_columns=("quality",),
)

#: Row input that a column of the task gives.
QUALITY = "quality"


@dataclass
class PETALfaceConfig(AdapterConfig):
    """Configuration of PETALface.

    Trainable parameters: 2 r (in + out) for each adapted weight.

    Raises:
        ConfigError: a rank below 1, an unknown score, a constant quality that is missing or has no use, or a dropout
            that is no probability.
    """

    merge_fields: ClassVar[tuple[str, ...]] = ("merge_weight",)

    r: int = field(default=8, metadata={"help": "Rank of each of the two deltas.", "other": 2})
    scale: float = field(default=1.0, metadata={"help": "Factor of both deltas.", "other": 2.0})
    threshold: float = field(default=0.5, metadata={"help": "Quality at which both count alike.", "other": 0.25})
    quality: str = field(
        default="sharpness",
        metadata={
            "help": "Where a row's quality comes from: `sharpness` of its pixels, a registered score, a `column` "
            "called quality (an argument of the forward), or a `constant`.",
            "other": "constant",
        },
    )
    quality_value: float | None = field(
        default=None,
        metadata={
            "help": "Quality of all rows with quality=constant; nothing means the threshold.",
            "other": 0.9,
            "with": {"quality": "constant"},
        },
    )
    dropout: float = field(
        default=0.0, metadata={"help": "Dropout on the output of each delta; 0.1 in the paper.", "other": 0.5}
    )
    merge_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the delta for good images in a merge: 1 for good ones, 0 for bad ones.",
            "untried": "acts on merges alone",
        },
    )

    def check(self) -> None:
        if self.r < 1:
            raise ConfigError(f"r={self.r} must be at least 1.")
        check_quality(self.quality)
        if self.quality_value is not None and self.quality != "constant":
            raise ConfigError(
                f'quality_value={self.quality_value} has no effect with quality="{self.quality}"; leave one of them '
                'out, or give quality="constant".'
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout} must be at least 0 and below 1.")
        if self.merge_weight not in (None, 0, 1):
            raise ConfigError(
                f"merge_weight={self.merge_weight} must be 0 or 1: a merge serves good images or bad ones."
            )

    def row_inputs(self) -> tuple[RowInput, ...]:
        if self.quality == "constant":
            return ()
        if self.quality == "column":
            return (RowInput(QUALITY, "float32", column=QUALITY),)
        # named after the score, because adapters with different ones may be on one model
        return (RowInput(self.input_name, "float32", compute=partial(score_call, name=self.quality)),)

    @property
    def input_name(self) -> str:
        """Name of the row input that holds the quality."""
        return QUALITY if self.quality in GIVEN else f"{QUALITY}_{self.quality}"

    @property
    def fixed_weight(self) -> float | None:
        """Weight a that all rows have, or that a merge is made with; None if it differs by row."""
        if self.quality != "constant":
            return self.merge_weight
        return 0.5 if self.quality_value is None else 0.5 + self.quality_value - self.threshold

    @property
    def merges(self) -> bool:
        return self.fixed_weight is not None


class PETALfaceLayer(WeightLayer):
    """Weight with two low-rank deltas, weighted for each row of the batch.

    `petalface_A[adapter]` is (2, r, in), `petalface_B[adapter]` (out, 2, r), float32: first the delta for bad images.
    """

    adapter_layer_names = ("petalface_A", "petalface_B")

    def initial_values(self, adapter: str, config: PETALfaceConfig) -> dict[str, Tensor]:
        down = torch.randn(2, config.r, self.in_features) / config.r
        return {"petalface_A": down, "petalface_B": torch.zeros(self.out_features, 2, config.r)}

    def branch_weights(self, adapter: str, x: Tensor) -> Tensor:
        """Weights s (1 - a) and s a of the two deltas, float32 (rows of x, 2); (1, 2) if all rows have the same."""
        config: PETALfaceConfig = self.configs[adapter]
        if config.quality == "constant":
            good = x.new_full((1,), float(config.fixed_weight or 0.0), dtype=torch.float32)
        else:
            quality = self.row_input(config.input_name, x)
            assert quality is not None, "the config declares it with a column or a function"
            # a call without images has no score, and takes both deltas alike
            good = (0.5 + quality.to(x.device) - config.threshold).nan_to_num(0.5)
        return config.scale * torch.stack([1 - good, good], -1)

    def delta_output(self, adapter: str, x: Tensor) -> Tensor:
        down, up, dropout = self.petalface_A[adapter], self.petalface_B[adapter], self.configs[adapter].dropout
        weights = self.branch_weights(adapter, x).to(down.dtype)
        hidden = F.linear(x.to(down.dtype), down.flatten(0, 1)).unflatten(-1, (2, -1))
        # (rows, 2) over the tokens between, and over the rank
        hidden = hidden * weights.reshape(weights.shape[0], *(1,) * (x.ndim - 2), 2, 1)
        if not (dropout and self.training):
            return F.linear(hidden.flatten(-2), up.flatten(1))
        bad, good = (F.linear(hidden[..., branch, :], up[:, branch]) for branch in (0, 1))
        return F.dropout(bad, dropout) + F.dropout(good, dropout)

    def delta_weight(self, adapter: str) -> Tensor:
        config: PETALfaceConfig = self.configs[adapter]
        good = config.fixed_weight
        if good is None:
            raise ConfigError(
                f'The delta of adapter "{adapter}" differs from row to row; set merge_weight=1 in its config for good '
                "images, or 0 for bad ones."
            )
        down, up = self.petalface_A[adapter], self.petalface_B[adapter]
        return config.scale * ((1 - good) * up[:, 0] @ down[0] + good * up[:, 1] @ down[1])


register(METHOD, PETALfaceConfig, PETALfaceLayer)
