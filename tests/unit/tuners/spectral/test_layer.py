"""The layer in singular bases: bases held once for all models and methods on a weight, weights on the meta device."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_lab.adapters import SVFitConfig


def test_models_on_one_weight_hold_the_same_bases():
    base = nn.Sequential(nn.Linear(12, 16))
    models = [get_peft_model(copy.deepcopy(base), SVFitConfig(rank=4, target_modules=["0"])) for _ in range(2)]
    first, second = (model.base_model.model[0].bases("default") for model in models)
    assert first.u.data_ptr() == second.u.data_ptr()
    other = get_peft_model(nn.Sequential(nn.Linear(12, 16)), SVFitConfig(rank=4, target_modules=["0"]))
    assert other.base_model.model[0].bases("default").u.data_ptr() != first.u.data_ptr()


@torch.no_grad()
def test_saved_bases_are_written_to_without_changing_those_of_others():
    base = nn.Sequential(nn.Linear(12, 16))
    shared = get_peft_model(copy.deepcopy(base), SVFitConfig(target_modules=["0"])).base_model.model[0]
    before = shared.bases("default").u.clone()
    saved = get_peft_model(copy.deepcopy(base), SVFitConfig(target_modules=["0"], save_bases=True)).base_model.model[0]
    saved.bases("default").u.zero_()
    assert torch.equal(shared.bases("default").u, before)


def test_parameters_are_counted_without_weights():
    with torch.device("meta"):
        base = nn.Sequential(nn.Linear(12, 16), nn.Conv2d(4, 6, 3))
    model = get_peft_model(base, SVFitConfig(target_modules=["0", "1"]))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 12 + 6
    assert model.base_model.model[0].bases("default").vh.shape == (12, 12)
    with pytest.raises(RuntimeError, match="SVFit needs the base weights to build its bases"):
        get_peft_model(copy.deepcopy(base), SVFitConfig(rank="energy:0.9", target_modules=["0"]))


def test_weights_that_come_after_the_adapter_are_refused_with_the_mend():
    with torch.device("meta"):
        base = nn.Sequential(nn.Linear(12, 16))
    model = get_peft_model(base, SVFitConfig(target_modules=["0"]))
    model.base_model.model[0].base_layer.load_state_dict(nn.Linear(12, 16).state_dict(), assign=True)
    with pytest.raises(RuntimeError, match="load the backbone before the adapter"):
        model(torch.randn(2, 12))
