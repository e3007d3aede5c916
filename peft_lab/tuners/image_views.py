"""Views of images, changed at random, for losses that compare two views of a row."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: Part of an image's side by which it is shifted at most.
_SHIFT = 1 / 8


def shifted(images: Tensor) -> Tensor:
    """Shift each image (batch, channels, height, width) at random, its border reflected."""
    height, width = images.shape[-2:]
    down, right = max(int(height * _SHIFT), 1), max(int(width * _SHIFT), 1)
    padded = F.pad(images, (right, right, down, down), mode="reflect")
    found = []
    for image in padded:
        top, left = int(torch.randint(2 * down + 1, ())), int(torch.randint(2 * right + 1, ()))
        found.append(image[:, top : top + height, left : left + width])
    return torch.stack(found)
