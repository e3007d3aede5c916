"""What the files of a checkpoint may ask for, by the families that are known."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import pytest
from support.backbones import TINY
from torch import nn
from transformers import AutoModel

from peft_lab.backbones.checkpoint_limits import bounded_build, check_files
from peft_lab.backbones.from_pretrained import load_checkpoint
from peft_lab.errors import ConfigError


@pytest.mark.parametrize("family", TINY)
def test_every_family_loads_within_the_limits(family: str, tmp_path: Path) -> None:
    model = TINY[family]()
    model.save_pretrained(tmp_path)
    check_files(str(tmp_path))
    with bounded_build(str(tmp_path)):
        type(model)(model.config)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**6},
        {"hidden_size": 2**29},
        {"depths": [40_000, 40_000]},
        {"text_config": {"vocab_size": 10**12}},
        {"attn_implementation": "someone/kernel"},
        {"text_config": {"_attn_implementation": "someone/kernel"}},
    ],
)
def test_configs_that_no_model_has(changes: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", **changes}))
    with pytest.raises(ConfigError, match=r"larger than in any model|code on the Hub"):
        check_files(str(tmp_path))


@pytest.mark.parametrize(
    "usual",
    [
        {"vocab_size": 262_144, "max_position_embeddings": 10_485_760, "rope_theta": 5e8, "eos_token_id": [1, 106]},
        {"time_step_limit": [0.0, float("inf")], "label2id": {"block": 10**9}, "quantization_block_size": 10**6},
    ],
)
def test_usual_configs_pass(usual: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(usual))
    check_files(str(tmp_path))


def test_code_of_a_checkpoint_is_neither_run_nor_asked_for(tmp_path: Path) -> None:
    """Transformers would ask on the terminal whether to run it."""
    (tmp_path / "evil.py").write_text("raise SystemExit(7)\n")
    values = {"model_type": "mine", "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"trust_remote_code|custom code|not recognize"):
        load_checkpoint(AutoModel, str(tmp_path))


def _build() -> nn.Module:
    return nn.Sequential(*(nn.Identity() for _ in range(5_000)))


def test_a_model_in_another_thread_is_not_counted(tmp_path: Path) -> None:
    TINY["bert"]().save_pretrained(tmp_path)
    with bounded_build(str(tmp_path)):
        other = threading.Thread(target=_build)
        other.start()
        other.join()
        with pytest.raises(ConfigError, match="far larger than its weights"):
            _build()
    _build()


def test_a_package_that_holds_the_model_and_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is built: transformers itself would fail at the image processor, and name no package."""
    monkeypatch.setitem(sys.modules, "timm", None)
    (tmp_path / "config.json").write_text('{"model_type": "timm_wrapper", "architecture": "vit_tiny_patch16_224"}')
    for load in (lambda: check_files(str(tmp_path)), lambda: load_checkpoint(AutoModel, str(tmp_path))):
        with pytest.raises(ConfigError, match=r"is a model of timm, which cannot be imported .*; install timm"):
            load()
