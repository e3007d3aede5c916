"""Properties of every kind of task: what is trained, saved, scored and answered, on a tiny backbone of each."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.cover import cover, each_method
from support.kind_rows import KINDS, inputs_of, kind_of, write_task
from support.properties import EVERY, FITTED, KEEPS_HEAD, assert_close
from support.tiny_runs import options

from peft_lab import registry
from peft_lab.data.splits import load_splits
from peft_lab.data.task_registry import load_task
from peft_lab.errors import ConfigError, TaskError
from peft_lab.export.merge import merge
from peft_lab.hub.public_copy import stage
from peft_lab.hub.push import local_adapter
from peft_lab.loading.load_run import load
from peft_lab.metrics.per_row import jackknife_values
from peft_lab.metrics.predictions import PREDICTIONS, read_predictions
from peft_lab.training.evaluate import evaluate, predict
from peft_lab.training.run import train

#: Each kind daily, and its variants, which have words behind their names, in the full run.
EACH = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full if " " in name else ()) for name in KINDS]
)
BASELINES = ("full", "head")
#: Rows of a batch of Trainer's evaluation, whose losses are means of batches.
BATCH = 8


@dataclass
class Place:
    """Task, backbone and trained run of a kind; each is made when it is first asked for.

    Attributes:
        folder: where they lie.
        name: of the entry of `KINDS`.
    """

    folder: Path
    name: str

    @property
    def task(self) -> Path:
        found = sorted((self.folder / "data").glob("*.yaml"))
        return found[0] if found else write_task(self.folder / "data", self.name)

    @property
    def backbone(self) -> Path:
        path = self.folder / "base"
        return path if path.is_dir() else KINDS[self.name].backbone(path)

    @property
    def run(self) -> Path:
        path = self.folder / "run"
        return path if path.is_dir() else self.train(path).output_dir

    def train(self, out: Path, method: str = "lora", steps: int = 2) -> Any:
        changes = {"method": method, "max_steps": steps, "save_strategy": "no", "eval_strategy": "no"}
        # the first test to ask for the run may stand under no_grad
        with torch.enable_grad():
            return train(options(self.task, self.backbone, out, **changes))

    def inputs(self, count: int = 5) -> list[Any]:
        return inputs_of(self.name, KINDS[self.name].rows(count, 7))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Place]:
    made: dict[str, Place] = {}

    def of(name: str) -> Place:
        return made.setdefault(name, Place(tmp_path_factory.mktemp("kind"), name))

    return of


def test_every_kind_is_tried_here() -> None:
    assert {kind_of(name) for name in KINDS} == set(registry.list_kinds())


@EACH
def test_a_saved_run_scores_as_it_did(name: str, places: Any) -> None:
    run, metrics = places(name).run, load_metrics(places(name).run)
    found = evaluate(run, batch_size=BATCH)
    expected = metrics["metrics"]["test"]
    assert found.pop("rows") == metrics["data"]["rows"]["test"]
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert set(load_task(places(name).task).metrics) <= set(expected)
    assert all(np.isfinite(value) for value in expected.values())


def load_metrics(run: Path) -> dict[str, Any]:
    from peft_lab.runs.run_folder import read_metrics

    return read_metrics(run)


@EACH
def test_metrics_have_a_value_for_each_row(name: str, places: Any) -> None:
    """The comparison takes its intervals from these values."""
    run, metrics = places(name).run, load_metrics(places(name).run)
    items = read_predictions(run / PREDICTIONS)
    assert len(items) == metrics["data"]["rows"]["test"]
    for metric in load_task(places(name).task).metrics:
        found = jackknife_values(metric, items, metrics["data"]["labels"])
        assert found is not None, metric
        value, rows = found
        assert value == pytest.approx(metrics["metrics"]["test"][metric], rel=1e-5, abs=1e-6), metric
        assert rows.shape == (len(items),)


@EACH
def test_answers_do_not_depend_on_the_batch(name: str, places: Any) -> None:
    place = places(name)
    inputs = place.inputs()
    together, alone = (predict(place.run, inputs, batch_size=size) for size in (len(inputs), 1))
    assert len(together) == len(inputs)
    assert_alike(together, alone)


@EACH
def test_ranked_answers_stand_beside_the_best(name: str, places: Any) -> None:
    place = places(name)
    loaded = load(place.run)
    inputs = place.inputs(3)
    if not loaded.kind.ranks_labels or loaded.task.problem_type == "regression":
        with pytest.raises(ConfigError, match='"top_k" is for tasks of labels or choices'):
            predict(place.run, inputs, top_k=2)
        return
    ranked = predict(place.run, inputs, top_k=2)
    for row in ranked:
        first, second = row.pop("top_k")
        assert first["score"] >= second["score"]
        assert "label" not in row or row == first
    assert_alike(ranked, predict(place.run, inputs))


def assert_alike(one: Any, other: Any) -> None:
    """Equal texts, and numbers up to rounding."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), list(other.values())
    if isinstance(one, list):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_alike(left, right)
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
    else:
        assert one == other


@EACH
@torch.no_grad()
def test_padding_does_not_change_the_loss(name: str, places: Any) -> None:
    """The loss of a batch is the mean of those of its rows, weighted by the answers that count."""
    loaded = load(places(name).run)
    raw = load_splits(loaded.task).validation.select(range(4))
    rows = loaded.kind.preprocess(raw, loaded.processor, loaded.task, loaded.model)
    rows = loaded.kind.evaluation_rows(rows, loaded.processor, loaded.task)
    collate = loaded.kind.data_collator(loaded.processor, loaded.task, loaded.model)
    # a decoder predicts each token from those before it, so its first label does not count
    first_label = getattr(loaded.kind, "shift", 0)
    rows = [rows[number] for number in range(len(rows))]
    if KINDS[name].reads_padding:
        longest = max(len(row["input_ids"]) for row in rows)
        rows = [row for row in rows if len(row["input_ids"]) == longest]
    rows = rows[:4]
    assert len(rows) >= 3
    together = loaded.model(**collate(rows))
    alone = [loaded.model(**collate([row])) for row in rows]
    labels = [collate([row])[loaded.kind.trainer_labels[0]] for row in rows]
    counts = torch.tensor([float(max(counted(values, first_label), 1)) for values in labels])
    losses = torch.stack([output.loss for output in alone])
    assert_close(together.loss, (losses * counts).sum() / counts.sum(), 2e-5)


def counted(labels: torch.Tensor, first: int) -> int:
    """Answers of a row in its loss: pixels or tokens where there are several, else one."""
    if labels.ndim == 3:
        return int((labels != 255).sum())
    return int((labels[:, first:] != -100).sum()) if labels.ndim == 2 and labels.dtype == torch.int64 else 1


@EACH
def test_a_row_without_an_answer_is_refused_by_its_number(name: str, tmp_path: Path) -> None:
    task = load_task(write_task(tmp_path, name, blank=(2, 7)))
    with pytest.raises(TaskError, match=r"\(rows 3, 8 of 16\).*empty_rows: drop") as raised:
        load_splits(task)
    assert "\n" not in str(raised.value)
    kept = load_splits(task.model_copy(update={"empty_rows": "drop"}))
    assert len(kept.train) == 14


@EACH
def test_the_fingerprint_is_that_of_the_rows(name: str, places: Any, tmp_path: Path) -> None:
    place = places(name)
    recorded = load_metrics(place.run)["data"]["fingerprints"]
    shutil.copytree(place.task.parent, tmp_path / "moved")
    moved = load_splits(load_task(tmp_path / "moved" / place.task.name), test=True)
    assert moved.fingerprints == recorded
    other = load_splits(load_task(write_task(tmp_path / "other", name, blank=(3,), empty_rows="drop")), test=True)
    assert {split for split in recorded if other.fingerprints[split] != recorded[split]} == {"train"}


@EACH
def test_a_run_has_a_baseline_of_its_main_metric(name: str, places: Any) -> None:
    metrics = load_metrics(places(name).run)
    assert isinstance(metrics["beats_baseline"], bool)


@EACH
def test_the_lines_of_the_card_load_the_model(name: str, places: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    place = places(name)
    card = (place.run / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(place.run.parent)
    lines: dict[str, Any] = {}
    exec(code, lines)
    model, loaded = lines["model"].eval(), load(place.run)
    raw = load_splits(loaded.task).validation.select(range(2))
    rows = loaded.kind.preprocess(raw, loaded.processor, loaded.task, loaded.model)
    collate = loaded.kind.data_collator(loaded.processor, loaded.task, loaded.model)
    for number in range(2):
        batch = collate([rows[number]])
        for column in loaded.kind.trainer_labels:
            del batch[column]
        with torch.no_grad():
            assert_close(first(model(**batch)), first(loaded.model(**batch)))


def first(output: Any) -> torch.Tensor:
    """First tensor of a model's output: logits where no loss was asked for."""
    return next(value for value in output.values() if isinstance(value, torch.Tensor))


@EACH
def test_a_public_copy_answers_as_the_run(name: str, places: Any, tmp_path: Path) -> None:
    place = places(name)
    stage(local_adapter(place.run), "someone/name", tmp_path, "someone/base")
    assert str(place.folder) not in (tmp_path / "README.md").read_text(encoding="utf-8")
    inputs = place.inputs()
    found = predict(tmp_path, inputs, model_name_or_path=str(place.backbone))
    assert_alike(found, predict(place.run, inputs))


@pytest.mark.full
@EACH
def test_a_merged_model_answers_as_its_adapter(name: str, places: Any, tmp_path: Path) -> None:
    place = places(name)
    merge(place.run, tmp_path / "merged")
    inputs = place.inputs()
    assert_alike(predict(tmp_path / "merged", inputs, task=str(place.task)), predict(place.run, inputs))


@pytest.mark.full
@EACH
def test_label_smoothing_changes_the_training_or_is_refused(name: str, places: Any, tmp_path: Path) -> None:
    place = places(name)
    plain = options(place.task, place.backbone, tmp_path / "out", save_strategy="no", eval_strategy="no", max_steps=1)
    smooth = {**plain, "label_smoothing_factor": 0.5}
    loaded = load(place.run)
    if not loaded.kind.smooths_labels(loaded.task):
        with pytest.raises(ConfigError, match=r"label_smoothing_factor=0\.5 is for answers that are one class"):
            train(smooth)
        assert not (tmp_path / "out").exists()
        return
    losses = []
    for values in (smooth, {**plain, "output_dir": str(tmp_path / "plain")}):
        history = train(values).trainer.state.log_history
        losses.append(next(entry["train_loss"] for entry in history if "train_loss" in entry))
    assert losses[0] != losses[1]


# Methods --------------------------------------------------------------------------------------------------------------


def each_place(case: tuple[Any, ...]) -> set[Hashable]:
    """A method of each place; each kind has a run already."""
    return {registry.method(case[1]).place}


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "method"),
    cover([(name, method) for name in KINDS for method in (*EVERY, *KEEPS_HEAD, *BASELINES)], each_place, each_method),
)
def test_methods_train_or_are_refused(name: str, method: str, places: Any, tmp_path: Path) -> None:
    place = places(name)
    late = method in KINDS[name].refuses_batches
    if late or method in KINDS[name].refuses:
        with pytest.raises(ConfigError) as raised:
            place.train(tmp_path / "out", method)
        assert "\n" not in str(raised.value)
        assert late or not (tmp_path / "out").exists()
        return
    result = place.train(tmp_path / "out", method)
    assert result.metrics["global_step"] == (0 if method in FITTED else 2)
    found = evaluate(tmp_path / "out", batch_size=BATCH)
    expected = result.metrics["metrics"]["test"]
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)
