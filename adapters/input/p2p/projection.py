"""Geometry of P2P: neighbours of points, views of a cloud, and the pixels that its points fall on.

Source: Wang et al. 2022, P2P, arXiv:2208.02812, and github.com/wangzy22/P2P (MIT).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

#: Pixels that a point covers, in each direction around its own.
_OFFSETS = (-1, 0, 1)
#: Cells beside the points of the widest axis, which the offsets need.
_MARGIN = 3


def neighbours(clouds: Tensor, count: int) -> Tensor:
    """Numbers of the nearest points of each point, int64 (batch, points, count), the nearest first.

    A point is its own nearest one; clouds (batch, points, 3) with fewer points have all of them.
    """
    # by matrix products, the distance of a point to itself would not be zero
    distances = torch.cdist(clouds, clouds, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.topk(min(count, clouds.shape[1]), largest=False).indices


def turned(clouds: Tensor, up: str, azimuth: Tensor, elevation: Tensor) -> Tensor:
    """Turn clouds (batch, points, 3) about the up axis, then tilt their upper side towards the viewer.

    Args:
        clouds: coordinates x, y, z.
        up: axis that points upwards, "x", "y" or "z".
        azimuth, elevation: angles (batch,) in radians; an elevation of 90 degrees looks down on the cloud.

    Returns:
        Coordinates to the right, upwards and towards the viewer.
    """
    # a cyclic change of axes keeps left and right
    right, height, near = clouds.roll(1 - "xyz".index(up), 2).unbind(2)
    cos, sin = azimuth.cos()[:, None], azimuth.sin()[:, None]
    right, near = cos * right + sin * near, cos * near - sin * right
    cos, sin = elevation.cos()[:, None], elevation.sin()[:, None]
    return torch.stack([right, cos * height - sin * near, cos * near + sin * height], 2)


def grid_cells(views: Tensor, side: int) -> Tensor:
    """Column and row of each point on a grid, int64 (batch, points, 2), from 0 to `side` - 3.

    One step serves both axes, max(range of x, range of y) / (side - 3), so that shapes keep their ratio; the narrower
    axis is centred. Rows count from the top, because the picture stands upright (the paper leaves its turn open).

    Args:
        views: coordinates as `turned` gives them; the third is not looked at.
        side: of the square that the object fills, at least 4.
    """
    plane = views[..., :2] * views.new_tensor([1.0, -1.0])
    low, high = plane.amin(1, keepdim=True), plane.amax(1, keepdim=True)
    last = side - _MARGIN
    step = ((high - low).amax(2, keepdim=True) / last).clamp_min(torch.finfo(plane.dtype).tiny)
    # rounding may carry the last point over the edge
    cells = ((plane - low) / step).floor().long().clamp(0, last)
    return cells + (last - cells.amax(1, keepdim=True)).div(2, rounding_mode="floor")


def splat(cells: Tensor, side: int) -> Tensor:
    """Flat numbers row * side + column of the 3 x 3 pixels that each point covers, int64 (batch, points x 9)."""
    steps = torch.tensor(_OFFSETS, device=cells.device) + 1
    columns = (cells[..., 0, None, None] + steps).expand(*cells.shape[:2], 3, 3)
    rows = (cells[..., 1, None, None] + steps[:, None]).expand(*cells.shape[:2], 3, 3)
    return (rows * side + columns).flatten(1)


def scattered(features: Tensor, cells: Tensor, side: int, size: int) -> Tensor:
    """Sum features (batch, points, channels) at the pixels that the points cover: (batch, channels, size, size).

    Cells are those of `grid_cells` for the square of a side; the border around it is zero.
    """
    batch, _, channels = features.shape
    index = splat(cells, side)[..., None].expand(-1, -1, channels)
    spread = features.repeat_interleave(len(_OFFSETS) ** 2, 1)
    canvas = features.new_zeros(batch, side * side, channels).scatter_add(1, index, spread)
    before = (size - side) // 2
    after = size - side - before
    return F.pad(canvas.mT.reshape(batch, channels, side, side), (before, after, before, after))


def view_angles(ranges: Sequence[Sequence[float]], counts: Sequence[int]) -> Tensor:
    """Angles of the views of an evaluation: the middles of equal parts of each range.

    Args:
        ranges: lowest and highest azimuth, and elevation, in degrees.
        counts: number of azimuths, and of elevations.

    Returns:
        float32 (views, 2), in radians.
    """
    axes = []
    for (low, high), count in zip(ranges, counts, strict=True):
        parts = (torch.arange(count, dtype=torch.float32) + 0.5) / count
        axes.append(torch.deg2rad(low + (high - low) * parts))
    return torch.cartesian_prod(*axes)
