"""Broken and hostile adapter folders: each ends in one of our own errors, and the model stays as it was."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from properties import OWN, config, equal_weights, move
from safetensors.torch import load_file, save_file
from torch import nn

from peft_lab.errors import PeftLabError


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.fixture(params=OWN)
def folder(request, tmp_path):
    model = move(get_peft_model(_model(), config(request.param, target_modules=["0", "2"])))
    model.save_pretrained(tmp_path)
    return tmp_path


def _load(folder):
    base = _model()
    before = copy.deepcopy(base)
    try:
        PeftModel.from_pretrained(base, folder)
    finally:
        assert equal_weights(_base(base), before)


def _base(model: nn.Module) -> nn.Module:
    plain = _model()
    state = {k.replace("base_layer.", ""): v for k, v in model.state_dict().items()}
    plain.load_state_dict({k: state[k] for k in plain.state_dict()})
    return plain


def _edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text())
    values.update(changes)
    path.write_text(json.dumps(values))


def _edit_weights(folder, change):
    path = folder / "adapter_model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)


def test_untouched_folder_loads(folder):
    _load(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"trust_remote_code": True},
        {"modules_to_svae": ["x"]},
        {"target_modules": 7},
        {"target_modules": "("},
        {"target_modules": [1, 2]},
        {"exclude_modules": {"a": 1}},
        {"layers_to_transform": "all"},
        {"modules_to_save": "0"},
        {"fingerprints": [1]},
        {"fingerprints": {"0": {"shape": [1], "dtype": "float32", "sha256": "0", "probe": []}}},
        {"fingerprints": {"0": {}}},
        {"fingerprints": {"__class__": {"shape": []}}},
    ],
)
def test_bad_config_is_refused(folder, changes):
    _edit_config(folder, **changes)
    with pytest.raises(PeftLabError):
        _load(folder)


def test_missing_entry_is_refused(folder):
    _edit_weights(folder, lambda state: state.pop(next(iter(state))))
    with pytest.raises(PeftLabError, match="lacks"):
        _load(folder)


def test_unknown_entry_is_refused(folder):
    def change(state):
        key = next(iter(state))
        state[key.replace(".0.", ".1.", 1)] = state[key].clone()

    _edit_weights(folder, change)
    with pytest.raises(PeftLabError, match="unknown entr"):
        _load(folder)


def test_base_weight_in_the_file_is_refused(folder):
    _edit_weights(folder, lambda state: state.update({"base_model.model.0.base_layer.weight": torch.zeros(8, 6)}))
    with pytest.raises(PeftLabError, match="unknown entr"):
        _load(folder)


def test_wrong_shape_is_refused(folder):
    def change(state):
        key = next(iter(state))
        state[key] = torch.zeros(state[key].shape[0] + 1)

    _edit_weights(folder, change)
    with pytest.raises(PeftLabError, match="shape"):
        _load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(folder, value):
    _edit_weights(folder, lambda state: next(iter(state.values())).fill_(value))
    with pytest.raises(PeftLabError, match="finite"):
        _load(folder)


@pytest.mark.parametrize("keep", [0, 4, 60])
def test_truncated_file_is_an_error(folder, keep):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(Exception, match=r"(?i)header|deserializ|truncat|buffer|safetensors|invalid|small"):
        _load(folder)


def test_adapter_name_inside_the_prefix_is_refused(folder):
    prefix = json.loads((folder / "adapter_config.json").read_text())["peft_type"].lower()
    base = _model()
    with pytest.raises(PeftLabError, match="cannot be used"):
        PeftModel.from_pretrained(base, folder, adapter_name=prefix[:2])
    assert isinstance(base[0], nn.Linear)
