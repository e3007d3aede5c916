"""What a training step of each method may cost, counted: FLOPs and saved activations relative to the frozen floor."""

from __future__ import annotations

import copy

import pytest
import torch
from support.properties import DRAWS, HEADS, IMAGES, KEEPS_HEAD, METHODS, adapt, as_read
from torch import nn
from torch._subclasses import FakeTensorMode
from transformers import ViTConfig, ViTForImageClassification

from peft_lab import registry
from peft_lab.training.step_cost import count_flops, frozen_floor, kept_activations, training_step


def _vit(width: int, layers: int, side: int, patch: int) -> nn.Module:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 6,
    }
    return ViTForImageClassification(ViTConfig(**sizes, image_size=side, patch_size=patch, num_labels=10)).train()


def _flops(model: nn.Module, shape: tuple[int, ...]) -> int:
    return count_flops(training_step(model, as_read(model, {"pixel_values": torch.randn(shape)})))


def _saved(model: nn.Module, shape: tuple[int, ...]) -> int:
    torch.manual_seed(1)
    inputs = as_read(model, {"pixel_values": torch.randn(shape)})
    with kept_activations(model, inputs) as kept:
        loss = model(**inputs).logits.square().mean()
        saved = kept.bytes()
    del loss
    return saved


#: Width 384, six layers, 8 images of 65 tokens: the model of the reference figures.
SMALL = (8, 3, 32, 32)


@pytest.fixture(scope="module")
def small():
    return _vit(384, 6, 32, 4)


@pytest.fixture(scope="module")
def floor(small):
    with frozen_floor(small) as model:
        saved = _saved(model, SMALL)
    return _floor_flops(small, SMALL), saved


def _floor_flops(model: nn.Module, shape: tuple[int, ...]) -> int:
    with frozen_floor(model):
        return _flops(model, shape)


@pytest.mark.full
@pytest.mark.parametrize("method", [*METHODS, *IMAGES, *KEEPS_HEAD, *DRAWS, *HEADS])
def test_default_configuration_stays_within_its_budget(method, small, floor):
    model = adapt(method, small).train()
    flops, saved = registry.method(method).budget
    assert _flops(model, SMALL) <= flops * floor[0]
    assert _saved(model, SMALL) <= saved * floor[1]


def test_svfit_at_rank_8_is_no_dearer_than_lora_at_rank_8(small):
    svfit, lora = adapt("svfit", small, rank=8).train(), adapt("lora", small, r=8).train()
    assert _flops(svfit, SMALL) <= _flops(lora, SMALL)
    assert _saved(svfit, SMALL) <= _saved(lora, SMALL)


def test_the_floor_reaches_every_layer(small, floor):
    """The floor would be a weak yardstick if its backward stopped early."""
    assert 0.98 * _flops(adapt("lora", small, r=1).train(), SMALL) < floor[0]
    assert floor[0] < 0.7 * _flops(copy.deepcopy(small).requires_grad_(True), SMALL)


@pytest.mark.full
def test_svfit_at_full_rank_at_8192_tokens_of_width_768():
    model, shape = _vit(768, 1, 128, 16), (126, 3, 128, 128)  # 126 images of 65 tokens: 8,190
    svfit = adapt("svfit", model, rank="full").train()
    # counted from the shapes alone, because the products themselves would take a minute
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert _flops(svfit, shape) <= 1.10 * _floor_flops(model, shape)
