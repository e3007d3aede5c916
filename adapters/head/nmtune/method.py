"""NMTune: a residual MLP on frozen features, in front of the head.

Source: Chen et al. 2023, Understanding and Mitigating the Label Noise in Pre-training on Downstream Tasks,
arXiv:2309.17002. Written from the paper's equations.

Features f of a noisily pretrained backbone become z = s * MLP(f) + f, with one hidden layer of four times the width, a
batch norm and a ReLU; a linear head reads z. Three terms join the training loss: z stays near the direction of f
(consistency), its channels are decorrelated (covariance), and its dominant singular values are raised. Only features
are needed, so that the backbone may be a black box; no gradient passes through it.

Readings that were built where paper and code differ, or leave something open:

- The terms are those of the authors' code: the mean share of the five largest singular values, where the paper takes
  the largest alone.
- Two views of a row are the plain row (w) and a second run of the backbone (s), which draws its dropout anew, or sees
  images that are shifted at random by up to an eighth of their side. With one view, s is w. The MLP sees both views as
  one batch, and the cross-entropy is the mean over both.
- The feature is what the base's head reads, not a pooled output that the checkpoint may lack.
- Layers start as torch's own do, the head by Kaiming's uniform with a zero bias, s at one.

Test accuracy after 60 steps of 16 rows at the default rate, seeds 0, 1, 2: on sign-digits with a small ViT 0.383,
0.415, 0.372 (the linear head alone 0.338, 0.335, 0.335), but on snips with MiniLM 0.847, 0.841, 0.817 (head 0.843,
0.844, 0.840).

The terms are added where the model computes its loss (`peft_lab.tuners.loss_terms` says what holds where).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.loss.loss_utils import ForSequenceClassificationLoss

from peft_lab.errors import ConfigError, did_you_mean
from peft_lab.tuners import (
    ForwardContext,
    HeadConfig,
    HeadInput,
    HeadLayer,
    LossTerm,
    MethodInfo,
    register_head,
    shifted,
)

METHOD = MethodInfo(
    name="nmtune",
    title="NMTune",
    paper="2309.17002",
    place="head",
    config="NMTuneConfig",
    roles=("head",),
    capabilities=("mixed_batch",),
    learning_rate=1e-3,
    budget=(0.52, 0.03),
    presets={"dropout_views": {"second_view": "dropout", "backbone_eval": False}},
)

#: Ways to a second view of a row.
VIEWS = ("none", "dropout", "shift")
#: Width of the hidden layer in that of the feature, momentum of the batch norm, singular values that count.
_EXPANSION, _MOMENTUM, _DOMINANT = 4, 0.1, 5


@dataclass
class NMTuneConfig(HeadConfig):
    """Configuration of NMTune.

    Trainable, for K classes and features of width D: 8 D^2 + 14 D + K (D + 1). The authors keep the backbone in
    evaluation mode, which is the default of `backbone_eval`; views by dropout need it in training mode.

    Raises:
        ConfigError: an unknown view, views by dropout without dropout, a weight below 0; the model has no head over the
            classes of whole texts or images.
    """

    authors_backbone_eval = True

    second_view: str = field(
        default="none",
        metadata={
            "help": "Second view of each row in training, by another run of the backbone: `dropout` (drawn anew), "
            "`shift` (images, shifted at random), or `none`.",
            "other": "shift",
        },
    )
    consistency_weight: float = field(
        default=1.0, metadata={"help": "Weight of the distance between the directions of z and f.", "other": 0.5}
    )
    covariance_weight: float = field(
        default=0.04, metadata={"help": "Weight of the squared covariances between channels.", "other": 0.1}
    )
    singular_value_weight: float = field(
        default=0.001, metadata={"help": "Weight of the share of the dominant singular values.", "other": 0.01}
    )

    def check(self) -> None:
        super().check()
        if self.second_view not in VIEWS:
            raise ConfigError(
                f'second_view="{self.second_view}" must be one of {", ".join(VIEWS)}.'
                f"{did_you_mean(self.second_view, VIEWS)}"
            )
        if self.second_view == "dropout" and self.backbone_eval:
            raise ConfigError(
                'second_view="dropout" draws the dropout of the backbone, which backbone_eval switches off; pass '
                "backbone_eval=False, or preset=dropout_views."
            )
        for name in ("consistency_weight", "covariance_weight", "singular_value_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name}={getattr(self, name)} must be a number of at least 0.")


class NMTuneLayer(HeadLayer):
    """Head behind a residual MLP.

    Parameters: `up` (4 width, width) and `down` (width, 4 width) with biases, `norm` and its bias (4 width,), `scale`
    (width,), `head` (classes, width) and its bias. Buffers: running `mean` and `variance` (4 width,) of the norm.
    """

    adapter_layer_names = (
        *("nmtune_up", "nmtune_up_bias", "nmtune_norm", "nmtune_norm_bias", "nmtune_down", "nmtune_down_bias"),
        *("nmtune_scale", "nmtune_head", "nmtune_head_bias"),
    )
    other_param_names = data_param_names = ("nmtune_mean", "nmtune_variance")

    @property
    def adds_loss(self) -> bool:
        return True

    def initial_values(self, adapter: str, config: NMTuneConfig) -> dict[str, Tensor]:
        width, hidden = self.facts.width, _EXPANSION * self.facts.width
        return {
            "nmtune_up": _uniform(width, hidden, width),
            "nmtune_up_bias": _uniform(width, hidden),
            "nmtune_norm": torch.ones(hidden),
            "nmtune_norm_bias": torch.zeros(hidden),
            "nmtune_down": _uniform(hidden, width, hidden),
            "nmtune_down_bias": _uniform(hidden, width),
            "nmtune_scale": torch.ones(width),
            "nmtune_head": torch.nn.init.kaiming_uniform_(torch.empty(self.facts.classes, width)),
            "nmtune_head_bias": torch.zeros(self.facts.classes),
        }

    def initial_buffers(self, adapter: str, config: NMTuneConfig) -> dict[str, Tensor]:
        hidden = _EXPANSION * self.facts.width
        return {"nmtune_mean": torch.zeros(hidden), "nmtune_variance": torch.ones(hidden)}

    def runs_backbone(self, config: NMTuneConfig) -> bool:
        return config.second_view != "none"

    def transformed(self, adapter: str, f: Tensor) -> Tensor:
        """Features z = s * MLP(f) + f (rows, width)."""
        hidden = F.linear(f, self.nmtune_up[adapter], self.nmtune_up_bias[adapter])
        mean, variance = self.nmtune_mean[adapter], self.nmtune_variance[adapter]
        # The running statistics stay wide where parameters were cast to half precision.
        weight, bias = self.nmtune_norm[adapter].to(mean.dtype), self.nmtune_norm_bias[adapter].to(mean.dtype)
        # One row has no variance: the running statistics stand in.
        gathers = self.training and len(f) > 1
        normed = F.batch_norm(hidden.to(mean.dtype), mean, variance, weight, bias, gathers, _MOMENTUM).to(hidden.dtype)
        changed = F.linear(F.relu(normed), self.nmtune_down[adapter], self.nmtune_down_bias[adapter])
        return self.nmtune_scale[adapter] * changed + f

    def logits(self, adapter: str, features: HeadInput) -> Tensor:
        context, head, bias = ForwardContext.current(), self.nmtune_head[adapter], self.nmtune_head_bias[adapter]
        rows, f = len(features.pooled), features.pooled
        labels = context.arguments.get("labels") if context is not None else None
        if context is None or not self.training or labels is None:
            return F.linear(self.transformed(adapter, f), head, bias)
        view = self.configs[adapter].second_view
        if view != "none":
            f = torch.cat([f, self._second(view, context).pooled.to(f.dtype)])
        z = self.transformed(adapter, f)
        logits = F.linear(z, head, bias)
        # The model itself takes the cross-entropy of the first view alone.
        value, own = self.regularisers(adapter, z, f[:rows].detach()), 1.0
        if len(z) > rows:
            whole: Any = self.whole[0]
            value, own = value + ForSequenceClassificationLoss(labels, logits[rows:], whole.config) / 2, 0.5
        context.loss_terms.append(LossTerm(value, own))
        return logits[:rows]

    def _second(self, view: str, context: ForwardContext) -> HeadInput:
        """Features of the second view of the running call's rows."""
        if view == "dropout":
            return self.other_view()
        images = context.arguments.get("pixel_values")
        if images is None:
            raise ConfigError(f'second_view="{view}" is for images, and this model got none; take "dropout".')
        return self.other_view(pixel_values=shifted(images))

    def regularisers(self, adapter: str, z: Tensor, f: Tensor) -> Tensor:
        """Weighted sum of the three terms.

        Args:
            adapter: its name.
            z: transformed features of all views (n, width); those of the last view come last.
            f: features of the first view (rows, width), without gradient.
        """
        config, (n, width) = self.configs[adapter], z.shape
        z, f = z.float(), f.float()
        consistency = F.mse_loss(F.normalize(z[-len(f) :], dim=-1), F.normalize(f, dim=-1))
        # One row has no covariance, and its one singular value is all there is.
        centred = (z - z.mean(0)) / math.sqrt(max(n - 1, 1))
        # Products of rows have the same sum of squares as those of channels, and a batch has fewer rows than channels.
        products = centred @ centred.T if n < width else centred.T @ centred
        off_diagonal = products.square().sum() - centred.square().sum(0).square().sum()
        values = torch.linalg.svdvals(z)
        dominant = (values[:_DOMINANT] / values.sum()).mean()
        return (
            config.consistency_weight * consistency
            + config.covariance_weight * off_diagonal / width
            - config.singular_value_weight * dominant
        )


def _uniform(fan_in: int, *shape: int) -> Tensor:
    return torch.empty(shape).uniform_(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))


register_head(METHOD, NMTuneConfig, NMTuneLayer)
