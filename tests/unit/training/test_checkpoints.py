"""Order of checkpoints under a clock that was set back."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from transformers.trainer_utils import rotate_checkpoints

from peft_lab.training.checkpoints import order_times


@pytest.mark.parametrize("offsets", [(3600, 3500, 10), (-20, 7200, -10), (-30, -20, -10)])
def test_the_newest_checkpoints_are_kept(tmp_path: Path, offsets: tuple[int, ...]) -> None:
    now = time.time()
    for step, offset in zip((8, 9, 10), offsets, strict=True):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        os.utime(folder, (now + offset, now + offset))
    order_times(tmp_path)
    (tmp_path / "checkpoint-11").mkdir()
    rotate_checkpoints(str(tmp_path), save_total_limit=2, use_mtime=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-11"]
