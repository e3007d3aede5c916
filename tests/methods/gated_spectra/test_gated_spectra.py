"""Gated spectral components against their formula, with a learned gate and with groups by row."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.backbones import TINY, tiny_inputs
from support.properties import adapt, assert_close, move, output
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from peft_lab.adapters import GatedSpectraConfig
from peft_lab.errors import ConfigError
from peft_lab.tuners import AdapterLayer


def _plain(model: nn.Module, change) -> nn.Module:
    """A copy of an adapted model whose layers are the base and `change(layer, x)`, component by component."""

    class Plain(nn.Module):
        def __init__(self, layer: AdapterLayer) -> None:
            super().__init__()
            self.layer, self.base = [layer], layer.base_layer

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + change(self.layer[0], x)

    plain = copy.deepcopy(model).base_model.model
    for name, layer in [(n, m) for n, m in plain.named_modules() if isinstance(m, AdapterLayer)]:
        parent, _, last = name.rpartition(".")
        setattr(plain.get_submodule(parent), last, Plain(layer))
    return plain


def _component(layer: AdapterLayer, index: int, x: Tensor) -> Tensor:
    """sigma_i u_i (v_i . x)."""
    left, right = layer.gated_spectra_left["default"][:, index], layer.gated_spectra_right["default"][index]
    return layer.gated_spectra_sigma["default"][index] * (x @ right)[..., None] * left


def _learned(layer: AdapterLayer, x: Tensor) -> Tensor:
    scores = (x @ layer.gated_spectra_gate["default"].T).exp()
    gates = scores / scores.sum(-1, keepdim=True)
    return sum(gates[..., i, None] * _component(layer, i, x) for i in range(gates.shape[-1]))


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_learned_gate_is_a_softmax_of_each_token(family):
    base = TINY[family]()
    model = move(adapt("gated_spectra", base, components=3))
    inputs = tiny_inputs(base)
    assert_close(output(model, inputs), output(_plain(model, _learned), inputs))


@torch.no_grad()
def test_a_row_has_the_components_of_its_group_alone():
    base = TINY["vit"]()
    model = move(adapt("gated_spectra", base, gate="column", components=5, groups=2))
    inputs, groups = tiny_inputs(base, batch=3), torch.tensor([1, 0, 1])
    # Five components in two groups: 0, 1 and 2 are the first group, 3 and 4 the second.
    members = {0: (0, 1, 2), 1: (3, 4)}
    mixed = output(model, inputs, component_group=groups)
    for row, group in enumerate(groups.tolist()):
        plain = _plain(model, lambda layer, x, g=group: sum(_component(layer, i, x) for i in members[g]))
        one = {name: value[row : row + 1] for name, value in inputs.items()}
        assert_close(mixed[row : row + 1], output(plain, one))
    assert (output(model, inputs, component_group=1 - groups) - mixed).abs().max() > 1e-3
    with pytest.raises(ConfigError, match="from 0 to 1 for groups=2"):
        model(**inputs, component_group=groups + 1)
    with pytest.raises(ConfigError, match="component_group"):
        model(**inputs)


def test_components_of_other_groups_get_no_gradient():
    base = TINY["vit"]()
    model = move(adapt("gated_spectra", base, gate="column", components=4, groups=2))
    model(**tiny_inputs(base, batch=2), component_group=torch.tensor([1, 1])).logits.sum().backward()
    sigma = next(p for n, p in model.named_parameters() if "gated_spectra_sigma" in n)
    assert sigma.grad[:2].abs().sum() == 0 < sigma.grad[2:].abs().min()


def test_vectors_start_at_the_last_singular_vectors_and_travel_with_the_file(tmp_path):
    base = nn.Sequential(nn.Linear(12, 16))
    model = get_peft_model(copy.deepcopy(base), GatedSpectraConfig(components=3, target_modules=["0"]))
    layer = model.base_model.model[0]
    left, right = layer.gated_spectra_left["default"], layer.gated_spectra_right["default"]
    values = torch.linalg.svdvals(base[0].weight)[-3:]
    torch.testing.assert_close(left.T @ base[0].weight @ right.T, torch.diag(values), atol=1e-5, rtol=0)
    move(model).save_pretrained(tmp_path)
    x = torch.randn(4, 12)
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path)(x), model.eval()(x))


@pytest.mark.parametrize(("gate", "each"), [("learned", 768 + 768 + 1 + 768), ("column", 768 + 768 + 1)])
def test_count(gate, each):
    """Query and value of BERT-base, with 8 components."""
    with torch.device("meta"):
        base = BertModel(BertConfig())
    model = get_peft_model(base, GatedSpectraConfig(components=8, gate=gate))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 24 * 8 * each


@pytest.mark.parametrize(("family", "names"), [("bert", {"query", "value"}), ("vit", {"q_proj", "v_proj"})])
def test_default_targets(family, names):
    model = get_peft_model(TINY[family](), GatedSpectraConfig())
    assert {name.rpartition(".")[2] for name in model.targeted_module_names} == names


@pytest.mark.parametrize(
    "fields", [{"components": 0}, {"groups": 0}, {"groups": 9, "gate": "column"}, {"groups": 7, "gate": "column"}]
)
def test_bad_fields_are_refused(fields):
    with pytest.raises(ConfigError, match=f"{next(iter(fields))}="):
        get_peft_model(nn.Sequential(nn.Linear(12, 6)), GatedSpectraConfig(target_modules=["0"], **fields))
