"""Sparse supports: the kernel against the dense expression, the places, peft's SHiRA, and merging bit by bit."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, ShiraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.backbones import TINY, tiny_inputs
from support.functional_checks import assert_same, gradients, kept_bytes
from support.operations import One
from support.properties import adapt, adapter_parameters, config, move, output
from torch import nn
from transformers import BertConfig, BertModel, ViTConfig, ViTForImageClassification

from peft_lab.adapters.weight.sparse_support import kernels
from peft_lab.adapters.weight.sparse_support.kernels import entries_linear
from peft_lab.errors import ConfigError


def _case(dtype: torch.dtype = torch.float64, out: int = 7, width: int = 5, count: int = 9):
    torch.manual_seed(0)
    indices = torch.randperm(out * width)[:count].sort().values.int()
    x = torch.randn(2, 3, width, dtype=dtype, requires_grad=True)
    values = torch.randn(count, dtype=dtype, requires_grad=True)
    return x, torch.randn(out, width, dtype=dtype), torch.randn(out, dtype=dtype), values, indices


def _dense(x, weight, bias, values, indices, shape):
    rows, columns = indices.long() // shape[1], indices.long() % shape[1]
    matrix = torch.zeros(shape, dtype=values.dtype).index_put((rows, columns), values)
    return F.linear(x, matrix if weight is None else weight + matrix, bias)


@pytest.mark.parametrize("cost", [0, 10**9], ids=["gathered", "blocked"])
@pytest.mark.parametrize("piece", [1, 12, 2**20])
@pytest.mark.parametrize("with_weight", [True, False])
@pytest.mark.parametrize("count", [0, 1, 9, 35])
def test_kernel_equals_the_dense_expression(cost, piece, with_weight, count, monkeypatch):
    monkeypatch.setattr(kernels, "_GATHER_COST", cost)
    monkeypatch.setattr(kernels, "_PIECE", piece)
    x, weight, bias, values, indices = _case(count=count)
    shape, base = weight.shape, weight if with_weight else None
    found = gradients(lambda x, v: entries_linear(x, base, bias, shape, v, indices), x, values)
    assert_same(found, gradients(lambda x, v: _dense(x, base, bias, v, indices, shape), x, values))
    if count == 9:
        assert torch.autograd.gradcheck(lambda x, v: entries_linear(x, base, bias, shape, v, indices), (x, values))


def test_a_trained_bias_gets_its_gradient():
    x, weight, bias, values, indices = _case()
    bias.requires_grad_()
    run = lambda x, b, v: entries_linear(x, weight, b, weight.shape, v, indices)  # noqa: E731
    dense = lambda x, b, v: _dense(x, weight, b, v, indices, weight.shape)  # noqa: E731
    assert_same(gradients(run, x, bias, values), gradients(dense, x, bias, values))


def test_no_matrix_is_kept_for_backward():
    x, weight, bias, values, indices = _case(torch.float32, 64, 48, 30)
    kept = kept_bytes(lambda: entries_linear(x, weight, bias, weight.shape, values, indices))
    held = {tensor.untyped_storage().data_ptr() for tensor in (x, weight, bias, values, indices)}
    assert set(kept) <= held


def test_gradient_of_the_entries_takes_no_dense_matrix(monkeypatch):
    """With blocks of one row, nothing that is made has more numbers than a row or the tokens have."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and not made._is_view():
                largest.append(made.numel())
            return made

    out, width, tokens = 40, 30, 4
    monkeypatch.setattr(kernels, "_PIECE", width)
    indices = torch.arange(0, out * width, 7)
    for cost in (0, 10**9):
        monkeypatch.setattr(kernels, "_GATHER_COST", cost)
        x, grad = torch.randn(tokens, width), torch.randn(tokens, out)
        with Sizes():
            found = kernels.entries_gradient(x, grad, indices)
        torch.testing.assert_close(found, (grad.T @ x).flatten()[indices])
        assert max(largest) <= max(len(indices), tokens * out) < out * width


@pytest.mark.parametrize("support", ["random", "magnitude"])
def test_equals_pefts_shira_on_the_same_entries(support):
    """Values, and the gradients of values and input; SHiRA has r (in + out) entries."""
    base = One(nn.Linear(12, 8))
    count = 2 * (12 + 8)
    ours = move(adapt("sparse_support", base, target_modules=["op"], support=support, density=count / 96))
    layer = ours.base_model.model.op
    mask = torch.zeros(96).scatter(0, layer.sparse_support_indices["default"].long(), 1.0).view(8, 12)
    settings = ShiraConfig(r=2, target_modules=["op"])
    settings.mask_fn = lambda base_layer, r, **_: mask
    theirs = get_peft_model(copy.deepcopy(base), settings)
    with torch.no_grad():
        theirs.base_model.model.op.shira_weight["default"].copy_(layer.sparse_support_values["default"])
    x = torch.randn(5, 12)
    found = []
    for model in (ours, theirs):
        x.grad = None
        out = model(x.requires_grad_())
        out.square().sum().backward()
        values = next(p for p in model.parameters() if p.requires_grad)
        found.append((out.detach(), x.grad, values.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_magnitude_chooses_by_size(family, largest):
    model = adapt("sparse_support", TINY[family](), support="magnitude", density=0.1, largest=largest)
    for path in model.targeted_module_names:
        layer = model.base_model.model.get_submodule(path)
        weight = layer.base_layer.weight
        sizes = (weight.T if family == "gpt2" else weight).detach().abs().flatten()
        chosen = torch.zeros(len(sizes), dtype=torch.bool)
        chosen[layer.sparse_support_indices["default"].long()] = True
        assert int(chosen.sum()) == round(0.1 * len(sizes))
        if largest:
            assert sizes[chosen].min() >= sizes[~chosen].max()
        else:
            assert sizes[chosen].max() <= sizes[~chosen].min()


def _pruned(family: str = "bert") -> nn.Module:
    base = TINY[family]()
    with torch.no_grad():
        for module in base.modules():
            if isinstance(module, nn.Linear):
                module.weight.masked_fill_(torch.rand(module.weight.shape) < 0.75, 0.0)
                module.weight[0, 0] = -1e-20  # a bit that adding zero and rounding must not lose
    return base


@pytest.mark.parametrize("density", [None, 0.1])
def test_zeros_of_a_pruned_base_are_trained_and_it_stays_as_it_is_elsewhere(density, tmp_path):
    base = _pruned()
    model = move(adapt("sparse_support", base, support="zeros", density=density))
    before, state = output(model, tiny_inputs(base)), copy.deepcopy(base.state_dict())
    layers = {path: model.base_model.model.get_submodule(path) for path in model.targeted_module_names}
    changed = {path: layer.sparse_support_indices["default"].long() for path, layer in layers.items()}
    for path, indices in changed.items():
        zeros = (state[f"{path}.weight"].flatten() == 0).nonzero()[:, 0]
        if density is None:
            assert torch.equal(indices, zeros)
        else:
            assert set(indices.tolist()) < set(zeros.tolist())
    model.save_pretrained(tmp_path)
    merged = model.merge_and_unload()
    torch.testing.assert_close(output(merged, tiny_inputs(base)), before)
    for path, indices in changed.items():
        same = merged.get_submodule(path).weight.flatten().view(torch.int32) == state[f"{path}.weight"].flatten().view(
            torch.int32
        )
        assert not same[indices].any()
        same[indices] = True
        assert same.all()
    stored = load_file(tmp_path / "adapter_model.safetensors")
    own = {name: value for name, value in stored.items() if "sparse_support" in name}
    assert sum(value.nbytes for value in own.values()) == 8 * sum(map(len, changed.values()))


@pytest.mark.parametrize("broken", ["twice", "negative", "too large"])
def test_places_outside_of_the_weight_are_refused(broken, tmp_path):
    base = One(nn.Linear(6, 4))
    adapt("sparse_support", base, target_modules=["op"], density=0.2).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    (name,) = (key for key in state if "indices" in key)
    at = {"twice": (1, int(state[name][0])), "negative": (0, -1), "too large": (-1, 24)}[broken]
    state[name][at[0]] = at[1]
    save_file(state, file)
    with pytest.raises(ConfigError, match="must be ascending indices below 24"):
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)


@pytest.mark.parametrize(("density", "share"), [(None, 0.01), (0.05, 0.05)])
def test_count_on_a_block_of_bert_base(density, share):
    with torch.device("meta"):
        base = BertModel(BertConfig(num_hidden_layers=1))
    model = get_peft_model(base, config("sparse_support", base, density=density))
    block = 2 * round(share * 768 * 768)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == block


def test_default_targets_on_a_vision_model():
    with torch.device("meta"):
        base = ViTForImageClassification(ViTConfig(num_hidden_layers=2))
    model = get_peft_model(base, config("sparse_support", base))
    assert len(model.targeted_module_names) == 4
    assert len(adapter_parameters(model)) == 4


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"density": 0.0}, "density=0.0 must be above 0"),
        ({"density": 1.5}, "density=1.5 must be above 0 and at most 1"),
        ({"largest": False}, 'largest=False goes with support="magnitude"'),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields, match):
    with pytest.raises(ConfigError, match=match):
        config("sparse_support", **fields)


def test_zeros_of_a_dense_base_are_refused():
    with pytest.raises(ConfigError, match=r'"op" has no zeros .* prune the base first'):
        adapt("sparse_support", One(nn.Linear(6, 4)), target_modules=["op"], support="zeros")
