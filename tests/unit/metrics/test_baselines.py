"""What a predictor without input scores, for every kind of task, and what is said of a run that does not beat it."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset
from support.compare_helpers import record
from support.tiny_runs import make_backbone, make_task, options

from peft_lab.cli import demo, runs
from peft_lab.comparison.report.sentences import describe
from peft_lab.comparison.stats.statistics import rank_arms
from peft_lab.data.classification_kind import ClassificationKind
from peft_lab.data.task_registry import kind, parse_task
from peft_lab.metrics import METRICS
from peft_lab.metrics.baselines import Baseline, comparison, shortfall
from peft_lab.registry import list_kinds
from peft_lab.training.run import train

LABELS = ("a", "b", "c")
CLASSES = ([2, 0, 2, 1, 2], [2, 1, 0, 2])
#: Kind, problem type -> answers of train and of the scored rows, and the scores of the predictor.
ANSWERS = {
    ("text_classification", "single_label_classification"): (
        *CLASSES,
        {"accuracy": 0.5, "f1": 2 / 9, "matthews_correlation": 0.0},
    ),
    ("image_classification", "single_label_classification"): (
        *CLASSES,
        {"accuracy": 0.5, "f1": 2 / 9, "matthews_correlation": 0.0},
    ),
    ("text_classification", "regression"): ([1.0, 2.0], [0.0, 1.0, 5.0], {"pearsonr": 0.0, "spearmanr": 0.0}),
    # the first token of a row is no prediction; token 5 is counted 3 + 1 times of 5 + 7
    ("causal_lm", "single_label_classification"): (
        [[-100, 5, 5], [-100, 5, 3, 6]],
        [[-100, 5, 3]],
        {"token_accuracy": 0.5, "perplexity": float(np.exp(-np.log([4 / 12, 2 / 12]).mean()))},
    ),
}


def task_of(name, problem):
    known = list_kinds()[name]
    metrics = known.regression_metrics if problem == "regression" else known.metrics
    values = {"name": "t", "kind": name, "metrics": list(metrics), "data": {"builder": "csv", "files": {"train": "x"}}}
    if known.columns:
        values["columns"] = {column: column for column, needed in known.columns.items() if needed}
        values["problem_type"] = problem
    else:
        values["template"] = {"prompt": "{a} {b}", "answer": "{c}", "required": "([a-z]+)"}
    return parse_task(
        {
            key: value
            for key, value in values.items()
            if key in ("name", "data", "kind", "metrics", "columns", "template") or key in known.settings
        }
    )


@pytest.mark.parametrize(("name", "problem"), ANSWERS)
def test_every_kind_has_a_predictor_that_sees_no_input(name, problem):
    train_answers, scored, expected = ANSWERS[name, problem]
    task, labels = task_of(name, problem), None if name == "causal_lm" or problem == "regression" else LABELS
    rows = [Dataset.from_dict({"labels": answers}) for answers in (train_answers, scored)]
    found = kind(name).baseline(task, labels, *rows)
    assert found.scores == pytest.approx(expected, abs=1e-6)
    # one answer for all rows has no confidence, and writes nothing
    assert {METRICS[metric].takes_probabilities for metric in found.scores if metric in METRICS} <= {False}


def test_every_kind_is_covered_here():
    assert {name for name, _ in ANSWERS} == set(list_kinds())


@pytest.mark.parametrize(
    ("metric", "score", "least", "beats"),
    [
        ("accuracy", 0.6, 0.5, True),
        ("accuracy", 0.5, 0.5, False),
        ("accuracy", None, 0.5, None),
        ("accuracy", 0.5, float("nan"), None),
        ("perplexity", 3.0, 4.0, True),
        ("perplexity", 5.0, 4.0, False),
        ("pearsonr", -0.1, 0.0, False),
    ],
)
def test_the_direction_of_the_main_metric_decides(metric, score, least, beats):
    scores, baselines = {"validation": {metric: score}}, {"validation": Baseline("always the same", {metric: least})}
    found = comparison(scores, baselines, metric)
    assert found["beats_baseline"] is beats
    sentence = shortfall({"metrics": scores, "main_metric": metric, **found})
    assert ("does not beat always the same" in sentence) == (beats is False)
    assert shortfall({"metrics": scores, "main_metric": metric}) == "", "an earlier version recorded none"
    assert comparison(scores, {}, metric) == {"baseline": None, "beats_baseline": None}


def test_a_run_that_does_not_beat_it_says_so_everywhere(tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.setattr(
        ClassificationKind, "baseline", lambda *_: Baseline("the most frequent class", {"accuracy": 1.0})
    )
    task, backbone = make_task(tmp_path / "data"), make_backbone(tmp_path / "bert")
    result = train(options(task, backbone, tmp_path / "out", max_steps=1, save_strategy="no"))
    words = "does not beat the most frequent class, which has 1.0000"
    assert words in caplog.text
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert written["beats_baseline"] is False
    assert written["baseline"]["metrics"]["test"] == {"accuracy": 1.0}
    assert words in (tmp_path / "out" / "README.md").read_text()
    runs._show_metrics(result.metrics, result.output_dir)
    assert words in capsys.readouterr().out.strip().splitlines()[-1]


def test_the_report_names_the_arms_that_do_not_beat_it():
    def arm(label, score, least):
        found = []
        for seed in (0, 1, 2):
            one = record(label, seed, score=score)
            beaten = {"predictor": "the most frequent class", "metrics": {"test": {"accuracy": least}}}
            found.append(replace(one, metrics={**one.metrics, **({"baseline": beaten} if least else {})}))
        return found

    (cell,) = rank_arms(
        [*arm("good", 0.9, 0.5), *arm("bad", 0.5, 0.5), *arm("worse", 0.4, 0.5), *arm("old", 0.1, None)]
    )
    assert "bad and worse do not beat the most frequent class (0.500)." in describe(cell)
    (cell,) = rank_arms(arm("good", 0.9, 0.5))
    assert "beat" not in describe(cell)


@pytest.mark.parametrize(
    "recorded",
    [[], "x", {"metrics": 1}, {"metrics": {"test": None}}, {"metrics": {"test": {"accuracy": "high"}}}],
    ids=str,
)
def test_what_a_stranger_recorded_breaks_nothing(recorded):
    metrics = {"metrics": {"test": {"accuracy": "x"}}, "main_metric": "accuracy", "beats_baseline": False}
    assert shortfall(metrics | {"baseline": recorded}) == ""


def test_the_demo_says_so_after_its_table(tmp_path, monkeypatch, capsys):
    card = "```python\nload\n```"
    metrics = {
        "run": {"model_name_or_path": "minilm"},
        "data": {"rows": {"test": 4}},
        "device": "a CPU",
        "parameters": {"trainable": 1},
        "adapter_bytes": 1,
        "train_seconds": 1.0,
        "wall_seconds": 2.0,
        "peak_memory_bytes": 1,
        "main_metric": "accuracy",
        "metrics": {"test": {"accuracy": 0.2}},
    }
    least = {"test": Baseline("the most frequent class", {"accuracy": 0.5})}
    metrics |= comparison(metrics["metrics"], least, "accuracy")
    monkeypatch.setattr(demo, "forkserver", lambda *_: SimpleNamespace())
    monkeypatch.setattr(demo, "_in_process", lambda *_: metrics)
    (tmp_path / "snips" / "lora-0").mkdir(parents=True)
    (tmp_path / "snips" / "lora-0" / "README.md").write_text(card)
    demo.demo(tmp_path, tasks=["snips"], methods=["lora"])
    assert "lora-0: The test accuracy of 0.2000 does not beat" in " ".join(capsys.readouterr().out.split())
