"""Images and masks of the gallery's page on segmentation: shapes drawn on uneven grounds, by a seed."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIZE = 160
SHAPES = {"disc": 1, "square": 2, "star": 3}
FOLDER = Path("gallery/image_segmentation")
SPLITS = {"train": 240, "test": 60}


def ground(draw: np.random.Generator) -> Image.Image:
    """Coarse noise of two colours, enlarged."""
    colours, cells = draw.integers(0, 256, (2, 3)), draw.random((6, 6, 1))
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
        radius, (x, y) = draw.uniform(24, 52), draw.uniform(30, SIZE - 30, 2)
        points = outline(shape, x, y, radius, draw.uniform(0, math.pi))
        ImageDraw.Draw(image).polygon(points, fill=tuple(draw.integers(0, 256, 3).tolist()))
        ImageDraw.Draw(mask).polygon(points, fill=SHAPES[shape])
    return image, mask


def main() -> None:
    """Write the folders images and masks of each split."""
    for seed, (split, count) in enumerate(SPLITS.items()):
        draw = np.random.default_rng(seed)
        for part in ("images", "masks"):
            (FOLDER / split / part).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            image, mask = picture(draw)
            image.save(FOLDER / split / "images" / f"{number:03}.jpg", quality=92)
            mask.save(FOLDER / split / "masks" / f"{number:03}.png")
        print(f"{count} images and masks in {FOLDER / split}")


if __name__ == "__main__":
    main()
