"""Runs of any registered method, on a tiny backbone and a tiny task that it goes with."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import ViTConfig, ViTForImageClassification

from support.kind_rows import write_task
from support.properties import DRAWS, EVERY, FITTED, IMAGES, KEEPS_HEAD, UNTRAINED
from support.tiny_runs import make_backbone, make_image_backbone, make_image_task, make_task, options

#: Every registered method and baseline that `peft-lab train` trains in steps. Those that read data come last, because
#: a cover takes the first of a place and they are slow.
TRAINABLE = [*(m for m in EVERY if m not in UNTRAINED), *KEEPS_HEAD, "head", "full"]
TRAINABLE += [m for m in UNTRAINED if m not in FITTED]


def options_for(method: str, place: Path, output_dir: Path, **changes: Any) -> dict[str, Any]:
    """Options of a run of a method; backbone and task are made in `place` if they are not there."""
    if method in (*IMAGES, *KEEPS_HEAD):
        backbone, task = place / "vit", place / "images" / "colours.yaml"
        if not backbone.is_dir():
            make_image_task(task.parent)
            make_image_backbone(backbone)
            # methods that keep the head need one that was trained for other labels
            torch.manual_seed(0)
            config = ViTConfig.from_pretrained(backbone, num_labels=7)
            ViTForImageClassification(config).save_pretrained(backbone)
    elif method in DRAWS:
        backbone, task = place / "points-vit", place / "points" / "point_cloud_classification.yaml"
        if not backbone.is_dir():
            write_task(task.parent, "point_cloud_classification")
            make_image_backbone(backbone)
    else:
        backbone, task = place / "bert", place / "texts" / "topics.yaml"
        if not backbone.is_dir():
            make_task(task.parent)
            # with dropout, so that the random state matters
            make_backbone(backbone, dropout=0.2)
    return options(task, backbone, output_dir, **{"method": method, **changes})


def interrupt(finished: Path, copy: Path, step: int) -> Path:
    """Copy of a finished run as if it had been killed after a checkpoint; returns that checkpoint."""
    shutil.copytree(finished, copy)
    for path in copy.iterdir():
        number = path.name.removeprefix("checkpoint-")
        later = number.isdigit() and int(number) > step
        if path.is_dir() and later:
            shutil.rmtree(path)
        elif path.is_file() and path.name not in ("run.yaml", "task.yaml"):
            path.unlink()
    return copy / f"checkpoint-{step}"
