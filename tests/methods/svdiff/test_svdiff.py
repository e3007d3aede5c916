"""SVDiff against its formula on every kind of weight, norms included."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.backbones import TINY
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from peft_lab.adapters import SVDiffConfig
from peft_lab.errors import ConfigError


class Toy(nn.Module):
    """One op of each kind in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 12)
        self.linear = nn.Linear(12, 16)
        self.layer_norm = nn.LayerNorm(16)
        self.conv1d = Conv1D(10, 16)
        self.rms_norm, self.offset_norm = LlamaRMSNorm(10), GemmaRMSNorm(10)
        self.conv2d = nn.Conv2d(10, 6, 3, padding=1)
        self.batch_norm = nn.BatchNorm2d(6)
        self.grouped = nn.Conv2d(6, 4, 1, groups=2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.conv1d(self.layer_norm(self.linear(self.embedding(ids))))
        hidden = self.offset_norm(torch.tanh(self.rms_norm(hidden)))
        return self.grouped(self.batch_norm(self.conv2d(hidden.transpose(1, 2)[:, :, :, None])))


NORMS = ["layer_norm", "rms_norm", "offset_norm", "batch_norm"]
OPS = ["embedding", "linear", "conv1d", "conv2d", "grouped", *NORMS]


@pytest.fixture
def toy() -> Toy:
    torch.manual_seed(0)
    toy = Toy().eval()
    for norm in NORMS:
        for parameter in getattr(toy, norm).parameters():
            nn.init.normal_(parameter, 0.5)
    return toy


def _move(model: nn.Module) -> None:
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "svdiff_delta" in name:
            parameter.data = torch.randn_like(parameter)


def _explicit(weight: torch.Tensor, delta: torch.Tensor, kind: str, scale: float) -> torch.Tensor:
    """U diag(relu(sigma + scale delta)) Vh in float64, written out; a norm's weight is a matrix of one column."""
    weight, offset = weight.double(), 1.0 if kind == "offset_norm" else 0.0
    matrix = weight.T if kind == "conv1d" else weight[:, None] + offset if kind in NORMS else weight.flatten(1)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    changed = u @ torch.diag((s + scale * delta.double()).clamp_min(0)) @ vh
    return changed.T if kind == "conv1d" else changed.reshape(weight.shape) - offset


@pytest.mark.parametrize(("scale", "save_bases"), [(1.0, False), (2.0, True)])
@torch.no_grad()
def test_equals_the_paper_formula(toy, tmp_path, scale, save_bases):
    """Start, forward, reload and merge; some of the moved values are cut off at zero."""
    ids, base, reference = torch.randint(0, 13, (2, 5)), copy.deepcopy(toy), copy.deepcopy(toy).double()
    model = get_peft_model(toy, SVDiffConfig(scale=scale, save_bases=save_bases, target_modules=OPS)).eval()
    assert torch.equal(model(ids), base(ids))
    _move(model)
    cut = 0
    for kind in OPS:
        layer, op = getattr(model.base_model.model, kind), getattr(reference, kind)
        delta = layer.svdiff_delta["default"]
        assert delta.shape == ((1,) if kind in NORMS else (min(layer.op.matrix(op.weight).shape),))
        cut += int((layer.bases("default").s + scale * delta < 0).sum())
        op.weight.data = _explicit(op.weight, delta, kind, scale)
    assert cut > 0
    torch.testing.assert_close(model(ids).double(), reference(ids), atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()(ids), model(ids))
    torch.testing.assert_close(model.merge_and_unload()(ids).double(), reference(ids), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_norm_with_one_adapter_merged_and_another_on(toy):
    ids = torch.randint(0, 13, (2, 5))
    model = get_peft_model(toy, SVDiffConfig(target_modules=NORMS)).eval()
    model.add_adapter("other", SVDiffConfig(target_modules=NORMS))
    _move(model)
    model.base_model.set_adapter(["default", "other"])
    together = model(ids)
    model.base_model.merge_adapter(["default"])
    torch.testing.assert_close(model(ids), together, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_adapters_with_and_without_stored_bases_share_a_batch(toy):
    ids, names = torch.randint(0, 13, (3, 5)), ["stored", "default", "__base__"]
    model = get_peft_model(toy, SVDiffConfig(target_modules=OPS)).eval()
    model.add_adapter("stored", SVDiffConfig(target_modules=OPS, save_bases=True))
    _move(model)
    for rows in (names, ["default", "default", "__base__"]):
        mixed = model(ids, adapter_names=rows)
        for row, name in enumerate(rows[:2]):
            model.set_adapter(name)
            torch.testing.assert_close(mixed[row], model(ids)[row], atol=2e-5, rtol=2e-5)


def test_a_norm_of_zeros_stays_as_it_is(toy):
    nn.init.zeros_(toy.layer_norm.weight)
    model = get_peft_model(toy, SVDiffConfig(target_modules=["layer_norm"])).eval()
    ids, before = torch.randint(0, 13, (2, 5)), copy.deepcopy(toy)
    _move(model)
    out = model(ids)
    out.sum().backward()
    assert torch.equal(out, before(ids))
    assert model.base_model.model.layer_norm.svdiff_delta["default"].grad.isfinite().all()


def test_count_is_the_sum_of_smaller_sides_and_one_for_each_norm():
    """ViT-B/16: 12 blocks of 6 matrices with smaller side 768 and 2 norms."""
    from transformers import ViTConfig, ViTForImageClassification

    with torch.device("meta"):
        base = ViTForImageClassification(ViTConfig(num_labels=10))
    model = get_peft_model(base, SVDiffConfig(modules_to_save=[]))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 12 * (6 * 768 + 2)


@pytest.mark.parametrize(("family", "norm"), [("bert", "LayerNorm"), ("vit", "layernorm_after")])
def test_default_targets(family, norm):
    names = get_peft_model(TINY[family](), SVDiffConfig()).targeted_module_names
    assert {n.rpartition(".")[2] for n in names} >= {norm}
    assert all(f".{part}." in f".{'.'.join(names)}." for part in ("attention", "0", "1"))
    assert not [n for n in names if "embed" in n.lower() or "classifier" in n]


def test_a_scale_of_zero_is_refused():
    with pytest.raises(ConfigError, match=r"scale=0\.0"):
        SVDiffConfig(scale=0.0)
