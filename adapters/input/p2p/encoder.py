"""Trained encoder of P2P, which draws the picture of a point cloud.

Source: Wang et al. 2022, P2P, arXiv:2208.02812, and github.com/wangzy22/P2P (MIT). It has 83,683 parameters. The two
last 1 x 1 convolutions follow one another without an activation, as the authors' list of layers has none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_lab.adapters.input.p2p.projection import grid_cells, neighbours, scattered

#: Channels of the features of a point, of its own before its neighbourhood, and groups of the norm.
WIDTH, _OWN, _GROUPS = 64, 8, 4
_SLOPE = 0.2
#: Names of the encoder's parameters, and of the running mean and variance (2, 64) of its two batch norms.
PARAMETERS = (
    *("point_weight", "point_bias", "edge_weight", "edge_norm_weight", "edge_norm_bias", "local_weight", "local_bias"),
    *("conv1_weight", "bn1_weight", "bn1_bias", "conv2_weight", "bn2_weight", "bn2_bias"),
    *("mix_weight", "mix_bias", "colour_weight", "colour_bias"),
)
STATISTICS = ("running_mean", "running_var")


#: Shapes of the weights that are drawn, by layer, and whether the layer has a bias.
_DRAWN = {
    "point": ((_OWN, 3), True),
    "edge": ((WIDTH, 2 * _OWN), False),
    "local": ((WIDTH, WIDTH), True),
    "conv1": ((WIDTH, WIDTH, 3, 3), False),
    "conv2": ((WIDTH, WIDTH, 3, 3), False),
    "mix": ((WIDTH, WIDTH, 1, 1), True),
    "colour": ((3, WIDTH, 1, 1), True),
}


def start_values() -> dict[str, Tensor]:
    """Start values of the encoder's parameters by name, uniform as torch draws those of such layers."""
    found = {}
    for layer, (shape, has_bias) in _DRAWN.items():
        bound = math.prod(shape[1:]) ** -0.5
        found[f"{layer}_weight"] = torch.empty(shape).uniform_(-bound, bound)
        if has_bias:
            found[f"{layer}_bias"] = torch.empty(shape[0]).uniform_(-bound, bound)
    for norm in ("edge_norm", "bn1", "bn2"):
        found |= {f"{norm}_weight": torch.ones(WIDTH), f"{norm}_bias": torch.zeros(WIDTH)}
    return found


def point_features(values: Mapping[str, Tensor], clouds: Tensor, count: int) -> Tensor:
    """Features of the points of clouds (batch, points, 3) by their neighbourhoods, (batch, points, 64).

    The largest of leaky_relu(norm(W [f_k - f_q, f_q])) over the `count` nearest points k of a point q, with f a linear
    map of the coordinates, goes through another linear map.
    """
    own = F.linear(clouds, values["point_weight"], values["point_bias"])
    index = neighbours(clouds, count)
    rows = torch.arange(len(clouds), device=clouds.device)[:, None, None]
    near = own[rows, index]
    centre = own[:, :, None].expand_as(near)
    edges = F.linear(torch.cat([near - centre, centre], -1), values["edge_weight"]).permute(0, 3, 1, 2)
    edges = F.group_norm(edges, _GROUPS, values["edge_norm_weight"], values["edge_norm_bias"])
    largest = F.leaky_relu(edges, _SLOPE).amax(3)
    return F.linear(largest.mT, values["local_weight"], values["local_bias"])


def picture(
    values: Mapping[str, Tensor],
    statistics: Mapping[str, Tensor],
    features: Tensor,
    views: Tensor,
    side: int,
    size: int,
    training: bool,
) -> Tensor:
    """Picture of point features, with colours from 0 to 1, (batch, 3, size, size).

    Args:
        values: parameters by name.
        statistics: running mean and variance; in training those of the batch are taken, and these follow them.
        features: (batch, points, 64).
        views: coordinates of the points as the viewer sees them, (batch, points, 3).
        side: of the square that the object fills.
        size: of the picture.
        training: as of the module.
    """
    # sums of many points need the wide dtype of the values, whatever autocast makes of the features
    wide = features.to(values["conv1_weight"].dtype)
    drawn = scattered(wide, grid_cells(views, side), side, size)
    hidden = F.relu(_batch_norm(values, statistics, 0, F.conv2d(drawn, values["conv1_weight"], padding=1), training))
    hidden = _batch_norm(values, statistics, 1, F.conv2d(hidden, values["conv2_weight"], padding=1), training)
    hidden = F.conv2d(F.relu(hidden + drawn), values["mix_weight"], values["mix_bias"])
    return F.conv2d(hidden, values["colour_weight"], values["colour_bias"]).sigmoid()


def _batch_norm(
    values: Mapping[str, Tensor], statistics: Mapping[str, Tensor], number: int, x: Tensor, training: bool
) -> Tensor:
    weight, bias = values[f"bn{number + 1}_weight"], values[f"bn{number + 1}_bias"]
    stored = [statistics[name][number] for name in STATISTICS]
    mean, variance = (value.to(weight.dtype) for value in stored)
    out = F.batch_norm(x, mean, variance, weight, bias, training)
    # a model that was cast keeps them in a narrower dtype, of which the norm has got a copy
    for value, followed in zip(stored, (mean, variance), strict=True):
        if training and value.dtype != followed.dtype:
            value.copy_(followed)
    return out
