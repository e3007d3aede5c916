"""PETALface against its formula, and what is its own: scores, their way to the layers, merges for one weight."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
import transformers as hf
from peft import PeftModel, get_peft_model
from support.backbones import TINY, tiny_inputs
from support.properties import adapt, assert_close, move, output
from support.tiny_runs import make_image_backbone, make_image_task, options
from torch import Tensor, nn

import peft_lab
from peft_lab.adapters import PETALfaceConfig
from peft_lab.adapters.weight.petalface import register_quality
from peft_lab.adapters.weight.petalface.quality import sharpness
from peft_lab.cli import main
from peft_lab.errors import ConfigError
from peft_lab.training.run import train
from peft_lab.tuners import AdapterLayer


class TwinLinear(nn.Module):
    """The paper's layer in plain lines, for one image at a time."""

    def __init__(self, layer: Any, scale: float) -> None:
        super().__init__()
        self.base, self.scale = layer.base_layer, scale
        down, up = layer.petalface_A["default"].detach(), layer.petalface_B["default"].detach()
        self.pairs = [(down[i], up[:, i]) for i in (0, 1)]
        self.a = 0.0

    def forward(self, x: Tensor) -> Tensor:
        (a1, b1), (a2, b2) = self.pairs
        low = ((1 - self.a) * x) @ a1.T @ b1.T
        high = (self.a * x) @ a2.T @ b2.T
        return self.base(x) + self.scale * low + self.scale * high


def _plain(model: Any, scale: float = 1.0) -> nn.Module:
    """A copy of an adapted model with `TwinLinear` in the place of each layer."""
    plain = copy.deepcopy(model).base_model.model
    for name, layer in [(n, m) for n, m in plain.named_modules() if isinstance(m, AdapterLayer)]:
        parent, _, last = name.rpartition(".")
        setattr(plain.get_submodule(parent), last, TwinLinear(layer, scale))
    return plain


@torch.no_grad()
def _one_by_one(plain: nn.Module, inputs: dict[str, Tensor], weights: Tensor) -> Tensor:
    rows = []
    for row, a in enumerate(weights.tolist()):
        for module in plain.modules():
            if isinstance(module, TwinLinear):
                module.a = a
        rows.append(plain(**{name: value[row : row + 1] for name, value in inputs.items()}).logits)
    return torch.cat(rows)


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_equals_the_paper_formula_image_by_image(family):
    """In Swin several windows of an image have its weight."""
    base = TINY[family]()
    model = move(adapt("petalface", base, quality="column", threshold=0.25, scale=2.0, r=3))
    inputs, quality = tiny_inputs(base, batch=3), torch.tensor([0.1, 0.5, 0.95])
    expected = _one_by_one(_plain(model, 2.0), inputs, 0.5 + quality - 0.25)
    assert_close(output(model, inputs, quality=quality), expected)
    assert (output(model, inputs, quality=quality.flip(0)) - expected).abs().max() > 1e-3


def test_sharpness_is_computed_once_a_call_and_reaches_the_layers(monkeypatch):
    base = TINY["vit"]()
    inputs, calls = tiny_inputs(base, batch=3), []
    inputs["pixel_values"][1] = nn.functional.avg_pool2d(inputs["pixel_values"], 5, 1, 2)[1]
    register_quality("counted", lambda images: calls.append(len(images)) or sharpness(images))
    model = move(adapt("petalface", base, quality="counted"))
    expected = _one_by_one(_plain(model), inputs, sharpness(inputs["pixel_values"]))
    assert_close(output(model, inputs), expected)
    assert calls == [3]
    # a number in the call goes before the score
    given = torch.tensor([0.0, 0.5, 1.0])
    assert_close(output(model, inputs, quality_counted=given), _one_by_one(_plain(model), inputs, given))
    assert calls == [3]


def test_sharpness_is_the_variance_of_the_laplacian_and_ignores_normalisation():
    images = torch.rand(4, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    grey = images.mean(1)
    laplacian = (
        grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:] - 4 * grey[:, 1:-1, 1:-1]
    )
    ratio = laplacian.flatten(1).var(1, correction=0) / grey.flatten(1).var(1, correction=0)
    assert_close(sharpness(images), ratio / (ratio + 0.3))
    assert_close(sharpness(5 * images - 2), sharpness(images), 1e-4)
    blurred = nn.functional.avg_pool2d(images, 3, 1, 1)
    assert (sharpness(blurred) < sharpness(images)).all()
    assert sharpness(torch.ones(1, 3, 8, 8)).item() == 0
    assert sharpness(torch.ones(1, 3, 1, 1)).item() == 0


def test_texts_have_a_constant_or_a_column():
    base = TINY["bert"]()
    inputs = tiny_inputs(base)
    model = move(adapt("petalface", base, quality="constant", quality_value=0.9))
    assert_close(output(model, inputs), _one_by_one(_plain(model), inputs, torch.tensor([0.9, 0.9])))
    # without images there is no sharpness: both count alike, and a training says so
    model = move(adapt("petalface", base))
    assert_close(output(model, inputs), _one_by_one(_plain(model), inputs, torch.tensor([0.5, 0.5])))
    with pytest.warns(UserWarning, match="without pixel_values has no sharpness"):
        model(**inputs)
    model = adapt("petalface", base, quality="column")
    with pytest.raises(ConfigError, match='gives no quality, which the adapter reads from the column "quality"'):
        model(**inputs)
    with peft_lab.row_inputs(quality=torch.tensor([0.1, 0.2])):
        model(**inputs)


def test_dropout_acts_on_the_output_of_each_branch():
    layer = next(m for m in move(adapt("petalface", TINY["vit"](), dropout=0.5)).modules() if hasattr(m, "petalface_A"))
    layer.configs["default"].quality = "constant"
    x = torch.randn(2, 5, 16)
    half = layer.eval().delta_output("default", x)
    torch.manual_seed(0)
    drawn = torch.stack([layer.train().delta_output("default", x) for _ in range(2000)])
    assert_close(drawn.mean(0), half, 0.15)
    low = 0.5 * x @ layer.petalface_A["default"][0].T @ layer.petalface_B["default"][:, 0].T
    kept = torch.stack([0 * half, 2 * low, 2 * (half - low), 2 * half]).flatten(1)
    assert_close((drawn.flatten(1)[:, None] - kept).abs().min(1).values, torch.zeros(2000, half.numel()))


@pytest.mark.parametrize("weight", [0, 1])
def test_merges_for_good_or_bad_images_when_asked(weight, tmp_path):
    base = TINY["vit"]()
    inputs = tiny_inputs(base)
    model = move(adapt("petalface", base, quality="column"))
    with pytest.raises(NotImplementedError, match="merge_weight in its config"):
        model.merge_and_unload()
    with pytest.raises(NotImplementedError, match="merge_weight in its config"):
        model.merge_adapter()
    model.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    model.peft_config["default"].merge_weight = weight
    expected = output(model, inputs, quality=torch.full((2,), float(weight)))
    assert_close(output(model.merge_and_unload(), inputs), expected)


def test_merges_for_a_constant():
    base = TINY["bert"]()
    model = move(adapt("petalface", base, quality="constant", quality_value=0.8, threshold=0.6))
    expected = output(model, tiny_inputs(base))
    assert_close(output(model.merge_and_unload(), tiny_inputs(base)), expected)


def test_counts_two_low_rank_deltas():
    """The authors' Swin: embed 384, depths 2, 18, 2, r = 8; its released code has 1,130,496 in the attention."""
    settings = {"image_size": 120, "patch_size": 6, "embed_dim": 384, "depths": [2, 18, 2], "num_heads": [8, 16, 16]}
    with torch.device("meta"):
        base = hf.SwinModel(hf.SwinConfig(**settings, window_size=5), add_pooling_layer=False)
        model = get_peft_model(base, PETALfaceConfig())
    trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    # query, key and value are one linear layer there, with one A of each branch for the three
    widths = [384] * 2 + [768] * 18 + [1536] * 2
    assert sum(trained.values()) == sum(3 * 2 * 8 * (d + d) for d in widths)
    fused = sum(2 * 8 * (d + 3 * d) for d in widths)
    assert fused == 1_130_496


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"r": 0}, "at least 1"),
        ({"quality": "sharpnes"}, 'Did you mean "sharpness"'),
        ({"quality_value": 0.3}, "has no effect"),
        ({"dropout": 1.0}, "below 1"),
        ({"merge_weight": 0.5}, "0 or 1"),
    ],
)
def test_fields_that_make_no_sense_are_refused(fields, words):
    with pytest.raises(ConfigError, match=words):
        PETALfaceConfig(**fields)


def test_scores_are_checked():
    for name in ("column", "constant", "No Name"):
        with pytest.raises(ConfigError, match="cannot be called"):
            register_quality(name, sharpness)
    register_quality("scalar", lambda images: images.mean())
    model = adapt("petalface", TINY["vit"](), quality="scalar")
    with pytest.raises(ConfigError, match="for 2 images, expected one number each"):
        model(**tiny_inputs(TINY["vit"]()))


def test_the_command_merges_for_good_images(tmp_path, monkeypatch):
    task, backbone = make_image_task(tmp_path / "data"), make_image_backbone(tmp_path / "vit")
    done = train(options(task, backbone, tmp_path / "run", method="petalface", max_steps=2))
    with pytest.raises(ConfigError, match="merge_weight in its config"):
        peft_lab.merge(done.output_dir, tmp_path / "merged")
    with pytest.raises(ConfigError, match='Unknown key "scale" for a merge of method "petalface"'):
        peft_lab.merge(done.output_dir, tmp_path / "merged", method_args={"scale": 2.0})
    arguments = ["merge", str(done.output_dir), str(tmp_path / "merged"), "--method_args", "merge_weight=1"]
    monkeypatch.setattr(sys, "argv", ["peft-lab", *arguments])
    with pytest.raises(SystemExit) as leaving:
        main()
    assert not leaving.value.code
    merged = hf.AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    pixels = torch.randn(2, 3, *[merged.config.image_size] * 2)
    expected = output(done.model, {"pixel_values": pixels}, quality_sharpness=torch.ones(2))
    assert_close(output(merged, {"pixel_values": pixels}), expected)
