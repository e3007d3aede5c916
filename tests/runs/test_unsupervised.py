"""Unsupervised FixMatch: trusted rows, threshold and loss in plain lines, and runs that read no label."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.backbones import TINY, tiny_inputs
from support.tiny_runs import make_backbone, make_task, options, weights
from torch import Tensor, nn
from torch.nn import functional

from peft_lab.comparison.study.schema import load_study
from peft_lab.errors import ConfigError
from peft_lab.metrics.baselines import CHANCE
from peft_lab.runs.run_config import RunConfig
from peft_lab.training.run import train
from peft_lab.training.unsupervised import (
    TRUSTED,
    UNTRUSTED,
    UnsupervisedFixMatch,
    fixmatch_loss,
    threshold,
    trusted_labels,
)

RUN = {"task": "snips", "model_name_or_path": "minilm", "method": "lora", "output_dir": "-", "unsupervised": "ufm"}


@pytest.mark.parametrize("count", [None, 1, 3])
def test_trusted_rows_are_the_most_confident_of_each_class(count: int | None) -> None:
    probabilities = torch.randn(17, 4, generator=torch.Generator().manual_seed(0)).mul(2).softmax(-1)
    wanted = [UNTRUSTED] * 17
    for label in range(4):
        own = [row for row in range(17) if probabilities[row].argmax() == label]
        own.sort(key=lambda row: -probabilities[row, label])
        for row in own[: min(17 // 4, 100) if count is None else count]:
            wanted[row] = label
    assert trusted_labels(probabilities, count).tolist() == wanted
    # every class has some, the last one is no exception
    assert {*wanted} == {UNTRUSTED, 0, 1, 2, 3}
    assert (trusted_labels(torch.eye(3).repeat(400, 1)) == 1).sum() == 100


def test_the_loss_is_that_of_the_paper() -> None:
    draw = np.random.default_rng(0)
    weak, strong = draw.normal(size=(9, 3)) * 2, draw.normal(size=(9, 3))
    trusted = np.array([-1, 2, -1, -1, 0, -1, -1, -1, -1])
    for least in (0.9, 0.97, 1.0):
        total = counted = 0.0
        for row in range(9):
            p = np.exp(weak[row]) / np.exp(weak[row]).sum()
            sharp = p ** (1 / 0.5) / (p ** (1 / 0.5)).sum()
            if trusted[row] >= 0:
                sharp = np.eye(3)[trusted[row]]
            elif sharp.max() <= least:
                continue
            total -= (sharp * np.log(np.exp(strong[row]) / np.exp(strong[row]).sum())).sum()
            counted += 1
        found = fixmatch_loss(*(torch.tensor(each) for each in (weak, strong, trusted)), least)
        assert found.item() == pytest.approx(total / counted, rel=1e-5)
    # without a row that counts there is no gradient, and no division by zero
    logits = torch.zeros(2, 3, requires_grad=True)
    fixmatch_loss(torch.zeros(2, 3), logits, torch.tensor([-1, -1]), 0.9).backward()
    assert not logits.grad.any()


def test_the_threshold_rises_with_the_steps_from_0_9_to_1() -> None:
    loss = UnsupervisedFixMatch()
    found = []
    for step in (0, 5, 10):
        loss.on_step_begin(None, SimpleNamespace(global_step=step, max_steps=10), None)
        found.append(threshold(loss.progress))
    assert found == pytest.approx([0.9, 0.95, 1.0])


def test_the_answers_are_those_in_evaluation_mode_and_the_views_are_shifted() -> None:
    model = TINY["vit"]().train()
    dropout = nn.Dropout(0.5).eval()
    model.vit.layernorm = nn.Sequential(model.vit.layernorm, nn.Dropout(0.3), dropout)
    inputs = tiny_inputs(model, batch=4)
    trusted = torch.tensor([0, 1, -1, 2])
    torch.manual_seed(0)
    loss, outputs = UnsupervisedFixMatch()(model, {**inputs, "labels": trusted, TRUSTED: trusted})
    assert (model.training, dropout.training) == (True, False)
    weak = model.eval()(**inputs).logits
    assert torch.allclose(loss, fixmatch_loss(weak, outputs.logits, trusted, 0.9))
    assert not torch.allclose(weak, outputs.logits, atol=1e-4)
    model.train()
    dropout.eval()
    torch.manual_seed(0)
    halved, _ = UnsupervisedFixMatch()(model, {**inputs, TRUSTED: trusted}, 8)
    assert torch.allclose(halved, loss / 2)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Task of topics, and a whole model that was trained on it for a few steps."""
    folder = tmp_path_factory.mktemp("unsupervised")
    task = make_task(folder / "data")
    backbone = make_backbone(folder / "bert", dropout=0.1)
    changes = {"method": "full", "max_steps": 10, "learning_rate": 1e-3, "save_strategy": "no"}
    train(options(task, backbone, folder / "start", **changes))
    return {"task": task, "backbone": backbone, "start": folder / "start", "folder": folder}


def _shuffled(place: dict[str, Any]) -> Path:
    """The same task with the training labels moved by 31 rows."""
    task = make_task(place["folder"] / "shuffled")
    file = task.parent / "train.csv"
    with file.open() as source:
        rows = list(csv.reader(source))
    labels = [row[1] for row in rows[1:]]
    with file.open("w", newline="") as target:
        writer = csv.writer(target)
        writer.writerow(rows[0])
        writer.writerows([row[0], labels[(number + 31) % len(labels)]] for number, row in enumerate(rows[1:]))
    return task


def test_a_run_without_labels_reads_none(place: dict[str, Any], tmp_path: Path) -> None:
    def run(name: str, task: Path, **changes: Any) -> dict[str, Any]:
        given = {"unsupervised": "ufm", "trusted_per_class": 8, "max_steps": 5, "save_strategy": "no", **changes}
        return train(options(task, place["start"], tmp_path / name, **given)).metrics

    found = run("plain", place["task"])
    run("shuffled", _shuffled(place))
    own, other = weights(tmp_path / "plain"), weights(tmp_path / "shuffled")
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)
    assert found["run"]["unsupervised"] == "ufm"
    # a predictor that knows the training answers is no baseline of a run that does not
    assert [baseline["predictor"] for baseline in found["baselines"]] == [CHANCE]


class Noisy(nn.Module):
    """Linear classifier whose inputs are dropped at random in training mode."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, values: Tensor) -> dict[str, Tensor]:
        return {"logits": functional.linear(functional.dropout(values, 0.2, self.training), self.weight, self.bias)}


@pytest.mark.parametrize("seed", [0, 2, 3])
def test_a_classifier_that_is_right_on_most_rows_gets_better_without_labels(seed: int) -> None:
    """Three clouds of points, and a classifier whose weights are far from the best ones."""
    draw = torch.Generator().manual_seed(seed)
    centres = 1.2 * torch.randn(3, 8, generator=draw)
    labels = torch.arange(300) % 3
    rows, unseen = (centres[labels] + torch.randn(300, 8, generator=draw) for _ in range(2))
    model = Noisy(centres + torch.randn(3, 8, generator=draw), -centres.square().sum(1) / 2)

    def accuracy() -> float:
        return (model.eval()(unseen)["logits"].argmax(-1) == labels).float().mean().item()

    before, trusted = accuracy(), trusted_labels(model(rows)["logits"].softmax(-1), 30)
    loss, optimizer = UnsupervisedFixMatch(), torch.optim.Adam(model.parameters(), lr=0.05)
    torch.manual_seed(seed)
    for step in range(100):
        loss.on_step_begin(None, SimpleNamespace(global_step=step, max_steps=100), None)
        batch = torch.randint(300, (32,))
        optimizer.zero_grad()
        loss(model.train(), {"values": rows[batch], TRUSTED: trusted[batch]})[0].backward()
        optimizer.step()
    assert before < 0.8
    assert accuracy() > before + 0.03


def test_what_has_no_first_labels_is_refused(place: dict[str, Any], tmp_path: Path) -> None:
    def run(**changes: Any) -> None:
        train({**options(place["task"], place["start"], tmp_path / "out", unsupervised="ufm"), **changes})

    with pytest.raises(ConfigError, match="brings none for these 3 classes"):
        run(model_name_or_path=str(place["backbone"]))
    with pytest.raises(ConfigError, match="reads the training rows with their labels"):
        run(method="atlas", method_args={"blocks": 2})
    other = place["task"].with_name("other.yaml")
    other.write_text(place["task"].read_text() + "labels: [music, weather, food]\n")
    with pytest.raises(ConfigError, match="are not those of the task in their order"):
        run(task=str(other))
    with pytest.raises(ConfigError, match="adds terms to the loss"):
        run(method="atlas", method_args={"l1": 0.5})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"unsupervised": "umf"}, 'Did you mean "ufm"'),
        ({"unsupervised": None, "trusted_per_class": 3}, "no effect without unsupervised"),
        ({"trusted_per_class": 0}, "at least 1"),
        ({"method": "nearest_mean"}, "replaces it"),
        ({"examples_per_class": 4}, "no place for examples_per_class"),
        ({"row_weight_column": "w"}, "no place for row_weight_column"),
        ({"label_smoothing_factor": 0.1}, "no place for label_smoothing_factor"),
        ({"features": "cached"}, "no place for features"),
    ],
)
def test_options_that_cannot_act_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_mapping({**RUN, **values}).check()


def test_an_arm_of_a_study_may_train_without_labels() -> None:
    without = {"method": "lora", "name": "without labels", "training": {"unsupervised": "ufm", "trusted_per_class": 5}}
    task = {"task": "snips", "model_name_or_path": "minilm"}
    study = load_study({"name": "labels", "tasks": [task], "methods": ["lora", without]})
    options_of = [study.options(study.cells[0], arm) for arm in study.arms]
    assert [found.get("unsupervised") for found in options_of] == [None, "ufm"]
    # it holds for that method alone, so the others are checked without it
    with pytest.raises(ConfigError, match="replaces it"):
        load_study({"name": "labels", "tasks": [task], "methods": [{**without, "method": "nearest_mean"}]})
