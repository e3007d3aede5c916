"""Wall time of a comparison of five heads with features computed once, and without.

    python benchmarks/cached_features.py --output benchmarks/results/cached_features.md

The same study, three seeds and the default search, is made on 2,000 images of CIFAR-10 with EfficientNet-Lite0, in
pairs: with `features: cached` from an empty store, and without. The images are local files below $PEFT_LAB_DATA.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import report  # first: it sets the environment

from peft_lab.comparison import compare
from peft_lab.utils.cache import cache_dir

#: First the one that reads tokens, because what is stored for it serves the others.
METHODS = ("moment_probing", "head", "nmtune", "gda", "knn")
CACHED = {"features": "cached"}


def study(max_steps: int, cached: bool) -> dict[str, Any]:
    """Study of the five methods, with stored features or without."""
    return {
        "name": "cached" if cached else "plain",
        "tasks": [{"task": "local-cifar10-small", "model_name_or_path": "efficientnet-lite0"}],
        "methods": [{"method": name, "training": CACHED} if cached else name for name in METHODS],
        "seeds": 3,
        "search": {"extend": 2},
        "limits": {"max_steps": max_steps},
        "training": {"per_device_train_batch_size": 16, "save_strategy": "no"},
    }


@contextmanager
def empty_store(folder: Path) -> Iterator[None]:
    """Let the cache have its backbones, and no features."""
    folder.mkdir()
    for entry in cache_dir().iterdir():
        if entry.name != "features":
            (folder / entry.name).symlink_to(entry)
    before = os.environ.get("PEFT_LAB_CACHE")
    os.environ["PEFT_LAB_CACHE"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("PEFT_LAB_CACHE")
        if before is not None:
            os.environ["PEFT_LAB_CACHE"] = before


def timed(max_steps: int, cached: bool) -> tuple[float, int]:
    """Seconds and runs of a comparison from an empty store."""
    with tempfile.TemporaryDirectory() as name, empty_store(Path(name) / "cache"):
        start = time.perf_counter()
        done = compare(study(max_steps, cached), Path(name) / "out", workers=1, report=False)
        seconds = time.perf_counter() - start
    if done.failed:
        raise SystemExit(f"{done.failed[0].arm} failed: {done.failed[0].error}")
    return seconds, len(done.records)


def main() -> None:
    """Time the pairs, and publish the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--max_steps", type=int, default=200)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows, ratios = [], []
    for number in range(1, options.pairs + 1):
        seconds, runs = timed(options.max_steps, cached=True)
        slow, slow_runs = timed(options.max_steps, cached=False)
        ratios.append(seconds / slow)
        rows.append([number, f"{seconds:.0f}", runs, f"{slow:.0f}", slow_runs, f"{ratios[-1]:.3f}"])
        print(rows[-1], flush=True)
    table = report.table(["pair", "cached, s", "runs", "without, s", "runs", "ratio"], rows)
    about = f"{', '.join(METHODS)} on 2,000 images of CIFAR-10 with EfficientNet-Lite0, {options.max_steps} steps of "
    about += "16 images, three seeds, three learning rates and up to two beyond them, from an empty store each time."
    middle = f"Median ratio: {statistics.median(ratios):.3f}."
    parts = ["# Features computed once", report.environment("cpu"), about, table, middle]
    report.publish("\n\n".join(parts), options.output)


if __name__ == "__main__":
    main()
