"""Prompts of images under heads that read every patch: segmentation from the hidden states of several blocks."""

from __future__ import annotations

import copy

import pytest
import torch
from support.cover import cover
from support.properties import adapt, adapter_parameters, equal_weights, move
from torch import nn
from transformers import (
    BeitConfig,
    BeitForSemanticSegmentation,
    Data2VecVisionConfig,
    Data2VecVisionForImageClassification,
    Dinov2Config,
    DPTConfig,
    DPTForSemanticSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from peft_lab.errors import ConfigError

SIZES = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
IMAGES = {"image_size": 32, "patch_size": 8, "initializer_range": 0.2}
HEAD = {"num_labels": 2, "use_auxiliary_head": False}


def _beit() -> nn.Module:
    return BeitForSemanticSegmentation(
        BeitConfig(**SIZES, **IMAGES, **HEAD, out_indices=[1, 2, 3, 4], pool_scales=[1, 2], use_mask_token=False)
    )


def _upernet() -> nn.Module:
    sizes = {key: value for key, value in SIZES.items() if key != "intermediate_size"}
    backbone = Dinov2Config(**sizes, **IMAGES, mlp_ratio=2, out_features=["stage1", "stage2", "stage3", "stage4"])
    return UperNetForSemanticSegmentation(
        UperNetConfig(backbone_config=backbone, hidden_size=16, pool_scales=[1, 2], auxiliary_in_channels=16, **HEAD)
    )


def _dpt() -> nn.Module:
    neck = {"neck_hidden_sizes": [4, 8, 8, 8], "fusion_hidden_size": 8, "backbone_out_indices": [0, 1, 2, 3]}
    return DPTForSemanticSegmentation(DPTConfig(**SIZES, **IMAGES, num_labels=2, **neck, is_hybrid=False))


MODELS = {"beit": _beit, "upernet-dinov2": _upernet, "dpt": _dpt}
METHODS = {
    "dvpt": ("dvpt", {"variant": "paper", "num_prompts": 3}),
    "dvpt-author": ("dvpt", {"variant": "author_code", "num_prompts": 3}),
    "vpt": ("vpt", {"num_prompts": 3}),
    "vpt-shallow": ("vpt", {"num_prompts": 3, "deep": False}),
}


CASES = [(name, method) for name in MODELS for method in METHODS]
each = pytest.mark.parametrize(("name", "method"), cover(CASES))


def _model(name: str) -> nn.Module:
    """A random model whose head has weights large enough to pass on what it reads."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for path, parameter in model.named_parameters():
        if parameter.ndim > 1 and not path.startswith(("beit.", "backbone.", "dpt.")):
            nn.init.kaiming_normal_(parameter)
    return model


def _quadrants(count: int) -> dict[str, torch.Tensor]:
    """Noise with one bright quadrant, and the map that tells it."""
    draw = torch.Generator().manual_seed(0)
    pixels, labels = 0.3 * torch.randn(count, 3, 32, 32, generator=draw), torch.zeros(count, 32, 32, dtype=torch.long)
    for image, (pixel, label) in enumerate(zip(pixels, labels, strict=True)):
        rows, columns = (slice(16 * part, 16 * part + 16) for part in (image // 2 % 2, image % 2))
        pixel[:, rows, columns] += 1.5
        label[rows, columns] = 1
    return {"pixel_values": pixels, "labels": labels}


@each
def test_a_dense_head_reads_the_patches_alone(name, method):
    base, (method, fields) = _model(name), METHODS[method]
    pixels = {"pixel_values": _quadrants(2)["pixel_values"]}
    with torch.no_grad():
        expected = base(**pixels, output_hidden_states=True)
        model = move(adapt(method, base, modules_to_save=[], **fields), scale=1.0)
        got = model(**pixels, output_hidden_states=True)
        assert got.logits.shape == expected.logits.shape
        assert [h.shape for h in got.hidden_states] == [h.shape for h in expected.hidden_states]
        assert not torch.allclose(got.logits, expected.logits, atol=1e-3)
        with model.disable_adapter():
            assert torch.equal(model(**pixels).logits, expected.logits)
        assert torch.equal(model.unload()(**pixels).logits, expected.logits)


@pytest.mark.parametrize("name", MODELS)
def test_the_branch_adds_nothing_at_the_start(name):
    """Of DVPT's start only the prompts act, as plain shallow prompts of the same values do: its gates are closed."""
    base = _model(name)
    pixels = {"pixel_values": _quadrants(2)["pixel_values"]}
    for variant in ("paper", "author_code"):
        model = adapt("dvpt", base, modules_to_save=[], variant=variant, num_prompts=3)
        with torch.no_grad():
            start = model(**pixels).logits
            for parameter in (p for n, p in adapter_parameters(model).items() if "down" in n or "up" in n):
                parameter.normal_()
            assert torch.equal(model(**pixels).logits, start)


@each
def test_a_bright_quadrant_is_learned(name, method):
    base, (method, fields) = _model(name), METHODS[method]
    frozen, batch = copy.deepcopy(base), _quadrants(8)
    # transformers' head of BEiT reads hidden states up to the input of the last block
    read = {"layers_to_transform": [0, 1, 2]} if name == "beit" else {}
    model = adapt(method, base, modules_to_save=[], **fields, **read)
    optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=0.05)
    losses = []
    for _ in range(12):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in adapter_parameters(model).values())
    assert losses[-1] < 0.98 * losses[0]
    assert equal_weights(model.unload(), frozen)


def test_a_backbone_without_a_place_for_the_branch_is_refused():
    model = Data2VecVisionForImageClassification(Data2VecVisionConfig(**SIZES, **IMAGES, num_labels=2))
    with pytest.raises(ConfigError, match=r'"dvpt" has no place for its branch .* Data2VecVisionLayer \('):
        adapt("dvpt", model)
