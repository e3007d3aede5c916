"""SVFT against its formula for each pattern, and the published counts."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.backbones import TINY
from torch import nn
from transformers import ViTConfig, ViTModel
from transformers.pytorch_utils import Conv1D

from peft_lab.adapters import SVFTConfig
from peft_lab.errors import ConfigError
from peft_lab.export.to_lora import convert


class Toy(nn.Module):
    """An embedding, linear layers, a Conv1D and convolutions in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 12)
        self.linear, self.square = nn.Linear(12, 16), nn.Linear(16, 16)
        self.conv1d = Conv1D(10, 16)
        self.conv2d = nn.Conv2d(10, 6, 3, padding=1)
        self.grouped = nn.Conv2d(6, 4, 1, groups=2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.conv1d(torch.tanh(self.square(self.linear(self.embedding(ids)))))
        return self.grouped(self.conv2d(hidden.transpose(1, 2)[:, :, :, None]))


OPS = ["embedding", "linear", "square", "conv1d", "conv2d", "grouped"]


@pytest.fixture
def toy() -> Toy:
    torch.manual_seed(0)
    return Toy().eval()


def _move(model: nn.Module) -> None:
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "svft_m" in name or "svft_gate" in name:
            parameter.data = torch.randn_like(parameter) * 0.3


def _matrix(weight: torch.Tensor, kind: str) -> torch.Tensor:
    return weight.double().T if kind == "conv1d" else weight.double().flatten(1)


def _bases(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """U and Vh in float64, with the largest entry of each row of Vh positive."""
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    sign = vh[torch.arange(len(vh)), vh.abs().argmax(1)].sign()
    return u * sign, vh * sign[:, None]


def _pattern(fields: dict, side: int) -> list[tuple[int, int]]:
    """The places of the trained entries, for the patterns that depend on sizes alone, diagonal by diagonal."""
    width = 0 if fields["pattern"] == "plain" else fields["off_diagonals"]
    places = [(i, j) for i in range(side) for j in range(side) if abs(i - j) <= width]
    return sorted(places, key=lambda place: (place[1] - place[0], place[0]))


PATTERNS = [
    {"pattern": "plain"},
    {"pattern": "plain", "author_gate": True},
    {"pattern": "banded", "off_diagonals": 2},
    {"pattern": "banded", "off_diagonals": 1, "author_gate": True, "save_bases": True},
    {"pattern": "banded", "off_diagonals": 1, "rank": 3},
]


@pytest.mark.parametrize("fields", PATTERNS)
@pytest.mark.parametrize("rows", [2, 5])
@torch.no_grad()
def test_equals_the_paper_formula(toy, tmp_path, fields, rows):
    """Start, forward, reload, export and merge equal W + U M Vh in float64, M written out entry by entry."""
    ids, base, reference = torch.randint(0, 13, (rows, 5)), copy.deepcopy(toy), copy.deepcopy(toy).double()
    model = get_peft_model(toy, SVFTConfig(**fields, target_modules=OPS)).eval()
    assert torch.equal(model(ids), base(ids))
    _move(model)
    for kind in OPS:
        layer, op = getattr(model.base_model.model, kind), getattr(reference, kind)
        matrix = _matrix(op.weight, kind)
        u, vh = _bases(matrix)
        side = min(fields.get("rank", len(vh)), len(vh))
        gate = layer.svft_gate["default"].double().sigmoid() if "author_gate" in fields else 1.0
        changed, values = matrix.clone(), layer.svft_m["default"]
        for (i, j), value in zip(_pattern(fields, side), values.double(), strict=True):
            changed += gate * value * torch.outer(u[:, i], vh[j])
        op.weight.data = changed.T if kind == "conv1d" else changed.reshape(op.weight.shape)
    torch.testing.assert_close(model(ids).double(), reference(ids), atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()(ids), model(ids))
    assert max(convert(model).errors.values()) < 1e-6
    torch.testing.assert_close(model.merge_and_unload()(ids).double(), reference(ids), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_random_entries_are_drawn_without_replacement(toy):
    fields = {"pattern": "random", "entries": 100, "target_modules": ["square"]}
    layers = [
        get_peft_model(copy.deepcopy(toy), SVFTConfig(**fields, random_seed=seed)).base_model.model.square
        for seed in (0, 0, 1)
    ]
    places = [layer.svft_entries["default"] for layer in layers]
    assert torch.equal(places[0], places[1])
    assert not torch.equal(places[0], places[2])
    assert len(places[0].unique()) == 100 == layers[0].svft_m["default"].numel()
    assert 0 <= places[0].min() < places[0].max() < 256
    layer = layers[0]
    layer.svft_m["default"].copy_(torch.linspace(0, 0.99, 100))
    u, vh = _bases(_matrix(layer.base_layer.weight, "square"))
    expected = sum(
        index / 100 * torch.outer(u[:, place // 16], vh[place % 16]) for index, place in enumerate(places[0].tolist())
    )
    torch.testing.assert_close(layer.get_delta_weight("default").double(), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_top_k_takes_the_pairs_that_are_most_alike(toy):
    model = get_peft_model(toy, SVFTConfig(pattern="top_k", entries=9, target_modules=["square"]))
    layer = model.base_model.model.square
    u, vh = _bases(_matrix(layer.base_layer.weight, "square"))
    alike = (u.T @ vh.T).abs()
    assert {*layer.svft_entries["default"].tolist()} == {*alike.flatten().argsort(descending=True)[:9].tolist()}
    with pytest.raises(ConfigError, match=r'16 x 12; use pattern="banded"'):
        get_peft_model(Toy(), SVFTConfig(pattern="top_k", target_modules=["linear"]))


@pytest.mark.parametrize("pattern", ["random", "top_k"])
@torch.no_grad()
def test_places_travel_with_the_adapter(toy, tmp_path, pattern):
    """They are read from the file, and refused where they lie outside of M."""
    ids, base = torch.randint(0, 13, (2, 5)), copy.deepcopy(toy)
    config = SVFTConfig(pattern=pattern, entries=20, target_modules=["square"], save_bases=True)
    model = get_peft_model(toy, config).eval()
    _move(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()(ids), model(ids))
    assert max(convert(model).errors.values()) < 1e-6
    state = load_file(tmp_path / "adapter_model.safetensors")
    state["base_model.model.square.svft_entries"][3] = 256
    save_file(state, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match="from 0 to 255"):
        PeftModel.from_pretrained(base, tmp_path)


def _trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_published_counts():
    """ViT-B of the paper: query and value plain with the released gate, 18.5K; all 72 matrices banded, 0.27M."""
    with torch.device("meta"):
        base = ViTModel(ViTConfig(), add_pooling_layer=False)
    assert _trained(get_peft_model(copy.deepcopy(base), SVFTConfig(author_gate=True))) == 24 * (768 + 1) == 18_456
    count = 72 * (768 * (2 * 2 + 1) - 2 * (2 + 1))
    for pattern in ("banded", "random"):
        config = SVFTConfig(pattern=pattern, off_diagonals=2, target_modules="all-linear")
        assert _trained(get_peft_model(copy.deepcopy(base), config)) == count == 276_048


@pytest.mark.parametrize("width", [0, 1, 5, 11, 40])
def test_a_band_has_the_published_number_of_entries(toy, width):
    """N (2 d + 1) - d (d + 1), and all n * n where the band is wider than M."""
    model = get_peft_model(toy, SVFTConfig(pattern="banded", off_diagonals=width, target_modules=["linear"]))
    expected = sum(abs(i - j) <= width for i in range(12) for j in range(12))
    assert _trained(model) == expected == (144 if width > 11 else 12 * (2 * width + 1) - width * (width + 1))
    assert len(model.base_model.model.linear.places("default").unique()) == expected


@pytest.mark.parametrize(("family", "names"), [("bert", {"query", "value"}), ("vit", {"q_proj", "v_proj"})])
def test_default_targets(family, names):
    model = get_peft_model(TINY[family](), SVFTConfig())
    assert {name.rpartition(".")[2] for name in model.targeted_module_names} == names


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"off_diagonals": -1}, "off_diagonals=-1"),
        ({"entries": 5}, 'entries=5 is for pattern="random"'),
        ({"pattern": "random", "entries": 0}, "at least 1"),
        ({"rank": "half"}, "rank="),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        SVFTConfig(**fields)


def test_more_entries_than_the_matrix_has_are_refused(toy):
    with pytest.raises(ConfigError, match="give at most 144"):
        get_peft_model(toy, SVFTConfig(pattern="random", entries=145, target_modules=["linear"]))
