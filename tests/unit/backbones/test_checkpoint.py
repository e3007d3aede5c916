"""What is said of weights that a checkpoint does not bring: nothing of a new head, everything of the backbone."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.tiny_runs import make_backbone
from transformers import AutoModelForSequenceClassification

from peft_lab.backbones.from_pretrained import load_checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_backbone(tmp_path / "bert")


def test_a_new_head_is_no_news(
    checkpoint: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers keeps its messages from the root logger, where older versions of pytest listen
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        model, info = load_checkpoint(AutoModelForSequenceClassification, str(checkpoint), num_labels=5)
    assert model.classifier.out_features == 5
    assert {*info["missing_keys"]} == {"classifier.weight", "classifier.bias"}
    assert not [r for r in caplog.records if r.name.startswith(("transformers", "peft_lab"))]
    AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=5)
    assert "LOAD REPORT" in caplog.text  # the filter is gone with the call


def test_weights_that_the_backbone_lacks_are_named(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = checkpoint / "model.safetensors"
    state = load_file(file)
    gone = sorted(key for key in state if "encoder.layer.1.output" in key)
    assert len(gone) > 3
    save_file({key: value for key, value in state.items() if key not in gone}, file, metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING):
        load_checkpoint(AutoModelForSequenceClassification, str(checkpoint), num_labels=5)
    (message,) = [r.getMessage() for r in caplog.records if r.name == "peft_lab"]
    assert "does not bring all weights of its backbone" in message
    assert message.endswith(f"and {len(gone) - 3} more.")
    assert "encoder.layer.1.output" in message
