"""Data of the tasks *-half-degraded.yaml and *-degraded.yaml in tasks: images of which half are degraded.

    python benchmarks/degraded_images.py $PEFT_LAB_DATA $PEFT_LAB_DATA/degraded

A degraded image is reduced to 12 x 12 pixels and enlarged to its own size again. In the training rows it is every
second image of a class; the test rows are written twice, sharp and degraded. The column `quality` is 1 for a sharp
image and 0 for a degraded one. Emoji have no test rows of their own: every fifth drawing of a class is taken.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, Value, load_dataset
from PIL.Image import Image as Picture
from PIL.Image import Resampling

SIDE = 12
FEATURES = Features({"image": Image(), "label": Value("int64"), "quality": Value("float32")})

Row = dict[str, Any]


def degraded(image: Picture) -> Picture:
    """Reduce an image to `SIDE` pixels, and enlarge it to its own size again."""
    small = image.convert("RGB").resize((SIDE, SIDE), Resampling.BOX)
    return small.resize(image.size, Resampling.BICUBIC)


def row(image: Picture, label: int, sharp: bool) -> Row:
    """Row of a file: the image as it is, or degraded."""
    return {"image": image.convert("RGB") if sharp else degraded(image), "label": label, "quality": float(sharp)}


def split_off(rows: Dataset) -> tuple[list[Row], list[Row]]:
    """Split rows into training and test rows: every fifth of a class is for testing."""
    seen: Counter[int] = Counter()
    train: list[Row] = []
    test: list[Row] = []
    for found in rows:
        seen[found["label"]] += 1
        (test if seen[found["label"]] % 5 == 0 else train).append(found)
    return train, test


def write(name: str, train: list[Row], test: list[Row], output: Path) -> None:
    """Write the files of a data set: `train`, `sharp` and `degraded`."""
    seen: Counter[int] = Counter()
    mixed: list[Row] = []
    for found in train:
        seen[found["label"]] += 1
        mixed.append(row(found["image"], found["label"], sharp=seen[found["label"]] % 2 == 1))
    files = {
        "train": mixed,
        "sharp": [row(found["image"], found["label"], sharp=True) for found in test],
        "degraded": [row(found["image"], found["label"], sharp=False) for found in test],
    }
    folder = output / name
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in files.items():
        Dataset.from_list(rows, features=FEATURES).to_parquet(folder / f"{split}.parquet")
        print(f"{name}/{split}: {len(rows)} images")


def main() -> None:
    """Read sign digits and emoji, and write the degraded files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder with sign_digits and emoji")
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    signs = options.data / "sign_digits"
    files = {split: str(signs / f"{split}.parquet") for split in ("train", "test")}
    found = load_dataset("parquet", data_files=files)
    write("sign-digits", list(found["train"]), list(found["test"]), options.output)
    drawings = load_dataset("parquet", data_files=str(options.data / "emoji" / "twitter.parquet"), split="train")
    write("emoji", *split_off(drawings), options.output)


if __name__ == "__main__":
    main()
