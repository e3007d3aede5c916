"""What is measured of a run: items of the test rows, calibration, another task's rows, forgetting, time, cost."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from support import tiny_runs
from support.compare_helpers import tiny_study

from peft_lab.comparison.records.measure_table import MEASURES
from peft_lab.comparison.records.run import Run
from peft_lab.comparison.run.measures import calibration_error, curves, measure
from peft_lab.comparison.run.plan import arm_runs
from peft_lab.comparison.study.schema import load_study
from peft_lab.errors import ConfigError, TaskError
from peft_lab.metrics.predictions import Predictions, read_predictions
from peft_lab.training import step_timer
from peft_lab.training.run import train


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("measures")


def final_run(place: Path, method: Any, **changes: Any) -> Run:
    study = load_study(tiny_study(place, methods=[method], seeds=1, **changes))
    (run,) = next(arm_runs(study, study.cells[0], study.arms[0]))
    return run


def measured(run: Run, out: Path) -> tuple[dict[str, Any], dict[str, float]]:
    metrics = train({**run.options, "output_dir": str(out)}).metrics
    return metrics, measure(run, out, metrics)


def test_measures_of_a_classifier(place: Path, tmp_path: Path) -> None:
    task = str(place / "task" / "topics.yaml")
    run = final_run(place, "lora", measures={"shifted": task, "control": task}, limits={"max_steps": 30})
    metrics, found = measured(run, tmp_path)
    assert set(found) == {name for name in MEASURES if not name.startswith("ood_")}
    assert found["shifted_score"] == metrics["metrics"]["test"]["accuracy"]
    assert found["shifted_drop"] == 0
    assert found["trainable_parameters"] - found["adapter_parameters"] == 33 * 3
    assert found["step_flops"] > 0
    assert found["saved_bytes"] > 0
    assert 0 < found["step_seconds"] < found["train_seconds"]
    assert found["forgetting"] == pytest.approx(found["control_before"] - found["control_after"])
    assert found["control_before"] != found["control_after"]
    items = read_predictions(tmp_path / "items.csv")
    assert items.correct is not None
    assert items.correct.mean() == metrics["metrics"]["test"]["accuracy"]
    rows = list(csv.DictReader((place / "task" / "test.csv").open()))
    names = sorted({row["topic"] for row in rows})
    assert [names[int(index)] for index in items.columns["reference"]] == [row["topic"] for row in rows]
    assert found["ece"] == pytest.approx(calibration_error(items))
    assert [step for step, _ in curves(tmp_path)["loss"]][-1] == 30


def test_a_linear_probe_forgets_nothing(place: Path, tmp_path: Path) -> None:
    task = str(place / "task" / "topics.yaml")
    _, found = measured(final_run(place, "head", measures={"control": task}), tmp_path)
    assert found["forgetting"] == 0
    assert found["control_before"] > 1 / 3
    assert found["adapter_parameters"] == 0


@pytest.mark.full
def test_full_training_is_measured_against_the_base_that_it_started_from(place: Path, tmp_path: Path) -> None:
    task = str(place / "task" / "topics.yaml")
    changes = {"measures": {"control": task}, "limits": {"max_steps": 20}, "training": {"use_cpu": True}}
    _, probe = measured(final_run(place, "head", measures={"control": task}), tmp_path / "probe")
    _, found = measured(final_run(place, "full", **changes), tmp_path / "full")
    assert found["control_before"] == probe["control_before"]
    assert found["control_after"] != found["control_before"]


def test_measures_of_written_answers(tmp_path: Path) -> None:
    task = tiny_runs.make_writing_task(tmp_path / "writing")
    backbone = tiny_runs.make_decoder(tmp_path / "decoder")
    entry = {"task": str(task), "model_name_or_path": str(backbone), "control": str(task)}
    arm = {"method": "lora", "learning_rates": [0.03]}
    run = final_run(tmp_path, arm, tasks=[entry], limits={"max_steps": 20})
    metrics, found = measured(run, tmp_path / "run")
    items = read_predictions(tmp_path / "run" / "items.csv")
    assert items.output_type == "causal_lm"
    loss = items.columns["loss"].sum() / items.columns["tokens"].sum()
    assert np.exp(loss) == pytest.approx(metrics["metrics"]["test"]["perplexity"], rel=1e-4)
    assert found["control_after"] == pytest.approx(loss, rel=1e-4)
    assert found["forgetting"] < -0.1  # the control rows are the ones it has learnt
    assert "ece" not in found


def test_calibration_error_by_hand() -> None:
    columns = {
        "reference": np.array([0.0, 0, 1, 1]),
        "prediction": np.array([0.0, 1, 1, 1]),
        "confidence": np.array([0.9, 0.9, 0.6, 1.0]),
    }
    # bins of width 1/2: all four rows in the upper one
    assert calibration_error(Predictions("classification", columns), bins=2) == pytest.approx(abs(3 / 4 - 0.85))
    # of width 1/10: {0.9, 0.9, 1.0} and {0.6}
    assert calibration_error(Predictions("classification", columns), bins=10) == pytest.approx((0.8 + 0.4) / 4)


def test_training_ends_with_the_time(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock on which every step takes an eighth of a second, however fast the machine is."""
    ticks = itertools.count(step=0.125)
    monkeypatch.setattr(step_timer, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    run = final_run(place, "lora", limits={"seconds": 1.0}, training={"logging_steps": 1, "use_cpu": True})
    metrics = train({**run.options, "output_dir": str(tmp_path)}).metrics
    assert metrics["global_step"] == 8
    assert metrics["step_seconds"] == 0.125
    rates = [rate for _, rate in curves(tmp_path)["learning_rate"]]
    # after the warm-up, a tenth of the time, the rate falls to 0 with the time that is left
    assert rates[2:] == pytest.approx([run.learning_rate * (1 - step / 8) / 0.9 for step in range(1, 7)])


def test_examples_of_each_class_are_drawn_by_the_seed(place: Path, tmp_path: Path) -> None:
    from peft_lab.data.splits import load_splits, per_class
    from peft_lab.data.task_registry import load_task

    rows = load_splits(load_task(place / "task" / "topics.yaml")).train
    few = per_class(rows, 4, seed=0)
    assert np.bincount(few["label"][:]).tolist() == [4, 4, 4]
    assert few["text"][:] == per_class(rows, 4, seed=0)["text"][:]
    assert few["text"][:] != per_class(rows, 4, seed=1)["text"][:]
    run = final_run(place, "lora", training={"examples_per_class": 4, "use_cpu": True})
    assert train({**run.options, "output_dir": str(tmp_path)}).metrics["data"]["rows"]["train"] == 12


def test_examples_of_each_class_need_classes(place: Path, tmp_path: Path) -> None:
    task = tiny_runs.make_writing_task(tmp_path / "writing")
    with pytest.raises(TaskError, match="has no classes"):
        train(tiny_runs.options(task, place / "backbone", tmp_path / "run", examples_per_class=4))
    with pytest.raises(ConfigError, match="give one of them"):
        train(tiny_runs.options(task, place, tmp_path / "run", examples_per_class=4, max_train_samples=4))


def test_a_task_file_names_its_further_tasks(place: Path) -> None:
    tiny_study(place)
    values = yaml.safe_load((place / "task" / "topics.yaml").read_text())
    (place / "task" / "further.yaml").write_text(
        yaml.safe_dump({**values, "name": "further", "shifted": "topics.yaml"})
    )
    entry = {"task": str(place / "task" / "further.yaml"), "model_name_or_path": "minilm"}
    study = load_study(tiny_study(place, tasks=[entry]))
    assert study.cells[0].shifted == str(place / "task" / "topics.yaml")


def test_items_of_a_regression_of_any_number_of_rows() -> None:
    from transformers import EvalPrediction

    from peft_lab.data.task_registry import kind

    for rows in (1, 3):
        values = np.arange(rows, dtype=np.float32)
        items = kind("text_classification").row_predictions(EvalPrediction(values[:, None] + 0.5, values), Any)
        assert items is not None
        assert items.output_type == "regression"
        assert items.columns["prediction"].tolist() == (values + 0.5).tolist()
        assert items.columns["reference"].tolist() == values.tolist()
        assert items.correct is None
