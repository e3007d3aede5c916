"""Visual prompt tuning: by hand, published counts, dropout and numbers of prompts."""

from __future__ import annotations

import inspect

import pytest
import torch
from peft import get_peft_model
from support.backbones import TINY, tiny_inputs
from support.properties import adapt, adapter_parameters, assert_close, config, move, output
from transformers import ViTConfig, ViTForImageClassification

from peft_lab.errors import ConfigError
from peft_lab.tuners.registration import config_class


@pytest.mark.parametrize("projection", [None, 4])
@pytest.mark.parametrize("position", ["after", "before"])
@pytest.mark.parametrize("deep", [True, False])
@torch.no_grad()
def test_vpt_equals_blocks_run_by_hand(deep, position, projection):
    base = TINY["vit"]().eval()
    model = move(adapt("vpt", base, num_prompts=3, deep=deep, position=position, projection=projection))
    parameters = adapter_parameters(model)
    prompts = [p for name, p in parameters.items() if "prompts" in name]
    if projection:
        weight, bias = (
            next(p for n, p in parameters.items() if f"projection_{kind}" in n) for kind in ("weight", "bias")
        )
        prompts = [p @ weight.T + bias for p in prompts]
    pixels = tiny_inputs(base)["pixel_values"]
    at = 1 if position == "after" else 0
    x = base.vit.embeddings(pixels)
    for depth, block in enumerate(base.vit.layers):
        if depth == 0:
            x = torch.cat([x[:, :at], prompts[0].expand(2, -1, -1), x[:, at:]], 1)
        elif deep:
            x = torch.cat([x[:, :at], prompts[depth].expand(2, -1, -1), x[:, at + 3 :]], 1)
        x = block(x)
    x = torch.cat([x[:, :at], x[:, at + 3 :]], 1)
    assert_close(output(model, {"pixel_values": pixels}), base.classifier(base.vit.layernorm(x)[:, 0]), 1e-6)


@pytest.mark.parametrize(("fields", "expected"), [({}, 351_373), ({"deep": False}, 305_293 + 5 * 768)])
def test_published_counts_of_vpt(fields, expected):
    """SUN397 with 5 prompts on ViT-B/16, head included."""
    with torch.device("meta"):
        base = ViTForImageClassification(ViTConfig(num_labels=397))
    model = get_peft_model(base, config("vpt", base, num_prompts=5, **fields))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


def test_the_projection_starts_as_the_authors_linear_does():
    """Normal of variance 2 over its outputs; the bias is the Linear's own, uniform to one over the root of inputs."""
    with torch.device("meta"):
        base = ViTForImageClassification(ViTConfig())
    model = get_peft_model(base.to_empty(device="cpu"), config("vpt", projection=64, num_prompts=1, deep=False))
    weight, bias = (
        next(p for n, p in adapter_parameters(model).items() if f"projection_{kind}" in n)
        for kind in ("weight", "bias")
    )
    torch.manual_seed(0)
    reference = torch.nn.Linear(64, 768)
    torch.nn.init.kaiming_normal_(reference.weight, a=0, mode="fan_out")
    assert weight.shape == reference.weight.shape
    assert weight.std().item() == pytest.approx((2 / 768) ** 0.5, rel=0.02)
    assert weight.std().item() == pytest.approx(reference.weight.std().item(), rel=0.02)
    assert bias.abs().max() <= 1 / 8
    assert bias.std().item() == pytest.approx(reference.bias.std().item(), rel=0.1)
    assert bias.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.1)


def test_vpt_dropout_is_of_each_sample():
    base = TINY["vit"]()
    model = move(adapt("vpt", base, dropout=0.5)).train()
    pixels = tiny_inputs(base)["pixel_values"][:1].repeat(2, 1, 1, 1)
    logits = model(pixels).logits
    assert not torch.allclose(logits[0], logits[1])


def test_vpt_numbers_of_prompts_by_block():
    base = TINY["vit"]()
    model = adapt("vpt", base, num_prompts=[2, 7])
    assert [len(p) for name, p in adapter_parameters(model).items()] == [2, 7]
    with pytest.raises(ConfigError, match="3 numbers, but 2 blocks"):
        adapt("vpt", base, num_prompts=[1, 2, 3])
    assert inspect.signature(config_class("vpt")).parameters["deep"].default is True
