"""Moment probing and MP+: the formula by hand on images and texts, the published count, and the cost of a step."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from support.backbones import MODELS, tiny_inputs
from support.properties import adapt, adapter_parameters, assert_close, config, move, output
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from peft_lab.errors import ConfigError
from peft_lab.training.step_cost import count_flops, training_step
from peft_lab.tuners import HeadInput


class Reference(nn.Module):
    """The head as the paper draws it: modules of torch, one row at a time."""

    def __init__(self, values: dict[str, Tensor], heads: int) -> None:
        super().__init__()
        self.values, self.heads = values, heads

    def forward(self, pooled: Tensor, tokens: Tensor) -> Tensor:
        v = self.values
        hidden = tokens @ v["projection"].T + v["projection_bias"]
        heads = [F.layer_norm(h, h.shape[-1:], v["norm"], v["norm_bias"]) for h in hidden.chunk(self.heads, -1)]
        maps = []
        for left, right in itertools.pairwise(heads):
            covariance = torch.zeros(left.shape[1], right.shape[1])
            for a, b in zip(left - left.mean(), right - right.mean(), strict=True):
                covariance += torch.outer(a, b) / len(tokens)
            maps.append(covariance / covariance.norm(dim=0, keepdim=True))
        shrunk = F.conv2d(torch.stack(maps)[None], v["conv1"], stride=2)
        flat = F.conv2d(F.gelu(shrunk), v["conv2"], stride=2).flatten()
        return (v["first"] @ pooled + v["first_bias"] + v["second"] @ flat + v["second_bias"]) / 2


def reference(model: Any, method: str, heads: int) -> Reference:
    prefix = f"{method}_"
    named = {n.partition(prefix)[2].removesuffix(".default"): p for n, p in adapter_parameters(model).items()}
    return Reference(named, heads)


@pytest.mark.parametrize("heads", [4, 2])
@torch.no_grad()
def test_formula_on_images(heads: int) -> None:
    base = MODELS["vit"]().eval()
    model = move(adapt("moment_probing", base, projection_dim=48, num_heads=heads), scale=1.0)
    inputs = tiny_inputs(base)
    hidden = base.vit(**inputs).last_hidden_state
    by_hand = reference(model, "moment_probing", heads)
    assert_close(output(model, inputs), torch.stack([by_hand(row[0], row[1:]) for row in hidden]))


@torch.no_grad()
def test_formula_on_texts_leaves_padding_out() -> None:
    base = MODELS["bert"]().eval()
    model = move(adapt("moment_probing", base, projection_dim=32), scale=1.0)
    ids = torch.randint(3, 99, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    out = base.bert(input_ids=ids, attention_mask=mask)
    by_hand, rows = (
        reference(model, "moment_probing", 4),
        zip(out.pooler_output, out.last_hidden_state, mask, strict=True),
    )
    expected = torch.stack([by_hand(pooled, hidden[: int(kept.sum())]) for pooled, hidden, kept in rows])
    assert_close(output(model, {"input_ids": ids, "attention_mask": mask}), expected)


def test_published_count() -> None:
    with torch.device("meta"):
        base = ViTForImageClassification(ViTConfig(num_labels=1000))
    model = get_peft_model(base, config("moment_probing", base))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 4_047_146


def test_a_step_costs_at_most_a_tenth_more_than_the_head_alone() -> None:
    """ViT-B/16 at 224 pixels, 100 classes; on the meta device, so that nothing is computed."""
    with torch.device("meta"):
        base = ViTForImageClassification(ViTConfig(num_labels=100))
        inputs = {"pixel_values": torch.empty(2, 3, 224, 224)}
    base.requires_grad_(False).classifier.requires_grad_(True)
    alone = count_flops(training_step(base, inputs))
    model = get_peft_model(base, config("moment_probing", base)).train()
    assert alone < count_flops(training_step(model, inputs)) <= 1.1 * alone


@pytest.mark.parametrize("fields", [{"num_heads": 1}, {"num_heads": 3}, {"projection_dim": 16}])
def test_heads_that_do_not_fit_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="projection_dim"):
        config("moment_probing", **fields)


def test_a_backbone_without_tokens_is_refused() -> None:
    layer = next(m for m in adapt("moment_probing", MODELS["vit"]()).modules() if hasattr(m, "second_moments"))
    with pytest.raises(ConfigError, match="gives its head none"):
        layer.logits("default", HeadInput(torch.zeros(1, 16)))


@torch.no_grad()
def test_formula_of_the_recalibration() -> None:
    """ViT: x + b + (1 + w) mlp(norm(x)) with w and b from x behind attention, then the head of moments."""
    base = MODELS["vit"]().eval()
    model = move(adapt("mp_plus", base, bottleneck_dim=3), scale=1.0)
    named = {name.removesuffix(".default"): p for name, p in adapter_parameters(model).items()}
    inputs = tiny_inputs(base)
    x = base.vit.embeddings(inputs["pixel_values"])
    for index, block in enumerate(base.vit.layers):
        down, weight, bias = (
            next(p for n, p in named.items() if n.endswith(f"layers.{index}.mp_plus_{part}"))
            for part in ("down", "up_weight", "up_bias")
        )
        x = x + block.attention(block.layernorm_before(x))[0]
        hidden = torch.relu(x @ down.T)
        x = x + hidden @ bias.T + (1 + hidden @ weight.T) * block.mlp(block.layernorm_after(x))
    hidden = base.vit.layernorm(x)
    by_hand = reference(model, "mp_plus", 4)
    assert_close(output(model, inputs), torch.stack([by_hand(row[0], row[1:]) for row in hidden]))


def test_published_count_of_the_recalibration() -> None:
    with torch.device("meta"):
        base = ViTForImageClassification(ViTConfig(num_labels=1000))
    model = get_peft_model(base, config("mp_plus", base))
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert sum(count for name, count in trained.items() if ".layers." in name) == 442_368
    assert sum(trained.values()) == 442_368 + 4_047_146


def test_blocks_without_a_norm_before_the_mlp_are_refused() -> None:
    with pytest.raises(ConfigError, match="no place"):
        get_peft_model(MODELS["convnext"](), config("mp_plus"))
