"""Pixel prompts (ILM-VP): visual prompting by trainable pixels.

Source: Chen et al. 2023, Understanding and Improving Visual Prompting: A Label-Mapping Perspective, arXiv:2211.11635;
Bahng et al. 2022, Exploring Visual Prompts for Adapting Large-Scale Models, arXiv:2203.17274. Written from the papers'
equations.

The pixels make a frozen image classifier solve another task (reprogramming). They stand around the image or on it; the
classifier keeps the head it was trained with, and source classes stand for the target classes
(`peft_lab.adapters.input.pixel_prompt.mapped_head`). Programs:

- `frame` (ILM-VP): the image is shrunk and set into a frame of pixels sigmoid(p), in [0, 1] before normalisation;
- `pad` (Bahng): p is added to the border of the normalised image;
- `full`: p is added to every pixel of the normalised image.

Images come as the model's image processor made them, normalised; resizing and normalising commute, so the frame is
normalised by `image_mean` and `image_std` and the image is left as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_lab.adapters.input.pixel_prompt.mapped_head import MappedHead, MappedHeadConfig, register_mapped_head
from peft_lab.errors import ConfigError, did_you_mean
from peft_lab.tuners import MethodInfo

METHOD = MethodInfo(
    name="pixel_prompt",
    title="Pixel prompts (ILM-VP)",
    paper="2211.11635",
    place="input",
    config="PixelPromptConfig",
    roles=("head",),
    capabilities=("images",),
    learning_rate=1e-1,
    budget=(1.02, 1.02),
)

PROGRAMS = ("frame", "pad", "full")
#: Image size of a model whose config names none.
_IMAGE_SIZE = 224
_LARGEST = 2048
#: Width of the border at 224 pixels: around an image of 128 (ILM-VP), on the image (Bahng).
_BORDERS = {"frame": 48, "pad": 30}


@dataclass
class PixelPromptConfig(MappedHeadConfig):
    """Configuration of pixel prompts.

    Trainable: channels x the pixels of the border, or of the whole image. For an image of side S and a border of width
    p that is 12 p (S - p) with three channels. `backbone_eval` is on by default, as in the authors' code.

    Raises:
        ConfigError: an unknown program or mapping, a size or a statistic out of range; the model is no image
            classifier with a trained linear head, or has fewer classes than the task.
    """

    uses_source_head = True
    authors_backbone_eval = True

    program: str = field(
        default="frame",
        metadata={
            "help": "`frame` (the image, shrunk, in a frame), `pad` (added to its border) or `full` (to all of it).",
            "other": "full",
        },
    )
    border: int | None = field(
        default=None,
        metadata={"help": "Width of the border in pixels; by default the paper's, scaled to the image.", "other": 2},
    )
    inner_size: int | None = field(
        default=None,
        metadata={"help": "Side of the shrunk image in a frame, in the place of `border`.", "other": 8},
    )
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "Side of the image that the model sees; training fills in that of the image processor. Nothing: "
            "that of the model's config, or 224.",
            "most": _LARGEST,
            "untried": "a backbone of one size",
        },
    )
    init_std: float = field(
        default=0.0, metadata={"help": "Parameters start at N(0, std); the paper of `pad` takes 1.", "other": 1.0}
    )
    image_mean: list[float] | None = field(
        default=None,
        metadata={
            "help": "Mean that the image processor subtracts, by channel; training fills it in. By default 0.5.",
            "other": [0.1, 0.2, 0.3],
        },
    )
    image_std: list[float] | None = field(
        default=None,
        metadata={"help": "Divisor by channel; training fills it in. By default 0.5.", "other": [0.1, 0.2, 0.3]},
    )

    def check(self) -> None:
        super().check()
        if self.program not in PROGRAMS:
            raise ConfigError(
                f'program="{self.program}" must be one of {", ".join(PROGRAMS)}.{did_you_mean(self.program, PROGRAMS)}'
            )
        if self.border is not None and (self.program == "full" or self.inner_size is not None):
            other = "inner_size" if self.inner_size is not None else 'program="full"'
            raise ConfigError(f"border={self.border} does not go with {other}; leave one of them out.")
        if self.inner_size is not None and self.program != "frame":
            raise ConfigError(f'inner_size={self.inner_size} is for program="frame", not "{self.program}".')
        for name in ("border", "inner_size", "image_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1.")
        if self.image_size is not None and self.image_size > _LARGEST:
            raise ConfigError(f"image_size={self.image_size} is larger than {_LARGEST}, which no classifier takes.")
        if not 0 <= self.init_std <= 10:
            raise ConfigError(f"init_std={self.init_std} must be between 0 and 10.")
        if self.image_std is not None and not all(value > 0 for value in self.image_std):
            raise ConfigError(f"image_std={self.image_std} must be positive.")


@dataclass(frozen=True)
class Canvas:
    """Area of the trainable pixels on a square image.

    Attributes:
        channels: number of channels.
        size: side of the image.
        inner: side of the square in its middle that has no trainable pixels; 0 for none.
    """

    channels: int
    size: int
    inner: int

    @property
    def before(self) -> int:
        """Width of the border to the left and above."""
        # The odd pixel of a border that cannot be halved goes here.
        return (self.size - self.inner + 1) // 2

    @property
    def after(self) -> int:
        """Width of the border to the right and below."""
        return (self.size - self.inner) // 2

    @property
    def pixels(self) -> int:
        """Number of trainable pixels of a channel."""
        return self.size**2 - self.inner**2

    def image(self, values: Tensor) -> Tensor:
        """Place trainable pixels (channels, pixels) on an image (channels, size, size).

        The image is zero elsewhere.
        """
        # Stored as the strip above, those to the left and right of the inner square, and the strip below.
        rows = (self.before * self.size, self.inner * (self.before + self.after), self.after * self.size)
        above, beside, below = values.split(rows, 1)
        top = above.reshape(self.channels, -1, self.size)
        sides = beside.reshape(self.channels, -1, self.before + self.after)
        bottom = below.reshape(self.channels, -1, self.size)
        left, right = sides.split((self.before, self.after), 2)
        centre = values.new_zeros(self.channels, self.inner, self.inner)
        return torch.cat([top, torch.cat([left, centre, right], 2), bottom], 1)

    def frame(self, images: Tensor) -> Tensor:
        """Shrink images to the inner side and pad them with zeros."""
        return F.pad(resized(images, self.inner), (self.before, self.after, self.before, self.after))


def resized(images: Tensor, size: int) -> Tensor:
    """Resize images (batch, channels, height, width) to a side, in their dtype.

    Images of that side stay as they are.
    """
    if images.shape[-2:] == (size, size):
        return images
    # Bilinear weights add up to 1, so that this commutes with normalisation, and antialiasing needs float32.
    return F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True).to(images.dtype)


class PixelPromptLayer(MappedHead):
    """Head of an image classifier with trainable pixels (channels, pixels)."""

    adapter_layer_names = ("pixel_prompt_program",)
    other_param_names = data_param_names = ("pixel_prompt_mapping",)

    def start(self, adapter: str, config: PixelPromptConfig) -> dict[str, Tensor]:
        canvas = self.canvas(config)
        values = torch.zeros(canvas.channels, canvas.pixels)
        if config.init_std:
            values = config.init_std * torch.randn(values.shape)
        return {"pixel_prompt_program": values}

    def canvas(self, config: PixelPromptConfig) -> Canvas:
        """Canvas of an adapter's pixels on this model's images.

        Raises:
            ConfigError: images are not square, the sizes leave no image or no border, or a statistic is not one number
                for each channel.
        """
        vision = getattr(self.settings, "vision_config", self.settings)
        own: Any = getattr(vision, "image_size", None) or _IMAGE_SIZE
        sides = {own} if isinstance(own, int) else {*own}
        if len(sides) > 1:
            raise ConfigError(
                f'Method "{self.info.name}" prompts square images, and those of this backbone are '
                f"{' x '.join(str(side) for side in own)} pixels; choose another backbone."
            )
        # The border is given, or measured by the inner image, or the paper's at this size.
        size = config.image_size or sides.pop()
        if config.program == "full":
            inner = 0
        elif config.inner_size is not None:
            inner = config.inner_size
        else:
            width = config.border or max(round(_BORDERS[config.program] * size / _IMAGE_SIZE), 1)
            inner = size - 2 * width
        if not (0 < inner < size or config.program == "full"):
            named = f"inner_size={inner}" if config.inner_size is not None else f"border={(size - inner) // 2}"
            raise ConfigError(f"{named} leaves no place for the image or the border on images of {size} pixels.")
        channels = getattr(vision, "num_channels", 3)
        for name in ("image_mean", "image_std"):
            given = getattr(config, name)
            if given is not None and len(given) != channels:
                raise ConfigError(f"{name}={given} must have one number for each of the {channels} channels.")
        return Canvas(channels, size, inner)

    def prompted(self, adapter: str, images: Tensor) -> Tensor:
        config, values = self.configs[adapter], self.pixel_prompt_program[adapter]
        canvas = self.canvas(config)
        # Pixels that are added to the image are in normalised units already.
        if config.program != "frame":
            images = resized(images, canvas.size)
            return images + canvas.image(values).to(images)
        # Those of a frame are colours from 0 to 1, normalised as the image was.
        mean = _column(config.image_mean, canvas.channels, values)
        std = _column(config.image_std, canvas.channels, values)
        border = canvas.image((values.sigmoid() - mean) / std)
        return canvas.frame(images) + border.to(images)


def _column(given: list[float] | None, channels: int, like: Tensor) -> Tensor:
    """Statistic of the image processor as (channels, 1), by default 0.5."""
    return torch.tensor(given or [0.5] * channels, dtype=like.dtype, device=like.device)[:, None]


register_mapped_head(METHOD, PixelPromptConfig, PixelPromptLayer)
