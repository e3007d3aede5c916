"""SVFit on stacked weights of experts, against the decomposition of each expert's own matrix."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from support.backbones import EXPERTS, tiny_inputs
from support.properties import move, output

from peft_lab import SVFitConfig


@pytest.mark.parametrize("selection", ["principal", "minor"])
def test_each_expert_has_singular_values_of_its_own(selection):
    base = EXPERTS["mixtral"]()
    config = SVFitConfig(rank=3, selection=selection, target_parameters=["experts.down_proj"], target_modules=[])
    model = get_peft_model(copy.deepcopy(base), config)
    deltas = [p for p in model.parameters() if p.requires_grad]
    for delta in deltas:
        torch.nn.init.normal_(delta)
    merged = model.merge_and_unload()
    for index, delta in enumerate(deltas):
        before = base.model.layers[index].mlp.experts.down_proj
        after = merged.model.layers[index].mlp.experts.down_proj
        assert delta.shape == (4, 3)
        for expert in range(4):
            u, s, vh = torch.linalg.svd(before[expert].detach(), full_matrices=False)
            place = slice(0, 3) if selection == "principal" else slice(len(s) - 3, len(s))
            changed = s.clone()
            changed[place] += delta[expert].detach()
            torch.testing.assert_close(after[expert], u @ torch.diag(changed) @ vh, atol=1e-5, rtol=1e-4)


def test_a_share_of_energy_is_reached_by_every_expert():
    base = EXPERTS["mixtral"]()
    with torch.no_grad():
        base.model.layers[0].mlp.experts.down_proj[0] = torch.ones(16, 32)  # rank 1: one value holds all of it
    config = SVFitConfig(rank="energy:0.9", target_parameters=["experts.down_proj"], target_modules=[])
    with pytest.warns(UserWarning, match="equal to their neighbour"):
        model = get_peft_model(base, config)
    found = model.base_model.model.model.layers[0].mlp.experts.down_proj.svfit_delta["default"].shape[1]
    shares = []
    for weight in base.model.layers[0].mlp.experts.base_layer.down_proj.detach():
        energy = torch.linalg.svdvals(weight).square().cumsum(0)
        shares.append(int((energy < 0.9 * energy[-1]).sum()) + 1)
    assert found == max(shares) > 1


def test_saved_bases_hold_the_experts_too(tmp_path):
    base = EXPERTS["mixtral"]()
    inputs = tiny_inputs(base)
    config = SVFitConfig(
        rank=3, selection="mixed", save_bases=True, target_parameters=["experts.down_proj"], target_modules=[]
    )
    model = move(get_peft_model(copy.deepcopy(base), config))
    moved = output(model, inputs)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    shapes = {name.rpartition(".")[2]: tuple(value.shape) for name, value in stored.items()}
    assert shapes == {"svfit_delta": (4, 3), "svfit_u": (4, 16, 3), "svfit_s": (4, 3), "svfit_vh": (4, 3, 32)}
    # The bases come from the file, so a base in another dtype is right too.
    assert torch.equal(output(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path), inputs), moved)
    PeftModel.from_pretrained(base.bfloat16(), tmp_path)
