"""Multi-label tasks: how answers may be written, thresholds, and the metrics beside scikit-learn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Sequence as ListOf
from sklearn.metrics import f1_score, precision_recall_curve
from support.kind_rows import write_task
from support.tiny_runs import make_backbone, options
from transformers import EvalPrediction

from peft_lab.data.splits import load_splits
from peft_lab.data.task_registry import kind, parse_task
from peft_lab.errors import ConfigError, TaskError
from peft_lab.loading.load_run import load
from peft_lab.metrics import METRICS
from peft_lab.metrics.multi_label import best_thresholds, f1_macro, mean_average_precision
from peft_lab.metrics.per_row import jackknife_values
from peft_lab.training.evaluate import evaluate, predict
from peft_lab.training.run import train

NAMES = ("food", "music", "rain")
LISTS = [["rain"], [], ["music", "rain"], ["food"], ["rain", "food"], ["music"], ["rain"], []] * 2


def task_of(folder: Path, answers: list[Any], builder: str = "json", **changes: Any) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"text": f"text {number}", "topics": answer} for number, answer in enumerate(answers)]
    if builder == "json":
        (folder / "train.json").write_text(json.dumps(rows))
    else:
        lines = ["text,topics", *(f'{row["text"]},"{row["topics"]}"' for row in rows)]
        (folder / "train.csv").write_text("\n".join(lines))
    data = {"builder": builder, "files": {"train": f"train.{builder}"}}
    values = {"name": "t", "kind": "multi_label", "data": data, "columns": {"text": "text", "labels": "topics"}}
    return parse_task({**values, "validation_fraction": 0.25, **changes}, folder / "task.yaml")


def answers_of(task: Any) -> dict[str, list[str]]:
    splits = load_splits(task)
    found = {}
    for rows in (splits.train, splits.validation):
        for text, numbers in zip(rows["text"][:], rows["labels"][:], strict=True):
            found[text] = [splits.labels[number] for number in numbers]
    return found


@pytest.mark.parametrize(
    ("written", "builder", "changes"),
    [
        (LISTS, "json", {}),
        ([";".join(names) for names in LISTS], "json", {"label_separator": ";"}),
        ([" | ".join(names) for names in LISTS], "csv", {"label_separator": "|"}),
        ([[NAMES.index(name) for name in names] for names in LISTS], "json", {"labels": list(NAMES)}),
    ],
    ids=["lists", "separated text", "csv with spaces", "positions"],
)
def test_all_forms_of_answers_mean_the_same(written: Any, builder: str, changes: Any, tmp_path: Path, caplog) -> None:
    task = task_of(tmp_path, written, builder, **changes)
    found = answers_of(task)
    assert found == {f"text {number}": sorted(names) for number, names in enumerate(LISTS)}
    assert load_splits(task).labels == NAMES
    assert "4 train rows have no label in column" in caplog.text, "an empty list is an answer, and is said"


def test_declared_classes_keep_their_order(tmp_path: Path) -> None:
    features = Features(text=Value("string"), topics=ListOf(ClassLabel(names=["rain", "music", "food"])))
    rows = {"text": [f"text {n}" for n in range(16)], "topics": LISTS}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    data = {"builder": "parquet", "files": {"train": "train.parquet"}}
    task = task_of(tmp_path, LISTS).model_copy(update={"data": task_of(tmp_path, [], data=data).data})
    assert answers_of(task)["text 4"] == ["food", "rain"]


@pytest.mark.parametrize(
    ("answers", "changes", "words"),
    [
        (["rain;food"] * 8, {}, "say what stands between the names of a cell, such as \"label_separator: ';'\""),
        (["a"] * 8, {"label_separator": ";"}, "has 1 different labels; name another column"),
        (LISTS, {"label_separator": ";"}, '"label_separator" has no meaning; remove it'),
        ([["rain", " "], *LISTS[1:]], {}, r"1 train rows have a blank label in column \"topics\" \(row 1 of 16\)"),
        (["rain;;food", *["rain;food"] * 9], {"label_separator": ";"}, "have a blank label"),
        ([None, *LISTS[1:]], {}, r"1 train rows have no value in column \"topics\" \(row 1 of 16\)"),
        ([["rain "], *LISTS[1:]], {}, 'the label "rain " of the train rows has a space at its edge'),
        (LISTS, {"labels": ["rain", "food", "musik"]}, '"music" of the train rows is not one of.*Did you mean "musik"'),
        ([[3]] * 8, {"labels": ["a", "b"]}, '"3" of the train rows is not one of a, b'),
    ],
)
def test_what_is_no_list_of_labels_is_refused(answers: Any, changes: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=words) as raised:
        load_splits(task_of(tmp_path, answers, **changes))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"thresholds": 1.5}, "the threshold must be a number between 0 and 1, not 1.5"),
        ({"thresholds": "best"}, "not 'best'; \"thresholds\" is one for all labels"),
        ({"thresholds": {"rain": 0}}, 'the threshold of label "rain" must be'),
        ({"thresholds": {"rein": 0.3}, "labels": list(NAMES)}, 'names "rein", which is no label. Did you mean "rain"'),
        ({"image_size": 32}, '"image_size" has no meaning for a task that reads texts'),
        (
            {"columns": {"image": "i", "labels": "topics"}, "max_length": 9},
            '"max_length" has no meaning for a task that',
        ),
        ({"columns": {"labels": "topics"}}, 'either "text" or "image"'),
        ({"metrics": ["f1"]}, 'metric "f1" does not fit this kind of task; fitting: f1_micro'),
    ],
)
def test_a_task_that_cannot_be_is_refused(changes: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=words):
        task_of(tmp_path, LISTS, **changes)


def test_a_stream_needs_the_names_of_its_labels(tmp_path: Path) -> None:
    # JSON lines, which can be streamed
    task = task_of(tmp_path, LISTS, data={"builder": "json", "files": {"train": "rows.jsonl"}})
    lines = [json.dumps({"text": f"text {n}", "topics": names}) for n, names in enumerate(LISTS)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    streamed = task.model_copy(update={"streaming": True, "validation_rows": 4, "validation_fraction": 0.1})
    with pytest.raises(TaskError, match='a stream does not know all labels of its rows; list them in "labels"'):
        load_splits(streamed)
    splits = load_splits(streamed.model_copy(update={"labels": NAMES}))
    assert splits.validation["labels"][:] == [[2], [], [1, 2], [0]]
    assert next(iter(splits.train))["labels"] in [[0], [1], [2], [], [0, 2], [1, 2]]


def draw(rows: int = 40, labels: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(rows)
    reference = (rng.random((rows, labels)) < [0.5, 0.2, 0.05, 0.9, 0.0][:labels]).astype(int)
    # with ties
    return reference, np.round(0.5 * reference + rng.random((rows, labels)), 1) / 1.5


def test_metrics_without_each_row_equal_those_computed_anew() -> None:
    reference, scores = draw()
    predicted = (scores >= 0.5).astype(int)
    for function, metric, given in ((f1_macro, "f1_macro", predicted), (mean_average_precision, "map", scores)):
        value, without = function(reference, given)
        compute = METRICS[metric].function
        assert value == pytest.approx(compute(given, reference), abs=1e-12)
        for row in range(len(reference)):
            expected = compute(np.delete(given, row, 0), np.delete(reference, row, 0))
            assert without[row] == pytest.approx(expected, abs=1e-12), (metric, row)


@pytest.mark.parametrize("labels", [3, 400])
def test_many_labels_have_values_for_each_row(labels: int, tmp_path: Path) -> None:
    from peft_lab.metrics.predictions import read_predictions, write_predictions

    rng = np.random.default_rng(0)
    names = [f"label {n}" for n in range(labels)]
    features = Features(labels=ListOf(ClassLabel(names=names)))
    lists = [sorted(rng.choice(labels, 2, replace=False).tolist()) for _ in range(30)]
    rows, rule = Dataset.from_dict({"labels": lists}, features=features), kind("multi_label")
    references = np.zeros((30, labels), dtype=np.float32)
    for row, numbers in enumerate(lists):
        references[row, numbers] = 1
    prediction = EvalPrediction(rng.normal(size=(30, labels)) + 2 * references, references)
    task = task_of(tmp_path / "task", LISTS, metrics=["f1_micro", "f1_macro", "map", "accuracy"])
    scores = rule.compute_metrics(task, names, rows)(prediction)
    write_predictions(tmp_path, rule.row_predictions(prediction, task, rows))
    items = read_predictions(tmp_path / "items.csv")
    assert len(items.columns) == 8
    for metric, score in scores.items():
        value, values = jackknife_values(metric, items)
        assert value == pytest.approx(score)
        assert values.shape == (30,)
        assert metric == "accuracy" or values.std() > 0


def test_thresholds_are_the_best_of_all() -> None:
    reference, scores = draw(60)
    found = best_thresholds(reference, scores, 0.5)
    assert found[4] == 0.5, "a label that no row has keeps the default"
    for label in range(4):
        own = f1_score(reference[:, label], scores[:, label] >= found[label])
        precision, recall, _ = precision_recall_curve(reference[:, label], scores[:, label])
        best = (2 * precision * recall / np.maximum(precision + recall, 1e-12)).max()
        assert own == pytest.approx(best)
        assert not np.isin(found[label], scores[:, label]), "no rounding decides"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned")
    task, base = write_task(folder / "data", "multi_label"), make_backbone(folder / "base")
    run = options(task, base, folder / "run", max_steps=12, save_strategy="no")
    return train(run).output_dir


def test_thresholds_are_chosen_on_validation_rows_and_kept(tuned: Path) -> None:
    held = json.loads((tuned / "labels.json").read_text())["tuned"]["thresholds"]
    loaded = load(tuned)
    assert loaded.task.options["thresholds"] == held
    task = loaded.task.with_options({"thresholds": "tune"})
    validation = load_splits(task).validation
    rows = loaded.kind.preprocess(validation, loaded.processor, task, loaded.model)
    batch = loaded.kind.data_collator(loaded.processor, task, loaded.model)(list(rows))
    logits = loaded.model(**{k: v for k, v in batch.items() if k != "labels"}).logits.detach().numpy()
    again = loaded.kind.tune(task, loaded.labels, EvalPrediction(logits, batch["labels"].numpy()))
    assert again["thresholds"] == pytest.approx(held, abs=1e-4)
    assert set(held) == set(loaded.labels)
    (answer,) = predict(tuned, ["the rain and a song"])
    scores = dict(zip(loaded.labels, [0.0] * 3, strict=True)) | {x["label"]: x["score"] for x in answer["labels"]}
    assert all(scores[name] >= held[name] for name in (entry["label"] for entry in answer["labels"]))
    assert [x["score"] for x in answer["labels"]] == sorted((x["score"] for x in answer["labels"]), reverse=True)


def test_a_run_that_chooses_needs_its_validation_rows(tuned: Path, tmp_path: Path) -> None:
    values = options(tuned.parent / "data" / "multi_label.yaml", tuned.parent / "base", tmp_path / "out", do_eval=False)
    with pytest.raises(ConfigError, match="chooses its thresholds on the validation rows"):
        train(values)
    assert not (tmp_path / "out").exists()


def test_thresholds_that_a_stranger_changed_are_checked(tuned: Path, tmp_path: Path, caplog) -> None:
    import shutil

    folder = shutil.copytree(tuned, tmp_path / "run")
    record = json.loads((folder / "labels.json").read_text())
    for given, error, words in (
        ({"thresholds": {"rain": "x"}}, TaskError, "must be a number"),
        ({"threshold": 1}, ConfigError, "Did you mean"),
        ([1], ConfigError, 'must hold a mapping under "tuned"'),
        ({"thresholds": {"sun": 0.5}}, TaskError, "is no label"),
    ):
        (folder / "labels.json").write_text(json.dumps(record | {"tuned": given}))
        with pytest.raises(error, match=words):
            evaluate(folder, task=str(tuned.parent / "data" / "multi_label.yaml"))
    del record["tuned"]
    (folder / "labels.json").write_text(json.dumps(record))
    evaluate(folder, task=str(tuned.parent / "data" / "multi_label.yaml"))
    assert "holds none; the defaults are taken" in caplog.text
