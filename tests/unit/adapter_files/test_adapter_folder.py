"""A folder is read once, and its regexes are never run by peft."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from support.backbones import TINY, tiny, tiny_inputs
from support.properties import adapt, move, output
from torch import nn

from peft_lab.adapter_files import safe_files
from peft_lab.loading.adapter_folder import AdapterFolder
from peft_lab.loading.foreign_adapters import write_record
from peft_lab.loading.load_adapter import load_adapter


def _edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("method", ["lora", "svfit"])
def test_each_file_is_read_once(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = move(adapt(method, TINY["bert"]()))
    model.save_pretrained(tmp_path)
    write_record(model, tmp_path)
    (tmp_path / "metrics.json").write_text("{}")
    read: Counter[str] = Counter()
    for name in ("read_json", "read_header"):
        original = getattr(safe_files, name)

        def counted(path: Path, original: Any = original) -> Any:
            read[path.name] += 1
            return original(path)

        monkeypatch.setattr(safe_files, name, counted)
    folder = AdapterFolder(tmp_path)
    for _ in range(2):
        assert folder.config.peft_type
        assert folder.header
        assert folder.origin == {}
        assert folder.labels is None
    assert isinstance(folder.record, dict)
    assert set(read.values()) == {1}


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_a_second_adapter_of_peft_runs_no_regex(field: str, tmp_path: Path) -> None:
    """peft reads the config of a second adapter by itself, from a folder without the regex."""
    base = tiny("bert")
    model = move(adapt("lora", TINY["bert"]())).eval()
    model.save_pretrained(tmp_path)
    _edit(tmp_path, **{field: "(a+)+$"})
    loaded = load_adapter(load_adapter(TINY["bert"](), tmp_path, "first"), tmp_path, "second")
    loaded.set_adapter("second")
    assert torch.equal(output(loaded, tiny_inputs(base)), output(model, tiny_inputs(base)))


def test_feedforward_modules_are_told_by_their_shape(tmp_path: Path) -> None:
    wanted = IA3Config(target_modules=["value", "output.dense"], feedforward_modules=["output.dense"])
    model = move(get_peft_model(TINY["bert"](), wanted)).eval()
    model.save_pretrained(tmp_path)
    _edit(tmp_path, target_modules=r".*(value|output\.dense)", feedforward_modules=r".*output\.dense")
    again = load_adapter(TINY["bert"](), tmp_path)
    found = again.peft_config["default"].feedforward_modules
    assert found
    assert all(name.endswith("output.dense") for name in found)
    inputs = tiny_inputs(tiny("bert"))
    assert torch.equal(output(again, inputs), output(model, inputs))


def test_ranks_by_pattern_are_kept(tmp_path: Path) -> None:
    wanted = LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=r".*\.(query|value)",
        rank_pattern={r".*\.1\..*query": 3},
        alpha_pattern={"value": 9},
    )
    model = move(get_peft_model(TINY["bert"](), wanted)).eval()
    model.save_pretrained(tmp_path)
    again = load_adapter(TINY["bert"](), tmp_path)
    inputs = tiny_inputs(tiny("bert"))
    assert torch.equal(output(again, inputs), output(model, inputs))


def test_a_base_without_transformers(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=r"[01]"))
    model.save_pretrained(tmp_path)
    loaded = load_adapter(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), tmp_path)
    assert sorted(loaded.peft_config["default"].target_modules) == ["0", "1"]
