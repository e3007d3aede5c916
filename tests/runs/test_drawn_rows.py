"""A run of less than an epoch preprocesses the rows that it draws, and computes what it did with all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from support.tiny_runs import (
    make_backbone,
    make_decoder,
    make_image_backbone,
    make_image_task,
    make_task,
    make_writing_task,
    options,
    same_weights,
)

from peft_lab.data.task_registry import kind
from peft_lab.training import run
from peft_lab.training.drawn_rows import DrawnRows
from peft_lab.training.run import train

#: Name -> makers of a backbone and a task.
TINY = {
    "text": (make_backbone, make_task),
    "writing": (make_decoder, make_writing_task),
    "images": (make_image_backbone, make_image_task),
}
OTHERS = ("writing", "images")
EXACT = {"logging_steps": 1, "lr_scheduler_type": "constant", "warmup_steps": 0}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("drawn")


@pytest.fixture
def tiny(request: pytest.FixtureRequest, place: Path) -> Callable[..., dict[str, Any]]:
    """Function that gives the options of a run in a folder."""
    make_model, make = TINY[request.param]
    model, task = place / f"{request.param}-model", place / request.param
    if not model.exists():
        make_model(model)
        make(task)
    file = next(task.glob("*.yaml"))
    return lambda folder, **changes: options(file, model, folder, **{**EXACT, **changes})


def losses(result: Any) -> list[float]:
    return [entry["loss"] for entry in result.trainer.state.log_history if "loss" in entry]


@pytest.fixture
def preprocessed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of rows that were handed to `preprocess`, one a call."""
    counts: list[int] = []
    owner = type(kind("text_classification"))
    original = owner.preprocess

    def counting(self: Any, dataset: Dataset, *args: Any) -> Dataset:
        counts.append(len(dataset))
        return original(self, dataset, *args)

    monkeypatch.setattr(owner, "preprocess", counting)
    return counts


@pytest.mark.full
@pytest.mark.parametrize("tiny", TINY, indirect=True)
def test_losses_and_weights_are_those_of_all_rows(
    tiny: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    few = train(tiny(tmp_path / "few", **steps))
    assert isinstance(few.trainer.train_dataset, DrawnRows)
    assert len(few.trainer.train_dataset.parts) == 1  # all of them before the first step
    assert sum(map(len, few.trainer.train_dataset.parts)) == 8 + 2  # and the batch that accelerate reads ahead
    monkeypatch.setattr(run, "draws_few", lambda *_: False)
    every = train(tiny(tmp_path / "every", **steps))
    assert isinstance(every.trainer.train_dataset, Dataset)
    assert losses(few) == losses(every)
    assert same_weights(tmp_path / "few", tmp_path / "every")
    assert few.metrics["metrics"] == every.metrics["metrics"]
    assert few.metrics["data"] == every.metrics["data"]


def test_rows_that_are_preprocessed_are_those_that_are_drawn(
    place: Path, tmp_path: Path, preprocessed: list[int]
) -> None:
    if not (place / "text-model").exists():
        make_backbone(place / "text-model")
        make_task(place / "text")
    values = options(place / "text" / "topics.yaml", place / "text-model", tmp_path / "out", max_steps=3)
    train(values)
    assert sorted(preprocessed) == [24, 24, 32]  # validation, test, and 3 steps of 8 rows with the batch ahead
    preprocessed.clear()
    train({**values, "output_dir": str(tmp_path / "epochs"), "max_steps": 13})
    assert sorted(preprocessed) == [24, 24, 96]  # more than the 96 rows


@pytest.mark.full
@pytest.mark.parametrize("tiny", ["text", *OTHERS], indirect=True)
def test_a_checkpoint_goes_on_beyond_the_first_epoch(tiny: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """What a checkpoint records of its rows is the same whether some or all of them were preprocessed."""
    batch = {"per_device_train_batch_size": 4, "do_predict": False}
    rows = len(train(tiny(tmp_path / "one", max_steps=1, **batch)).trainer.train_dataset)
    beyond = rows // 4 + 3
    checkpoint = str(tmp_path / "one" / "checkpoint-1")
    went_on = train(tiny(tmp_path / "went_on", max_steps=beyond, resume_from_checkpoint=checkpoint, **batch))
    assert went_on.metrics["resumed_from"] == "checkpoint-1"
    train(tiny(tmp_path / "alone", max_steps=beyond, **batch))
    assert same_weights(tmp_path / "went_on", tmp_path / "alone")


def test_a_row_drawn_unasked_is_preprocessed_then() -> None:
    task = Dataset.from_dict({"text": [str(number) for number in range(9)]})
    asked: list[list[str]] = []

    def prepare(rows: Dataset) -> Dataset:
        asked.append(rows["text"][:])
        return rows.add_column("number", [int(text) for text in rows["text"]])

    rows = DrawnRows(task, prepare)
    rows.read([5, 3, 5])
    assert [row["number"] for row in rows.__getitems__([3, 7, 5])] == [3, 7, 5]
    assert rows[7]["text"] == "7"
    assert asked == [["3", "5"], ["7"]]
