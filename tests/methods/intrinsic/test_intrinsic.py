"""Intrinsic dimension: the transform, the projection and its adjoint as matrices, counts, and what the file holds."""

from __future__ import annotations

import math

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from scipy.linalg import hadamard
from support.backbones import TINY, tiny_inputs
from support.properties import adapt, adapter_parameters, assert_close, config, move, output
from torch import nn
from transformers import BertConfig, BertModel, ViTConfig, ViTForImageClassification

from peft_lab.adapters.weight.intrinsic.hadamard import Fastfood, fwht, padded, project
from peft_lab.adapters.weight.intrinsic.method import block_of
from peft_lab.errors import ConfigError

#: d, size of the weight: padded by a little, exact powers, one number, and d larger than the weight.
SIZES = [(5, 30), (8, 64), (1, 7), (17, 16), (3, 1)]


def _matrix(projection: Fastfood, size: int) -> torch.Tensor:
    """The projection as a dense matrix (size, d), by the paper's formula."""
    n, d = len(projection.permutation), len(projection.signs)
    h = torch.tensor(hadamard(n), dtype=torch.float64)
    signs = torch.cat([projection.signs, torch.ones(n - d, dtype=torch.int8)]).double()
    shuffle = torch.eye(n, dtype=torch.float64)[projection.permutation]
    return (h @ projection.gaussian(torch.float64).diag() @ shuffle @ h @ signs.diag())[:size, :d]


@pytest.mark.parametrize("length", [1, 2, 8, 64])
def test_transform_is_the_hadamard_matrix(length):
    x = torch.randn(length, dtype=torch.float64)
    torch.testing.assert_close(fwht(x), torch.tensor(hadamard(length)).double() @ x)


@pytest.mark.parametrize(("d", "size"), SIZES)
def test_projection_and_adjoint_are_a_matrix_and_its_transpose(d, size):
    projection = Fastfood.draw(d, size, 3)
    assert len(projection.permutation) == padded(max(d, size))
    matrix = _matrix(projection, size)
    x, y = torch.randn(d, dtype=torch.float64), torch.randn(size, dtype=torch.float64)
    torch.testing.assert_close(projection.forward(x, size), matrix @ x)
    torch.testing.assert_close(projection.adjoint(y), matrix.T @ y)


@pytest.mark.parametrize(("d", "size"), SIZES)
@pytest.mark.parametrize("structure_aware", [True, False])
def test_gradients_by_finite_differences(d, size, structure_aware):
    projection = Fastfood.draw(d, size, 4)
    x = torch.randn(d, dtype=torch.float64, requires_grad=True)
    factor = torch.full((1,), 0.7, dtype=torch.float64, requires_grad=True) if structure_aware else None
    assert torch.autograd.gradcheck(lambda *values: project(*values, projection, size), (x, factor))


def test_isometry():
    d, size = 100, 384 * 100
    projection = Fastfood.draw(d, size, 0)
    columns = torch.stack([projection.forward(unit, size) for unit in torch.eye(d)], 1).double()
    gram = columns.T @ columns
    assert abs(gram.diag().mean().item() - 1) < 0.02
    off = gram - gram.diag().diag()
    # independent directions in `size` dimensions have products of this size
    assert off.square().sum().div(d * (d - 1)).sqrt() < 2 / math.sqrt(size)


def test_draws_depend_on_the_seed_alone():
    first = Fastfood.draw(10, 50, 7)
    torch.manual_seed(1)
    with torch.device("meta"), torch.inference_mode():
        second = Fastfood.draw(10, 50, 7)
    for name in ("signs", "permutation", "bits"):
        value = getattr(second, name)
        assert torch.equal(getattr(first, name), value)
        assert value.device.type == "cpu"
        assert not value.is_inference()
    assert not torch.equal(first.bits, Fastfood.draw(10, 50, 8).bits)


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("bert", {}),
        ("bert", {"lambda_granularity": "module"}),
        ("bert", {"structure_aware": False}),
        ("gpt2", {}),  # Conv1D stores (in, out)
    ],
)
@torch.no_grad()
def test_weights_are_those_of_the_formula(family, fields):
    base = TINY[family]().eval()
    model = move(adapt("intrinsic", base, d=20, **fields), scale=0.1)
    named = {name.removeprefix("base_model.model."): p for name, p in adapter_parameters(model).items()}
    (theta,) = (p for name, p in named.items() if "theta" in name)
    factors = {name.partition(".intrinsic_lambda")[0]: p for name, p in named.items() if "lambda" in name}
    by_block = {block_of(name): p for name, p in factors.items()}
    expected = base.state_dict()
    for path in model.targeted_module_names:
        weight = expected[f"{path}.weight"]
        layer = model.base_model.model.get_submodule(path)
        delta = _matrix(layer.projection("default"), weight.numel()) @ theta.double()
        factor = 1.0 if "structure_aware" in fields else factors.get(path, by_block[block_of(path)])
        shape = weight.T.shape if family == "gpt2" else weight.shape
        delta = (factor * delta).float().reshape(shape)
        expected[f"{path}.weight"] = weight + (delta.T if family == "gpt2" else delta)
    before = output(model, tiny_inputs(base))
    base.load_state_dict(expected)
    assert_close(before, output(base, tiny_inputs(base)))


@pytest.mark.parametrize(
    ("fields", "count"),
    [({}, 1000 + 12), ({"lambda_granularity": "module"}, 1000 + 72), ({"structure_aware": False}, 1000)],
)
def test_count_on_bert_base(fields, count):
    with torch.device("meta"):
        base = BertModel(BertConfig())
    model = get_peft_model(base, config("intrinsic", base, **fields))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    assert len(model.targeted_module_names) == 72


def test_default_targets_on_a_vision_model():
    with torch.device("meta"):
        base = ViTForImageClassification(ViTConfig(num_hidden_layers=2))
    model = get_peft_model(base, config("intrinsic", base))
    assert len(model.targeted_module_names) == 12
    assert sum(p.numel() for p in adapter_parameters(model).values()) == 1000 + 2


@pytest.mark.parametrize(
    ("path", "block"),
    [
        ("bert.encoder.layer.3.attention.self.query", "bert.encoder.layer.3"),
        ("swin.encoder.layers.0.blocks.1.intermediate.dense", "swin.encoder.layers.0.blocks.1"),
        ("model.layers.1.mlp.0", "model.layers.1"),
        ("pooler.dense", "pooler.dense"),
    ],
)
def test_blocks(path, block):
    assert block_of(path) == block


def test_file_has_seeds_in_place_of_projections_and_they_hold_under_other_names(tmp_path):
    base = TINY["bert"]().eval()
    model = move(adapt("intrinsic", base, d=50))
    inputs = tiny_inputs(base)
    output(model, inputs)  # draws the projections
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    own = [value for name, value in state.items() if "intrinsic" in name]
    layers = len(model.targeted_module_names)
    assert sum(value.numel() for value in own) == 50 + base.config.num_hidden_layers + layers

    encoder = PeftModel.from_pretrained(base.bert, tmp_path)
    with torch.no_grad():
        expected = model.base_model.model.bert(**inputs).last_hidden_state
        found = encoder(**inputs).last_hidden_state
    assert_close(found, expected)


def test_a_model_cast_to_half_keeps_its_projections():
    model = adapt("intrinsic", TINY["bert"](), d=50)
    path = model.targeted_module_names[0]
    before = model.base_model.model.get_submodule(path).projection("default").gaussian(torch.float32).clone()
    after = model.bfloat16().base_model.model.get_submodule(path).projection("default").gaussian(torch.float32)
    assert torch.equal(before, after)


def test_loading_other_seeds_draws_other_projections():
    first, second = (
        adapt("intrinsic", nn.Sequential(nn.Linear(4, 4)), target_modules=["0"], projection_seed=s) for s in (0, 1)
    )
    x = torch.randn(3, 4)
    for model in (first, second):
        move(model)(x)
    assert not torch.allclose(first(x), second(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))


def test_no_numbers_are_refused():
    with pytest.raises(ConfigError, match="d=0 must be at least 1"):
        config("intrinsic", d=0)
