"""Quality scores of images, by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_lab.errors import ConfigError, did_you_mean

#: Function of images (batch, channels, height, width), float32, to scores (batch,); higher is better.
QualityFn = Callable[[Tensor], Tensor]

#: Values of `quality` that are no score of an image.
GIVEN = ("column", "constant")
#: Variance of the Laplacian by that of the image at which sharpness is 0.5. On sign-digits at 32 pixels the median is
#: 1.16, and 0.08 for the same photographs reduced to 12 pixels before; this is about the geometric mean of both.
_MIDDLE = 0.3
_LAPLACIAN = ((0.0, 1.0, 0.0), (1.0, -4.0, 1.0), (0.0, 1.0, 0.0))
_NO_IMAGES = "A call without pixel_values has no {}, so both branches count alike; give quality=constant or column."

_SCORES: dict[str, QualityFn] = {}


def register_quality(name: str, function: QualityFn) -> None:
    """Register a score of images, for `PETALfaceConfig(quality=name)`.

    A program that loads such an adapter registers the score first, because a file names no code.

    Args:
        name: lower-case name; one that is registered already gets the new function.
        function: maps images (batch, channels, height, width) as the model gets them, float32, to scores (batch,)
            about 0 to 1, higher for a better image. It runs once for each call of the model, without gradients.

    Raises:
        ConfigError: the name is no lower-case identifier, or has a meaning of its own.
    """
    if name in GIVEN or not (name.isidentifier() and name.islower()):
        raise ConfigError(f'A score cannot be called "{name}"; take a lower-case identifier, not {" or ".join(GIVEN)}.')
    _SCORES[name] = function


def check_quality(name: str) -> None:
    """Raise `ConfigError` for a value of `quality` that is neither given nor registered."""
    known = (*GIVEN, *_SCORES)
    if name not in known:
        raise ConfigError(
            f'quality="{name}" is no registered score.{did_you_mean(name, known)} Known: {", ".join(known)}; '
            "register_quality adds one."
        )


def score_call(arguments: Mapping[str, Any], name: str) -> Tensor:
    """Compute the scores (batch,) of a call's images.

    Args:
        arguments: the model's arguments by name.
        name: a registered score.

    Returns:
        Scores, float32; one NaN for a call without images.

    Raises:
        ConfigError: the function did not give one score for each image.
    """
    pixels = arguments.get("pixel_values")
    if not isinstance(pixels, Tensor) or pixels.ndim < 4:
        if torch.is_grad_enabled():
            warnings.warn(_NO_IMAGES.format(name), stacklevel=2)
        return torch.full((1,), float("nan"))
    with torch.no_grad():
        # the frames of a video count as one image, one below the other
        images = pixels.float() if pixels.ndim == 4 else pixels.float().flatten(1, -3)
        scores = _SCORES[name](images)
    if scores.shape != pixels.shape[:1]:
        raise ConfigError(
            f'The score "{name}" gave {list(scores.shape)} values for {len(pixels)} images, expected one number each.'
        )
    return scores.float()


def sharpness(images: Tensor) -> Tensor:
    """Variance of the Laplacian, mapped to 0 to 1.

    The paper scores images by CNN-IQA, whose weights come from elsewhere; this takes its place. With v the variance of
    the grey image's Laplacian divided by that of the grey image, the score is v / (v + 0.3). The division makes it
    independent of brightness, contrast and the processor's normalisation; an image of one colour has 0.

    Args:
        images: (batch, channels, height, width), float32.

    Returns:
        Scores (batch,), float32.
    """
    grey = images.mean(1, keepdim=True)
    if min(grey.shape[-2:]) < 3:  # no pixel has four neighbours
        return grey.new_zeros(len(grey))
    edges = F.conv2d(grey, grey.new_tensor(_LAPLACIAN)[None, None])
    spread, sharp = grey.flatten(1).var(1, unbiased=False), edges.flatten(1).var(1, unbiased=False)
    # s / (s + 0.3 v) is v' / (v' + 0.3) for v' = s / v, without a division by a spread of zero
    return sharp / (sharp + _MIDDLE * spread).clamp_min(torch.finfo(torch.float32).tiny)


register_quality("sharpness", sharpness)
