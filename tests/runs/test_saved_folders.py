"""Folders that an earlier version wrote, in `fixtures/saved`: adapters of every method, and runs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.properties import assert_close, output
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

import peft_lab
from peft_lab.runs.run_folder import read_metrics

SAVED = Path(__file__).parents[1] / "fixtures" / "saved"
EXPECTED = load_file(SAVED / "expected.safetensors")
RUNS = ("lora", "svfit", "head")


def base_of(method: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """The saved base that a method was put on, with the inputs of the expected logits."""
    images = peft_lab.registry.method(method).can("images")
    folder = SAVED / ("vit" if images else "bert")
    auto = AutoModelForImageClassification if images else AutoModelForSequenceClassification
    return auto.from_pretrained(folder), load_file(folder / "inputs.safetensors")


@pytest.mark.parametrize("method", sorted(EXPECTED))
@pytest.mark.parametrize("door", ["peft", "peft_lab"])
def test_an_adapter_loads_and_gives_the_same_logits(method: str, door: str) -> None:
    model, inputs = base_of(method)
    load = PeftModel.from_pretrained if door == "peft" else peft_lab.load_adapter
    found = output(load(model, SAVED / method), inputs)
    assert_close(found, EXPECTED[method], 1e-4)


@pytest.mark.parametrize("method", RUNS)
def test_a_run_is_evaluated_and_known_to_be_finished(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(SAVED, tmp_path / "saved")
    monkeypatch.chdir(tmp_path / "saved")
    run = Path(f"run_{method}")
    metrics = read_metrics(run)
    with pytest.raises(peft_lab.TaskError, match="Name your own task file with --task"):
        peft_lab.evaluate(run)  # nobody has trained on its task file here
    found = peft_lab.evaluate(run, task="task/topics.yaml")
    assert found["accuracy"] == pytest.approx(metrics["metrics"]["test"]["accuracy"], abs=0.05)
    before = (run / "metrics.json").read_bytes()
    assert peft_lab.train(run / "run.yaml").trainer is None, "a finished run is not repeated"
    assert (run / "metrics.json").read_bytes() == before
    assert len(peft_lab.predict(run, ["the rain", "a song"])) == 2
