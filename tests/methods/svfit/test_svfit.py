"""SVFit against its formula, and what is its own: ranks, bases, fingerprints, the cost of its contraction."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_lab import AdapterMismatchError
from peft_lab.adapters import SVFitConfig
from peft_lab.errors import ConfigError


class Toy(nn.Module):
    """A linear layer, a Conv1D, a convolution and an embedding in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 12)
        self.linear = nn.Linear(12, 16)
        self.conv1d = Conv1D(10, 16)
        self.conv2d = nn.Conv2d(10, 6, 3, padding=1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.conv1d(torch.tanh(self.linear(self.embedding(ids))))
        return self.conv2d(hidden.transpose(1, 2)[:, :, :, None])


OPS = ["embedding", "linear", "conv1d", "conv2d"]


@pytest.fixture
def toy() -> Toy:
    torch.manual_seed(0)
    return Toy().eval()


def _move(model: nn.Module) -> None:
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "svfit_delta" in name:
            parameter.data = torch.randn_like(parameter) * 0.2


def _explicit(weight: torch.Tensor, delta: torch.Tensor, kind: str, rank: int) -> torch.Tensor:
    """The paper's W + U_r diag(delta) Vh_r in float64, written out."""
    matrix = weight.double().T if kind == "conv1d" else weight.double().flatten(1)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    changed = matrix + u[:, :rank] @ torch.diag(delta.double()) @ vh[:rank]
    return changed.T if kind == "conv1d" else changed.reshape(weight.shape)


@pytest.mark.parametrize("rank", [3, "full"])
def test_equals_the_paper_formula(toy, rank):
    ids = torch.randint(0, 13, (2, 5))
    reference = copy.deepcopy(toy).double()
    model = get_peft_model(toy, SVFitConfig(rank=rank, target_modules=OPS))
    _move(model)
    for kind in OPS:
        layer, op = getattr(model.base_model.model, kind), getattr(reference, kind)
        delta = layer.svfit_delta["default"].detach()
        op.weight.data = _explicit(layer.base_layer.weight.data, delta, kind, delta.numel())
    torch.testing.assert_close(model(ids).double(), reference(ids), atol=2e-6, rtol=2e-6)


def test_trains_the_singular_values_and_nothing_else(toy):
    model = get_peft_model(toy, SVFitConfig(rank=4, target_modules=OPS))
    trainable = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    assert set(trainable.values()) == {4}
    assert len(trainable) == 4
    merged = model.base_model.model.linear
    before = torch.linalg.svdvals(merged.base_layer.weight)
    with torch.no_grad():
        merged.svfit_delta["default"][:] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    model.merge_adapter()
    after = torch.linalg.svdvals(merged.base_layer.weight)
    expected = torch.cat([before[:4] + torch.tensor([4.0, 3.0, 2.0, 1.0]), before[4:]]).sort(descending=True)[0]
    torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-5)


def test_relative_parametrization_multiplies_the_singular_values(toy):
    model = get_peft_model(toy, SVFitConfig(rank="full", target_modules=["linear"], parametrization="relative"))
    layer = model.base_model.model.linear
    before = torch.linalg.svdvals(layer.base_layer.weight)
    with torch.no_grad():
        layer.svfit_delta["default"].fill_(0.5)
    model.merge_adapter()
    torch.testing.assert_close(torch.linalg.svdvals(layer.base_layer.weight), 1.5 * before, atol=1e-5, rtol=1e-5)


def test_file_holds_only_the_values_unless_bases_are_asked_for(toy, tmp_path):
    for save_bases in (False, True):
        model = get_peft_model(
            copy.deepcopy(toy), SVFitConfig(rank=4, target_modules=["linear"], save_bases=save_bases)
        )
        model.save_pretrained(tmp_path / str(save_bases))
        state = load_file(tmp_path / str(save_bases) / "adapter_model.safetensors")
        shapes = {k.rpartition(".")[2]: list(v.shape) for k, v in state.items()}
        bases = {"svfit_u": [16, 4], "svfit_s": [4], "svfit_vh": [4, 12]} if save_bases else {}
        assert shapes == {"svfit_delta": [4], **bases}


def _saved(toy: Toy, folder: str, **fields: object) -> nn.Module:
    model = get_peft_model(copy.deepcopy(toy), SVFitConfig(rank=4, target_modules=OPS, **fields))
    _move(model)
    model.save_pretrained(folder)
    return model.eval()


def test_other_weights_are_refused(toy, tmp_path):
    _saved(toy, tmp_path)
    other = copy.deepcopy(toy)
    with torch.no_grad():
        other.conv1d.weight[0, 0] += 1e-3
    with pytest.raises(AdapterMismatchError, match=r'"conv1d" differs .* same checkpoint'):
        PeftModel.from_pretrained(other, tmp_path)
    assert isinstance(other.linear, nn.Linear), "a refused adapter must leave the model as it was"


def test_other_dtype_of_the_same_weights_is_told_apart(toy, tmp_path):
    _saved(toy, tmp_path)
    with pytest.raises(AdapterMismatchError, match=r"same base in bfloat16.*load the backbone in float32"):
        PeftModel.from_pretrained(copy.deepcopy(toy).bfloat16(), tmp_path)


def test_saved_bases_serve_another_dtype(toy, tmp_path):
    ids = torch.randint(0, 13, (2, 5))
    expected = _saved(toy, tmp_path, save_bases=True)(ids)
    model = PeftModel.from_pretrained(copy.deepcopy(toy).bfloat16(), tmp_path).eval()
    torch.testing.assert_close(model(ids).float(), expected, atol=0.1, rtol=0.05)


def test_missing_module_and_other_shape_are_named(toy, tmp_path):
    _saved(toy, tmp_path)
    lacking = copy.deepcopy(toy)
    del lacking.conv2d
    with pytest.raises(AdapterMismatchError, match='no module "conv2d"'):
        PeftModel.from_pretrained(lacking, tmp_path)
    wider = copy.deepcopy(toy)
    wider.linear = nn.Linear(12, 17)
    with pytest.raises(AdapterMismatchError, match=r"shape \[17, 12\].*\[16, 12\]"):
        PeftModel.from_pretrained(wider, tmp_path)


def test_adapter_loads_on_a_base_that_has_another_adapter_merged(toy, tmp_path):
    ids = torch.randint(0, 13, (2, 5))
    expected = _saved(toy, tmp_path)(ids)
    model = get_peft_model(copy.deepcopy(toy), SVFitConfig(rank=2, target_modules=OPS))
    _move(model)
    model.merge_adapter()
    model.load_adapter(tmp_path, "second")
    model.unmerge_adapter()
    model.set_adapter("second")
    torch.testing.assert_close(model(ids), expected, atol=1e-6, rtol=1e-6)


CHOSEN = {"principal": [0, 1, 2, 3, 4], "minor": [-5, -4, -3, -2, -1], "mixed": [0, 1, 2, -2, -1]}


@pytest.mark.parametrize("save_bases", [False, True])
@pytest.mark.parametrize("parametrization", ["additive", "relative"])
@pytest.mark.parametrize("selection", CHOSEN)
@torch.no_grad()
def test_a_selection_of_singular_values(toy, selection, parametrization, save_bases, tmp_path):
    """Forward, merge, to-LoRA factors and a reload equal W + U diag(delta) Vh over the chosen triplets in float64."""
    ids = torch.randint(0, 13, (2, 5))
    fields = {"selection": selection, "parametrization": parametrization, "save_bases": save_bases}
    reference, plain = copy.deepcopy(toy).double(), copy.deepcopy(toy)
    model = get_peft_model(toy, SVFitConfig(rank=5, target_modules=OPS, **fields)).eval()
    torch.testing.assert_close(model(ids), plain(ids), atol=0, rtol=0)
    assert {p.numel() for p in model.parameters() if p.requires_grad} == {5}
    _move(model)
    for kind in OPS:
        layer, op = getattr(model.base_model.model, kind), getattr(reference, kind)
        matrix = op.weight.T if kind == "conv1d" else op.weight.flatten(1)
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        delta, chosen = layer.svfit_delta["default"].double(), CHOSEN[selection]
        delta = delta * s[chosen] if parametrization == "relative" else delta
        changed = matrix + u[:, chosen] @ torch.diag(delta) @ vh[chosen]
        b, a = layer.lora_factors("default")
        torch.testing.assert_close((b @ a).double(), changed - matrix, atol=1e-5, rtol=0)
        op.weight.data = changed.T if kind == "conv1d" else changed.reshape(op.weight.shape)
    torch.testing.assert_close(model(ids).double(), reference(ids), atol=2e-6, rtol=2e-6)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()
    assert torch.equal(loaded(ids), model(ids))
    torch.testing.assert_close(model.merge_and_unload()(ids).double(), reference(ids), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_selections_share_bases_and_a_batch(toy):
    ids, names = torch.randint(0, 13, (5, 5)), ["mixed", "__base__", "minor", "default", "relative"]
    model = get_peft_model(toy, SVFitConfig(rank=4, target_modules=OPS)).eval()
    for name in ("minor", "mixed"):
        model.add_adapter(name, SVFitConfig(rank=3, selection=name, target_modules=OPS))
    model.add_adapter(
        "relative", SVFitConfig(rank=2, selection="minor", parametrization="relative", target_modules=OPS)
    )
    _move(model)
    layer = model.base_model.model.linear
    assert {layer.bases(n).u.untyped_storage().data_ptr() for n in ("default", "minor", "relative")} == {
        layer.shared_bases.u.untyped_storage().data_ptr()
    }
    mixed = model(ids, adapter_names=names)
    for row, name in enumerate(names):
        if name != "__base__":
            model.set_adapter(name)
        with model.disable_adapter() if name == "__base__" else nullcontext():
            torch.testing.assert_close(mixed[row], model(ids)[row], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("rank", ["full", "energy:0.9"])
def test_a_selection_needs_a_number(rank):
    with pytest.raises(ConfigError, match='selection="mixed" needs a number as rank'):
        SVFitConfig(rank=rank, selection="mixed")


def test_degenerate_spectrum_warns(toy):
    toy.linear.weight.data = torch.eye(16, 12)
    with pytest.warns(UserWarning, match="not determined") as warned:
        get_peft_model(toy, SVFitConfig(rank=4, target_modules=["linear"]))
    assert len(warned) == 1


def test_adapters_of_other_rank_share_the_bases(toy):
    model = get_peft_model(toy, SVFitConfig(rank=8, target_modules=["linear"]))
    model.add_adapter("small", SVFitConfig(rank=3, target_modules=["linear"]))
    model.add_adapter("large", SVFitConfig(rank="full", target_modules=["linear"]))
    layer = model.base_model.model.linear
    assert layer.bases("small").u.data_ptr() == layer.bases("large").u.data_ptr()
    torch.testing.assert_close(layer.bases("default").vh, layer.bases("large").vh[:8], atol=1e-5, rtol=1e-5)


def test_bases_follow_the_model_but_stay_float32(toy):
    model = get_peft_model(toy, SVFitConfig(rank=4, target_modules=["linear"])).to(torch.bfloat16)
    assert model.base_model.model.linear.bases("default").u.dtype == torch.float32
    assert not [n for n, _ in model.named_buffers() if "svfit" in n]


def test_second_load_reads_the_cache(tmp_path, monkeypatch):
    from peft_lab.tuners.spectral import svd

    monkeypatch.setenv("PEFT_LAB_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(160, 140))
    get_peft_model(copy.deepcopy(base), SVFitConfig(rank=4, target_modules=["0"])).save_pretrained(tmp_path / "a")
    monkeypatch.setattr(svd, "_decompose", lambda *_: pytest.fail("the bases were computed again"))
    assert PeftModel.from_pretrained(base, tmp_path / "a").peft_config["default"].rank == 4


@torch.no_grad()
def test_adapters_with_and_without_stored_bases_share_a_batch(toy):
    ids = torch.randint(0, 13, (3, 5))
    model = get_peft_model(toy, SVFitConfig(rank=4, target_modules=OPS, save_bases=True)).eval()
    model.add_adapter("light", SVFitConfig(rank="full", target_modules=OPS))
    _move(model)
    mixed = model(ids, adapter_names=["light", "default", "__base__"])
    for row, name in enumerate(["light", "default"]):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[row], model(ids)[row], atol=2e-5, rtol=2e-5)
