"""Runs of methods that put prompts into the sequence: training, evaluation, prediction and a merge that is refused."""

from __future__ import annotations

import pytest
from support.cover import cover, each_place
from support.properties import IMAGES, SEQUENCE, UNTRAINED
from support.tiny_runs import (
    make_backbone,
    make_decoder,
    make_image_backbone,
    make_image_task,
    make_task,
    make_writing_task,
    options,
)

from peft_lab.errors import ConfigError
from peft_lab.export.merge import merge
from peft_lab.hub.public_copy import stage
from peft_lab.training.evaluate import evaluate, predict
from peft_lab.training.run import train


@pytest.mark.parametrize("method", cover(SEQUENCE, each_place))
def test_a_run_of_a_classifier(method, tmp_path):
    backbone, task = make_backbone(tmp_path / "bert"), make_task(tmp_path / "data")
    run = train(options(task, backbone, tmp_path / "out", method=method, max_steps=20))
    assert evaluate(run.output_dir)["accuracy"] == run.metrics["metrics"]["test"]["accuracy"]
    assert len(predict(run.output_dir, ["the rain", "a song"])) == 2
    with pytest.raises(ConfigError, match="its prompts are tokens of the sequence"):
        merge(run.output_dir, tmp_path / "merged")


@pytest.mark.parametrize("method", cover((m for m in SEQUENCE if m not in UNTRAINED), each_place))
def test_a_run_of_a_decoder(method, tmp_path):
    """Batches padded for training, and left-padded for writing, give what each text gives alone."""
    backbone, task = make_decoder(tmp_path / "llama"), make_writing_task(tmp_path / "data")
    run = train(options(task, backbone, tmp_path / "out", method=method, max_steps=10))
    assert evaluate(run.output_dir)["perplexity"] == pytest.approx(
        run.metrics["metrics"]["test"]["perplexity"], rel=1e-4
    )
    rows = ["food", "rain and snow now with a song"]
    together = predict(run.output_dir, rows)
    assert together == [answer for row in rows for answer in predict(run.output_dir, [row])]


@pytest.mark.full
@pytest.mark.parametrize(
    ("method", "family"), cover([*((name, "vit") for name in IMAGES), ("vpt", "swin")], each_place)
)
def test_a_run_on_images(method, family, tmp_path):
    backbone, task = make_image_backbone(tmp_path / "base", family), make_image_task(tmp_path / "data")
    run = train(options(task, backbone, tmp_path / "out", method=method, max_steps=30))
    found = evaluate(run.output_dir)["accuracy"]
    assert found == run.metrics["metrics"]["test"]["accuracy"]
    assert found > 0.6  # chance is 0.33
    answer = predict(run.output_dir, [str(tmp_path / "data" / "test.png")])[0]
    assert answer["label"] in ("red", "green", "blue")
    with pytest.raises(ConfigError, match="its prompts are tokens of the sequence"):
        merge(run.output_dir, tmp_path / "merged")
    (tmp_path / "staged").mkdir()
    stage(run.output_dir, "someone/colours", tmp_path / "staged", base_model="org/base")
    assert "image-classification" in (tmp_path / "staged" / "README.md").read_text()
