"""The card of a comparison's run: mean and interval over seeds and test rows, in every place where scores stand."""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from support.compare_helpers import record
from support.tiny_runs import make_backbone, make_task, options

from peft_lab.comparison.records.results import RESULTS, read_predictions, read_results
from peft_lab.comparison.report.report import write_report
from peft_lab.comparison.report.run_standing import write_standing_in
from peft_lab.comparison.stats.statistics import ArmResult, rank_arms
from peft_lab.errors import ConfigError
from peft_lab.hub.public_copy import stage
from peft_lab.runs.standing import STANDING, read_standing
from peft_lab.training.run import train


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of two arms and three seeds, of which one run was trained and the others are made after it."""
    folder = tmp_path_factory.mktemp("study")
    task, backbone = make_task(folder / "data"), make_backbone(folder / "bert")
    own = folder / "runs" / "own"
    metrics = json.loads(json.dumps(train(options(task, backbone, own, max_steps=20, seed=0)).metrics, default=str))
    search = {"validation": metrics["metrics"]["validation"]}
    runs = [record("pair", 0, "search", metrics=metrics | {"metrics": search}, folder="runs/search")]
    for seed in (0, 1, 2):
        like = metrics | {"seed": seed, "train_seconds": metrics["train_seconds"] + seed}
        runs.append(record("pair", seed, metrics=like, folder="runs/own" if not seed else f"runs/other-{seed}"))
        less = {"test": {"accuracy": 0.01 * seed, "loss": 3.0}}
        runs.append(record("none", seed, metrics=like | {"metrics": less, "train_seconds": 0.1}, folder="runs/none"))
        if seed:
            (folder / "runs" / f"other-{seed}").mkdir()
            shutil.copy(own / "items.csv", folder / "runs" / f"other-{seed}" / "items.csv")
    runs = [dataclasses.replace(run, backbone=str(backbone)) for run in runs]
    (folder / RESULTS).write_text("".join(json.dumps(dataclasses.asdict(run)) + "\n" for run in runs))
    write_report(folder)
    return folder


def arm_of(study: Path) -> ArmResult:
    arm = rank_arms(read_results(study), partial(read_predictions, study))[0].arm("pair")
    assert arm is not None
    assert arm.score.basis == "seeds and rows"
    return arm


def staged(run: Path, out: Path, comparison: Path | None = None) -> str:
    out.mkdir()
    if comparison is not None:
        write_standing_in(run, comparison)
    stage(run, "someone/name", out, base_model="org/base")
    return (out / "README.md").read_text()


def test_the_card_states_mean_and_interval_of_the_arm(study: Path, tmp_path: Path) -> None:
    text, score = staged(study / "runs" / "own", tmp_path / "out"), arm_of(study).score
    assert 'This is the run with seed 0 of the arm pair in the study "study", words: ' in text
    assert f"mean accuracy {score.value:.4f} of 3 seeds (95 % interval {score.low:.4f} to {score.high:.4f} " in text
    assert "over seeds and test rows). Of all arms there, pair has the highest mean accuracy" in text
    assert "better than none at the 5 % level" in text
    (entry,) = (one for one in ModelCard(text).data.eval_results if "mean" in one.metric_name)
    assert (entry.metric_value, entry.dataset_split) == (pytest.approx(score.value), "test")
    assert entry.metric_args["interval_95"] == pytest.approx([score.low, score.high])
    assert (entry.metric_args["study"], entry.metric_args["seeds"]) == ("study", [0, 1, 2])
    for path in (tmp_path / "out").iterdir():
        assert str(study).encode() not in path.read_bytes(), path


@pytest.mark.full
def test_a_run_elsewhere_needs_its_comparison_named(study: Path, tmp_path: Path) -> None:
    """A folder with the runs, or a copy of the comparison that was made to be shared."""
    copy = tmp_path / "renamed"
    shutil.copytree(study / "runs" / "own", copy)
    (copy / STANDING).unlink()
    plain = staged(copy, tmp_path / "plain")
    assert "study" not in plain
    assert staged(copy, tmp_path / "named", comparison=study) == staged(study / "runs" / "own", tmp_path / "own")
    write_report(study, tmp_path / "shared")
    shared = staged(copy, tmp_path / "from-shared", comparison=tmp_path / "shared")
    assert "over seeds alone). Of all arms" in shared
    (tmp_path / "nothing").mkdir()
    for wrong, said in ((tmp_path / "nothing", "holds no results"), (study, "none of the final runs")):
        metrics = json.loads((copy / "metrics.json").read_text()) | {"train_seconds": 9e9}
        (copy / "metrics.json").write_text(json.dumps(metrics))
        with pytest.raises(ConfigError, match=said):
            staged(copy, tmp_path / f"out-{said[:4]}", comparison=wrong)


def test_only_final_runs_with_a_score_have_a_standing(study: Path) -> None:
    found = {path.parent.name for path in study.glob(f"runs/*/{STANDING}")}
    assert found == {"own", "other-1", "other-2"}
    assert read_standing(study) is None


@pytest.mark.parametrize("values", [{}, {"study": "x"}, {"seeds": 3}])
def test_a_standing_of_another_shape_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / STANDING).write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="no standing of a run"):
        read_standing(tmp_path)


def test_evaluation_results_name_the_mean_in_their_notes(study: Path, tmp_path: Path) -> None:
    """Their value stays that of the model that was pushed."""
    copy = tmp_path / "copy"
    shutil.copytree(study / "runs" / "own", copy, ignore=shutil.ignore_patterns("task.yaml"))
    metrics = json.loads((copy / "metrics.json").read_text())
    metrics["run"] |= {"task": "glue-rte", "model_name_or_path": "org/base"}
    (copy / "metrics.json").write_text(json.dumps(metrics))
    staged(copy, tmp_path / "out", comparison=study)
    text = (tmp_path / "out" / ".eval_results" / "glue-rte.yaml").read_text()
    (entry,) = parse_eval_result_entries(yaml.safe_load(text))
    assert entry.value == metrics["metrics"]["test"]["accuracy"]
    score = arm_of(study).score
    assert f'arm pair in the study "study": mean accuracy {score.value:.4f} of 3 seeds (95 % interval' in entry.notes
