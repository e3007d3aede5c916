"""Runs as a frame and as CSV: whole numbers stay whole, what is not a number is told from what is missing."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.compare_helpers import record

from peft_lab.comparison import Comparison
from peft_lab.comparison.records.run_frame import ENDING, SETTINGS, results_csv, results_frame, run_frame


def test_values_stay_as_they_are_in_the_records() -> None:
    runs = [
        record("lora", 0, measures={"saved_bytes": 70167876}, tuned={"r": [4, 8]}),
        record("head", 1, measures={"ece": float("nan")}),
    ]
    frame = run_frame(runs)
    assert list(frame.columns) == [
        *SETTINGS,
        "tuned_r",
        "test_accuracy",
        "validation_accuracy",
        "ece",
        "saved_bytes",
        *ENDING,
    ]
    assert frame["saved_bytes"].tolist() == [70167876, None]
    assert frame["tuned_r"].tolist() == [[4, 8], None]
    rows = list(csv.DictReader(io.StringIO(results_csv(runs))))
    assert [row["saved_bytes"] for row in rows] == ["70167876", ""]
    assert [row["ece"] for row in rows] == ["", "nan"]
    assert [row["learning_rate"] for row in rows] == ["0.001", "0.001"]


def test_no_runs_are_a_header() -> None:
    assert results_csv([]) == ",".join([*SETTINGS, *ENDING]) + "\n"


def test_a_frame_to_compute_with_has_numbers(tmp_path: Path) -> None:
    runs = [record("lora", seed, score=0.8 + 0.1 * seed) for seed in (0, 1)]
    runs += [record("head", 0, score=None), record("head", 0, "search", measures={})]
    recorded = {"predictor": "the most frequent class", "metrics": {"test": {"accuracy": 0.5}}}
    runs[0].metrics.update(baselines=[recorded], beats_baseline=True, wall_seconds=2.5)
    frame = results_frame(runs)
    assert list(frame.columns[-len(ENDING) :]) == list(ENDING)
    assert frame.groupby("arm")["test_accuracy"].mean()["lora"] == pytest.approx(0.85)
    assert frame["seed"].dtype == np.int64
    assert frame["trainable_parameters"].dtype == np.float64
    assert frame["trainable_parameters"].isna().tolist() == [False, False, True, True]
    assert frame["baseline"].tolist()[0] == 0.5
    assert frame["wall_seconds"].tolist()[0] == 2.5
    assert frame["baseline"].isna().tolist() == [False, True, True, True]
    assert results_frame(runs, "search")["arm"].tolist() == ["head"]
    assert results_frame(runs, "final").index.tolist() == [0, 1, 2]
    assert set(SETTINGS) <= set(results_frame([]).columns)
    assert Comparison(tmp_path, None, runs, []).frame("final").equals(results_frame(runs, "final"))


def test_reading_and_planning_import_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "import peft_lab.comparison.records.results, peft_lab.comparison.run.plan, peft_lab.comparison.study.schema\n"
        "print([name for name in ('torch', 'transformers', 'peft', 'datasets', 'pandas', 'sklearn', 'scipy')"
        " if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
