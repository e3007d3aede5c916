"""LoRA-XS against its formula, peft's PSOFT and the published count."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, PsoftConfig, get_peft_model
from safetensors.torch import load_file
from support.backbones import TINY
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_lab.adapters import LoraXSConfig
from peft_lab.errors import ConfigError
from peft_lab.export.to_lora import convert


class Toy(nn.Module):
    """An embedding, a linear layer, a Conv1D and a convolution with groups in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 12)
        self.linear = nn.Linear(12, 16)
        self.conv1d = Conv1D(10, 16)
        self.conv2d = nn.Conv2d(10, 6, 3, padding=1)
        self.grouped = nn.Conv2d(6, 4, 1, groups=2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.conv1d(torch.tanh(self.linear(self.embedding(ids))))
        return self.grouped(self.conv2d(hidden.transpose(1, 2)[:, :, :, None]))


OPS = ["embedding", "linear", "conv1d", "conv2d", "grouped"]


@pytest.fixture
def toy() -> Toy:
    torch.manual_seed(0)
    return Toy().eval()


def _move(model: nn.Module) -> nn.Module:
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_xs_core" in name:
            parameter.data = torch.randn_like(parameter) * 0.3
    return model


@torch.no_grad()
def _explicit(weight: torch.Tensor, core: torch.Tensor, kind: str, scale: float) -> torch.Tensor:
    """W + scale U_r R diag(sigma_r) Vh_r in float64, with the largest entry of each row of Vh positive."""
    matrix = weight.double().T if kind == "conv1d" else weight.double().flatten(1)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    sign = vh[torch.arange(len(vh)), vh.abs().argmax(1)].sign()
    rank = len(core)
    left, right = (u * sign)[:, :rank], (vh * sign[:, None])[:rank]
    changed = matrix + scale * left @ core.double() @ torch.diag(s[:rank]) @ right
    return changed.T if kind == "conv1d" else changed.reshape(weight.shape)


@pytest.mark.parametrize(("r", "alpha", "save_bases"), [(3, 3.0, False), (3, 7.5, True), (64, 16.0, False)])
@torch.no_grad()
def test_equals_the_paper_formula(toy, tmp_path, r, alpha, save_bases):
    """Forward, reload, LoRA export and merge equal the formula; a rank above a matrix takes all of its triplets."""
    ids, base, reference = torch.randint(0, 13, (2, 5)), copy.deepcopy(toy), copy.deepcopy(toy).double()
    config = LoraXSConfig(r=r, alpha=alpha, save_bases=save_bases, target_modules=OPS)
    model = get_peft_model(toy, config).eval()
    assert torch.equal(model(ids), base(ids))
    _move(model)
    for kind in OPS:
        layer, op = getattr(model.base_model.model, kind), getattr(reference, kind)
        core = layer.lora_xs_core["default"]
        assert core.shape == (min(r, *layer.op.matrix(op.weight).shape),) * 2
        op.weight.data = _explicit(op.weight, core, kind, alpha / r)
    torch.testing.assert_close(model(ids).double(), reference(ids), atol=3e-6, rtol=3e-6)
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == len(OPS) * (4 if save_bases else 1)
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()(ids), model(ids))
    exported = convert(model)
    assert max(exported.errors.values()) < 1e-6
    torch.testing.assert_close(model.merge_and_unload()(ids).double(), reference(ids), atol=5e-6, rtol=5e-6)


@torch.no_grad()
def test_equals_psoft_of_peft():
    """PSOFT without its constraints: R' = I + R there, with Sigma before the core and not behind it."""
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(12, 16, bias=False)), torch.randn(7, 12)
    ours = get_peft_model(copy.deepcopy(base), LoraXSConfig(r=5, alpha=5.0, target_modules=["0"]))
    fields = {"psoft_orth": False, "psoft_mag_a": False, "psoft_mag_b": False, "psoft_alpha": 5}
    theirs = get_peft_model(copy.deepcopy(base), PsoftConfig(r=5, target_modules=["0"], **fields))
    layer, other, core = ours.base_model.model[0], theirs.base_model.model[0], torch.randn(5, 5) * 0.3
    bases = layer.bases("default")
    # peft leaves the signs of the singular pairs as they come.
    right, _ = other._get_psoft_ab_cache_buffers("default")
    sign = (bases.vh * right).sum(1).sign()
    other.psoft_R["default"].weight.copy_(torch.eye(5) + sign[:, None] * core * sign)
    layer.lora_xs_core["default"].copy_(bases.s[:, None] * core / bases.s)
    expected = other.get_delta_weight("default")
    torch.testing.assert_close(layer.get_delta_weight("default"), expected, atol=2e-7, rtol=0)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-6, rtol=1e-6)


def test_count_is_the_sum_of_squared_ranks():
    """Query and value of the 12 blocks of BERT-base at the rank 25 of the paper: 24 * 625."""
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        base = BertModel(BertConfig())
    model = get_peft_model(base, LoraXSConfig(r=25))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 24 * 25**2


@pytest.mark.parametrize(("family", "names"), [("bert", {"query", "value"}), ("vit", {"q_proj", "v_proj"})])
def test_default_targets(family, names):
    model = get_peft_model(TINY[family](), LoraXSConfig(r=4))
    assert {name.rpartition(".")[2] for name in model.targeted_module_names} == names


def test_the_authors_start_is_small_and_not_zero(toy):
    model = get_peft_model(toy, LoraXSConfig(r=8, init_std=1e-5, target_modules=["linear"]))
    core = model.base_model.model.linear.lora_xs_core["default"]
    assert 3e-6 < core.std() < 3e-5


def test_degenerate_spectrum_warns(toy):
    toy.linear.weight.data = torch.eye(16, 12)
    with pytest.warns(UserWarning, match="3 of 4 singular values .* not determined") as warned:
        get_peft_model(toy, LoraXSConfig(r=4, target_modules=["linear"]))
    assert len(warned) == 1


@torch.no_grad()
def test_ranks_share_bases_and_a_batch(toy):
    ids = torch.randint(0, 13, (4, 5))
    model = get_peft_model(toy, LoraXSConfig(r=2, alpha=3.0, target_modules=OPS)).eval()
    model.add_adapter("large", LoraXSConfig(r=5, target_modules=OPS))
    model.add_adapter("saved", LoraXSConfig(r=4, target_modules=OPS, save_bases=True))
    _move(model)
    layer = model.base_model.model.linear
    assert layer.bases("default").u.data_ptr() == layer.bases("large").u.data_ptr()
    for names in (["large", "__base__", "default", "large"], ["saved", "__base__", "default", "large"]):
        mixed = model(ids, adapter_names=names)
        for row, name in enumerate(names):
            if name != "__base__":
                model.set_adapter(name)
                torch.testing.assert_close(mixed[row], model(ids)[row], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("fields", [{"r": 0}, {"alpha": 0.0}, {"alpha": -1.0}, {"init_std": -1e-5}])
def test_bad_fields_are_refused(fields):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        LoraXSConfig(**fields)
