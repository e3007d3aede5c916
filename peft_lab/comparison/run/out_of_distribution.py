"""Out-of-distribution scores of a final run: measures, and the scores of each row for their intervals."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from peft_lab.comparison.records.results import OOD_SCORES
from peft_lab.comparison.records.run import Run
from peft_lab.metrics.out_of_distribution import SCORES, Array, all_scores, auroc, false_positive_rate

#: Rows of the training, of the test rows and of the other task that are looked at.
OOD_ROWS = 1000


def ood_measures(run: Run, place: Path, batch_size: int) -> dict[str, float]:
    """Score test rows of a run's task and rows of its out-of-distribution task, with the adapter on.

    Args:
        run: the run.
        place: its folder, to which the scores of each row are written.
        batch_size: rows of a batch.
    """
    from safetensors.numpy import save_file

    from peft_lab.data.splits import load_splits, subset
    from peft_lab.data.task_registry import load_task
    from peft_lab.loading.load_run import load
    from peft_lab.runs.run_config import RunConfig
    from peft_lab.training.head_outputs import head_outputs
    from peft_lab.training.model_rows import chosen_rows

    loaded, other = load(place), load_task(run.ood)
    config = RunConfig.from_mapping({**run.options, "output_dir": str(place)})
    own_rows = chosen_rows(config, load_splits(loaded.task, test=True), run.seed)
    other_rows = load_splits(other, test=other.has_test)
    parts = {
        "train": (loaded.task, own_rows["train"]),
        "own": (loaded.task, own_rows["test"]),
        "other": (other, other_rows.test or other_rows.validation),
    }
    found = {}
    for name, (task, rows) in parts.items():
        found[name] = head_outputs(loaded, loaded.model, task, subset(rows, OOD_ROWS), batch_size)
    scores = {name: all_scores(found["train"], found[name]) for name in ("own", "other")}
    kept: dict[str, Array] = {}
    for part, by_name in scores.items():
        for name, values in by_name.items():
            kept[f"{name}.{part}"] = np.ascontiguousarray(values, dtype=np.float64)
    save_file(kept, place / OOD_SCORES)
    return measures_of(kept)


def measures_of(scores: Mapping[str, Any]) -> dict[str, float]:
    """AUROC, and false positive rate at 95 % true positives, of each score."""
    found: dict[str, float] = {}
    for name in SCORES:
        own, other = scores[f"{name}.own"], scores[f"{name}.other"]
        found[f"ood_{name}_auroc"] = auroc(own, other)
        found[f"ood_{name}_fpr95"] = false_positive_rate(own, other)
    return found
