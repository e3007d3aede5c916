"""What a predictor without input scores, for every kind of task, and what is said of a run that does not beat it."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset
from sklearn.metrics import f1_score, matthews_corrcoef
from support.compare_helpers import record
from support.tiny_runs import make_backbone, make_decoder, make_task, make_writing_task, options

from peft_lab.cli import demo, runs
from peft_lab.comparison.report.sentences import describe
from peft_lab.comparison.stats.statistics import rank_arms
from peft_lab.data.classification_kind import ClassificationKind
from peft_lab.data.task_registry import kind, parse_task
from peft_lab.data.token_kind import TokenKind
from peft_lab.metrics import METRICS
from peft_lab.metrics.baselines import (
    CHANCE,
    UNTOUCHED,
    Baseline,
    baselines_of,
    beside_baselines,
    comparison,
    shortfall,
)
from peft_lab.registry import list_kinds
from peft_lab.training.run import train

LABELS = ("a", "b", "c")
CLASSES = ([2, 0, 2, 1, 2], [2, 1, 0, 2])
# the mean of train is 1.5, the references have a mean of 2 and a sum of squares about it of 14
NUMBERS = (
    [1.0, 2.0],
    [0.0, 1.0, 5.0],
    {"pearsonr": 0.0, "spearmanr": 0.0, "mae": 5.5 / 3, "rmse": (14.75 / 3) ** 0.5, "r2": 1 - 14.75 / 14},
)
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
    ("audio_classification", "single_label_classification"): (
        *CLASSES,
        {"accuracy": 0.5, "f1": 2 / 9, "matthews_correlation": 0.0},
    ),
    ("point_cloud_classification", "single_label_classification"): (
        *CLASSES,
        {"accuracy": 0.5, "f1": 2 / 9, "matthews_correlation": 0.0},
    ),
    # class 1 has most pixels of train; of the scored ones it has two of five that count, and two classes are missed
    ("image_segmentation", "single_label_classification"): (
        [[[1, 1], [0, 255]], [[2, 1], [1, 1]]],
        [[[1, 0], [255, 1]], [[2, 0], [255, 255]]],
        {"mean_iou": (0 + 2 / 5 + 0) / 3, "pixel_accuracy": 2 / 5},
    ),
    ("text_classification", "regression"): NUMBERS,
    ("regression", "regression"): NUMBERS,
    # position 2 is right most often; rows without it get position 0
    ("multiple_choice", "single_label_classification"): (
        [2, 2, 0, 0, 2],
        [2, 1, 0],
        {"accuracy": 2 / 3},
    ),
    # {c} is the most frequent set; it is right for one row of three, and hits two of four labels with three answers
    ("multi_label", "multi_label_classification"): (
        [[2], [0, 1], [2]],
        [[2], [0, 2], [1]],
        {"f1_micro": 4 / 7, "f1_macro": 0.8 / 3, "map": (1 / 3 + 1 / 3 + 2 / 3) / 3, "accuracy": 1 / 3},
    ),
    # the first token of a row is no prediction; token 5 is counted 3 + 1 times of 5 + 7
    ("causal_lm", "single_label_classification"): (
        [[-100, 5, 5], [-100, 5, 3, 6]],
        [[-100, 5, 3]],
        {"token_accuracy": 0.5, "perplexity": float(np.exp(-np.log([4 / 12, 2 / 12]).mean()))},
    ),
    # every token of a target is predicted; token 5 is counted 2 + 1 times of 4 + 7
    ("seq2seq_lm", "single_label_classification"): (
        [[5, 5, 3], [6, -100]],
        [[5, 3, -100]],
        {"token_accuracy": 0.5, "perplexity": float(np.exp(-np.log([3 / 11, 2 / 11]).mean()))},
    ),
    # the tokens of training texts are known, masked or not, but for the tokenizer's own, here 7
    ("masked_lm", "single_label_classification"): (
        [[7, 5, 5, 3, 7], [6]],
        [[-100, 5, 3]],
        {"token_accuracy": 0.5, "perplexity": float(np.exp(-np.log([3 / 11, 2 / 11]).mean()))},
    ),
}
#: Kind -> rows of train and scored rows before preprocessing, for baselines that read them, and the scores.
RAW = {
    # "a" is usually the second tag, which begins an entity, and "c" is new and gets the usual tag
    "token_classification": (
        {"tokens": [["a", "a", "b"], ["a", "b"]], "tags": [[1, 0, 0], [1, 0]]},
        {"tokens": [["a", "c"], ["b", "a"]], "tags": [[1, 1], [0, 1]]},
        {"seqeval_f1": 0.8, "seqeval_precision": 1.0, "seqeval_recall": 2 / 3, "token_accuracy": 0.75},
    ),
    # the whole contexts "a b" and "c", of which the first shares one of two words
    "question_answering": (
        {"context": ["b"], "answers": [{"text": ["b"], "answer_start": [0]}]},
        {
            "context": ["b d", "c"],
            "answers": [{"text": ["b"], "answer_start": [0]}, {"text": ["c"], "answer_start": [0]}],
        },
        {"f1": (2 / 3 + 1) / 2, "exact_match": 0.5},
    ),
}


def task_of(name, problem):
    known = list_kinds()[name]
    metrics = known.regression_metrics if problem == "regression" else known.metrics
    values = {"name": "t", "kind": name, "metrics": list(metrics), "data": {"builder": "csv", "files": {"train": "x"}}}
    if known.columns and not known.forms:
        values["columns"] = {column: column for column, needed in known.columns.items() if needed}
        values["columns"] |= {column: column for column in known.one_of[:1]}
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
    task, labels = task_of(name, problem), LABELS if kind(name).labelled and problem != "regression" else None
    ids = scored
    if name == "multiple_choice":
        # three choices in the first row that is scored, two in the others
        ids = [[[1]] * 3] + [[[1]] * 2] * (len(scored) - 1)
    rows = [Dataset.from_dict({"labels": train_answers, "input_ids": train_answers})]
    rows.append(Dataset.from_dict({"labels": scored, "input_ids": ids}))
    if name == "masked_lm":
        for number, answers in enumerate((train_answers, scored)):
            own = [np.equal(answer, 7).astype(int).tolist() for answer in answers]
            rows[number] = rows[number].add_column("special_tokens_mask", own)
    if name == "image_segmentation":
        rows = [part.with_format("torch") for part in rows]
    found = kind(name).baseline(task, labels, *rows)
    assert found.scores == pytest.approx(expected, abs=1e-6)
    # one answer for all rows has no confidence, and writes nothing
    ours = (set(found.scores) & set(METRICS)) - {"map"}
    assert not any(METRICS[metric].takes_probabilities for metric in ours)


@pytest.mark.parametrize("name", RAW)
def test_baselines_of_raw_rows(name):
    *parts, expected = RAW[name]
    labels = ("O", "B-x") if "tags" in parts[0] else None
    columns = {"tokens": "a", "tags": "b"} if labels else {"question": "a", "context": "b", "answers": "c"}
    data = {"builder": "csv", "files": {"train": "x"}}
    values = {"name": "t", "kind": name, "data": data, "metrics": list(list_kinds()[name].metrics), "columns": columns}
    found = kind(name).baseline(parse_task(values), labels, *(Dataset.from_dict(part) for part in parts))
    assert kind(name).raw_baseline
    assert found.scores == pytest.approx(expected)


def test_every_kind_is_covered_here():
    assert {*RAW, *(name for name, _ in ANSWERS)} == set(list_kinds())


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
    scores, baselines = {"validation": {metric: score}}, {"validation": [Baseline("always the same", {metric: least})]}
    found = comparison(scores, baselines, metric)
    assert found["beats_baseline"] is beats
    sentence = shortfall({"metrics": scores, "main_metric": metric, **found})
    assert ("does not beat always the same" in sentence) == (beats is False)
    assert shortfall({"metrics": scores, "main_metric": metric}) == "", "an earlier version recorded none"
    assert comparison(scores, {}, metric) == {"baselines": [], "beats_baseline": None}


def test_the_best_of_several_baselines_has_to_be_beaten():
    found = {"test": [Baseline("a mean", {"accuracy": 0.3}), Baseline("a base", {"accuracy": 0.6}, seconds=1.5)]}
    scores = {"validation": {"accuracy": 0.9}, "test": {"accuracy": 0.5}}
    metrics = {"metrics": scores, "main_metric": "accuracy", **comparison(scores, found, "accuracy")}
    assert metrics["beats_baseline"] is False
    assert baselines_of(metrics, "test", "accuracy") == [("a base", 0.6), ("a mean", 0.3)]
    assert baselines_of(metrics, "validation", "accuracy") == []
    assert [entry.get("seconds") for entry in metrics["baselines"]] == [None, 1.5]
    words = "The test accuracy of 0.5000 does not beat a base, which has 0.6000; it beats a mean (0.3000)."
    assert beside_baselines(metrics) == shortfall(metrics) == words
    scores["test"]["accuracy"] = 0.7
    metrics |= comparison(scores, found, "accuracy")
    assert metrics["beats_baseline"] is True
    assert shortfall(metrics) == ""
    assert beside_baselines(metrics) == "The test accuracy of 0.7000 beats a base (0.6000) and a mean (0.3000)."


def test_runs_of_earlier_versions_keep_their_baseline():
    recorded = {"baseline": {"predictor": "the mean", "metrics": {"test": {"pearsonr": 0.0}}}}
    assert baselines_of(recorded, "test", "pearsonr") == [("the mean", 0.0)]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_chance_is_the_mean_of_many_uniform_guesses(count):
    """Against drawn guesses, metric by metric, with scikit-learn's own functions."""
    draw = np.random.default_rng(0)
    wanted = draw.choice(count, 4000, p=np.arange(1, count + 1) / sum(range(1, count + 1)))
    task, labels = task_of("text_classification", "single_label_classification"), tuple("abcde"[:count])
    found = kind("text_classification").chance(task, labels, Dataset.from_dict({"labels": wanted.tolist()}))
    assert found.predictor == CHANCE
    assert found.scores["accuracy"] == pytest.approx(1 / count)
    guesses = draw.integers(0, count, 4000)
    average = "binary" if count == 2 else "macro"
    expected = {
        "f1": f1_score(wanted, guesses, average=average),
        "matthews_correlation": matthews_corrcoef(wanted, guesses),
    }
    assert {name: found.scores[name] for name in expected} == pytest.approx(expected, abs=0.03)
    regression = task_of("text_classification", "regression")
    assert kind("text_classification").chance(regression, None, Dataset.from_dict({"labels": [0.5]})) is None


def test_the_base_is_scored_for_every_kind_that_predicts_tokens_by_its_head():
    for name, info in list_kinds().items():
        assert info.source_head == isinstance(kind(name), TokenKind), name


@pytest.mark.full
def test_the_base_without_an_adapter_is_scored_once_and_changes_nothing(tmp_path):
    """Its scores are those of the base evaluated by itself, and the training is the same as without."""
    task, base = make_writing_task(tmp_path / "texts"), make_decoder(tmp_path / "llama")
    given = options(task, base, tmp_path / "run", max_steps=2, save_strategy="no", per_device_eval_batch_size=4)
    metrics = train(given).metrics
    (untouched,) = [entry for entry in metrics["baselines"] if entry["predictor"] == UNTOUCHED]
    assert untouched["seconds"] > 0
    assert set(untouched["metrics"]) == {"test"}, "the rows that decide, and no others"
    # a run without a step has the base's own scores
    start = train(given | {"output_dir": str(tmp_path / "start"), "learning_rate": 0.0, "max_steps": 1}).metrics
    assert untouched["metrics"]["test"] == pytest.approx(start["metrics"]["test"], rel=1e-5)
    assert start["beats_baseline"] is False
    # without test rows there is nothing to compare, so a search pays nothing for it
    silent = train(given | {"output_dir": str(tmp_path / "silent"), "do_predict": False}).metrics
    assert UNTOUCHED not in [entry["predictor"] for entry in silent["baselines"]]
    assert silent["metrics"]["validation"] == metrics["metrics"]["validation"]


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
    assert written["baselines"][0]["metrics"]["test"] == {"accuracy": 1.0}
    assert written["baselines"][1] == {
        "predictor": CHANCE,
        "metrics": {split: {"accuracy": pytest.approx(1 / 3)} for split in ("validation", "test")},
    }
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
    # the rows are the same for an arm whose runs are of an earlier version
    assert "bad, worse and old do not beat the most frequent class (0.500)." in describe(cell)
    (cell,) = rank_arms([*arm("good", 0.9, 0.5), *arm("fair", 0.8, 0.5)])
    assert describe(cell).endswith("Every arm beats the most frequent class (0.500).")
    (cell,) = rank_arms([*arm("bad", 0.5, 0.5), *arm("worse", 0.4, 0.5)])
    assert describe(cell).endswith("No arm beats the most frequent class (0.500).")
    (cell,) = rank_arms(arm("old", 0.9, None))
    assert "beat" not in describe(cell)


def test_an_interval_that_includes_the_baseline_is_told():
    recorded = {"predictor": "the most frequent class", "metrics": {"test": {"accuracy": 0.5}}}
    runs = []
    for seed, score in enumerate((0.45, 0.55, 0.62)):
        one = record("near", seed, score=score)
        runs.append(replace(one, metrics={**one.metrics, "baselines": [recorded]}))
    assert "It beats the most frequent class (0.500). The interval of near includes that score." in describe(
        rank_arms(runs)[0]
    )


@pytest.mark.parametrize(
    "recorded",
    [[], "x", [1, None], {"metrics": 1}, {"metrics": {"test": None}}, {"metrics": {"test": {"accuracy": "high"}}}],
    ids=str,
)
def test_what_a_stranger_recorded_breaks_nothing(recorded):
    metrics = {"metrics": {"test": {"accuracy": "x"}}, "main_metric": "accuracy", "beats_baseline": False}
    for key in ("baseline", "baselines"):
        assert shortfall(metrics | {key: recorded}) == ""


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
    least = {"test": [Baseline("the most frequent class", {"accuracy": 0.5})]}
    metrics |= comparison(metrics["metrics"], least, "accuracy")
    monkeypatch.setattr(demo, "forkserver", lambda *_: SimpleNamespace())
    monkeypatch.setattr(demo, "_in_process", lambda *_: metrics)
    (tmp_path / "snips" / "lora-0").mkdir(parents=True)
    (tmp_path / "snips" / "lora-0" / "README.md").write_text(card)
    demo.demo(tmp_path, tasks=["snips"], methods=["lora"])
    assert "lora-0: The test accuracy of 0.2000 does not beat" in " ".join(capsys.readouterr().out.split())
