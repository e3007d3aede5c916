"""Task vectors of the studies of aTLAS: LoRA adapters of three source tasks on MiniLM, and of three on the small ViT.

    python benchmarks/atlas_vectors.py           # writes runs/atlas-vectors/{banking77,sst2,emoji-captions}
    python benchmarks/atlas_vectors.py images    # writes runs/atlas-vectors/{sign-digits,bccd-cells,emoji}

LoRA acts on all linear layers of the blocks, as in the paper's experiments with LoRA vectors (arXiv 2407.02880, D.7).
The sources are chosen before the target is looked at, and none of the target's rows is read. A source whose folder is
there and finished is not trained again.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import report  # first: it sets the environment

from peft_lab.training.run import train

HERE = Path(__file__).parent
#: Backbone and sources, folder of a vector -> its task, by the target's kind of data.
SOURCES = {
    "texts": (
        "minilm",
        {
            "banking77": "local-banking77",
            "sst2": "local-sst2-sentences",
            "emoji-captions": str(HERE / "tasks" / "emoji-captions.yaml"),
        },
    ),
    "images": (
        "${PEFT_LAB_DATA}/vit-mini-cifar10",
        {"sign-digits": "sign-digits", "bccd-cells": "local-bccd-cells", "emoji": "local-emoji-twitter"},
    ),
}
RATE, STEPS, BATCH, SEED = 3e-3, 100, 16, 0
LORA = {"r": 8, "target_modules": r".*\.layers?\.\d+\..*(query|key|value|dense|_proj|fc[12])"}


def main() -> None:
    """Train the adapters and print how well each does its own task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=SOURCES, nargs="?", default="texts", help="what the target's rows are (texts)")
    parser.add_argument("output", type=Path, nargs="?", default=Path("runs/atlas-vectors"))
    parser.add_argument("--steps", type=int, default=STEPS, help=f"steps of {BATCH} rows for each source ({STEPS})")
    options = parser.parse_args()
    print(report.environment("cpu"))
    backbone, sources = SOURCES[options.data]
    for name, task in sources.items():
        start = time.perf_counter()
        metrics = train(
            task=task,
            model_name_or_path=backbone,
            method="lora",
            method_args=LORA,
            output_dir=str(options.output / name),
            learning_rate=RATE,
            max_steps=options.steps,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=64,
            max_eval_samples=300,
            save_strategy="no",
            do_predict=False,
            seed=SEED,
            disable_tqdm=True,
        ).metrics
        score = metrics["metrics"]["validation"]["accuracy"]
        print(f"{name}: validation accuracy {score:.3f}, {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
