"""Data and backbone of the gallery's page on segmentation: drawn shapes, and a SegFormer without any training."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

SIZE = 64
SHAPES = {"disc": 1, "square": 2, "star": 3}
#: Mean colour of each shape; those of two shapes overlap.
COLOURS = {"disc": (200, 90, 60), "square": (170, 130, 60), "star": (90, 100, 190)}
FOLDER = Path("gallery/image_segmentation")
SPLITS = {"train": 400, "test": 80}


def ground(draw: np.random.Generator) -> Image.Image:
    """Coarse noise of two colours, enlarged."""
    colours, cells = draw.integers(60, 140, (2, 3)), draw.random((6, 6, 1))
    noise = (cells * colours[0] + (1 - cells) * colours[1]).astype(np.uint8)
    return Image.fromarray(noise).resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def outline(shape: str, x: float, y: float, radius: float, turn: float) -> list[tuple[float, float]]:
    """Corners of a square or a star, or points of a disc."""
    count = {"disc": 60, "square": 4, "star": 10}[shape]
    points = []
    for number in range(count):
        length = radius * (0.42 if shape == "star" and number % 2 else 1.0)
        angle = turn + 2 * math.pi * number / count
        points.append((x + length * math.cos(angle), y + length * math.sin(angle)))
    return points


def picture(draw: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """Image of one to three shapes, and its mask, in which later shapes cover earlier ones."""
    image, mask = ground(draw), Image.new("L", (SIZE, SIZE))
    for _ in range(draw.integers(1, 4)):
        shape = str(draw.choice(list(SHAPES)))
        radius, (x, y) = draw.uniform(10, 20), draw.uniform(12, SIZE - 12, 2)
        points = outline(shape, x, y, radius, draw.uniform(0, math.pi))
        colour = draw.normal(COLOURS[shape], 25).clip(0, 255).astype(int)
        ImageDraw.Draw(image).polygon(points, fill=tuple(colour.tolist()))
        ImageDraw.Draw(mask).polygon(points, fill=SHAPES[shape])
    return image, mask


def make_backbone(folder: Path) -> None:
    """Write a SegFormer of 0.2 million parameters, always the same."""
    torch.manual_seed(0)
    stages = {"num_encoder_blocks": 3, "depths": [1, 1, 1], "sr_ratios": [4, 2, 1], "hidden_sizes": [24, 48, 96]}
    patches = {
        "patch_sizes": [7, 3, 3],
        "strides": [4, 2, 2],
        "num_attention_heads": [1, 2, 4],
        "mlp_ratios": [2, 2, 2],
    }
    config = SegformerConfig(**stages, **patches, decoder_hidden_size=48, drop_path_rate=0.0)
    SegformerForSemanticSegmentation(config).save_pretrained(folder)
    SegformerImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    print(f"a model without any training in {folder}")


def main() -> None:
    """Write the folders images and masks of each split, and the backbone."""
    for seed, (split, count) in enumerate(SPLITS.items()):
        draw = np.random.default_rng(seed)
        for part in ("images", "masks"):
            (FOLDER / split / part).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            image, mask = picture(draw)
            image.save(FOLDER / split / "images" / f"{number:03}.jpg", quality=92)
            mask.save(FOLDER / split / "masks" / f"{number:03}.png")
        print(f"{count} images and masks in {FOLDER / split}")
    make_backbone(FOLDER / "base")


if __name__ == "__main__":
    main()
