"""Masks of pruned weights against torch's own pruning, and their storage."""

from __future__ import annotations

import copy

import pytest
import torch
from support.backbones import TINY
from torch import nn
from torch.nn.utils import prune
from transformers.pytorch_utils import Conv1D

from peft_lab.errors import ConfigError
from peft_lab.tuners.pruning import (
    apply_masks,
    count_pruned,
    layers_of_masks,
    magnitude_masks,
    masks_digest,
    pack_masks,
    prunable_layers,
    unpack_masks,
)


def random(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("name", ["vit", "resnet", "bert", "llama"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_entries_are_those_of_torchs_global_pruning(name, share):
    base = random(TINY[name]())
    layers, by_torch = prunable_layers(base), copy.deepcopy(base)
    parts = [(by_torch.get_submodule(path), "weight") for path in layers]
    prune.global_unstructured(parts, prune.L1Unstructured, amount=share)
    masks = magnitude_masks(layers, share)
    assert all(torch.equal(masks[path], part.weight_mask.bool()) for path, (part, _) in zip(masks, parts, strict=True))
    before = {path: layer.weight.detach().clone() for path, layer in layers.items()}
    apply_masks(layers, masks)
    assert all(torch.equal(layer.weight, before[path] * masks[path]) for path, layer in layers.items())
    total = sum(weight.numel() for weight in before.values())
    assert count_pruned(masks) == (round(share * total), total)


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_filters_are_those_of_torchs_pruning_of_each_layer(name):
    base = random(TINY[name]())
    layers, by_torch = prunable_layers(base), copy.deepcopy(base)
    masks = magnitude_masks(layers, 0.5, structured=True)
    for path, mask in masks.items():
        part = prune.ln_structured(by_torch.get_submodule(path), "weight", amount=0.5, n=2, dim=0)
        assert torch.equal(mask, part.weight_mask.bool()), path


def test_filters_of_conv1d_are_its_columns():
    layer = random(Conv1D(4, 3))  # 4 outputs of 3 inputs, stored (in, out)
    mask = magnitude_masks({"c": layer}, 0.5, structured=True)["c"]
    smallest = layer.weight.norm(dim=0).argsort()[:2]
    assert not mask[:, smallest].any()
    assert mask.sum() == 6


def test_heads_embeddings_and_norms_stay_dense():
    bert, llama = TINY["bert"](), TINY["llama"]()
    assert not any(path.startswith("classifier") for path in prunable_layers(bert))
    kinds = {type(layer) for layer in prunable_layers(llama).values()}
    assert kinds == {nn.Linear}
    assert not any("lm_head" in path or "score" in path or "embed" in path for path in prunable_layers(llama))
    tied = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False))
    tied[2].weight = tied[0].weight
    assert list(prunable_layers(tied)) == ["1"]


def test_of_equal_entries_the_last_go_and_layers_of_zeros_do_not_count():
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2))
    nn.init.ones_(model[0].weight)
    nn.init.zeros_(model[1].weight)
    layers = prunable_layers(model)
    assert list(layers) == ["0"]
    assert magnitude_masks(layers, 0.25)["0"].flatten().tolist() == [True] * 6 + [False] * 2


@pytest.mark.parametrize("structured", [False, True])
def test_masks_come_back_from_their_bits(structured):
    layers = {"a": random(Conv1D(5, 3)), "b": random(nn.Conv2d(3, 7, 2)), "c": random(nn.Linear(3, 9))}
    masks = magnitude_masks(layers, 0.4, structured)
    packed = pack_masks(layers, masks, structured)
    assert sum(len(bits) for bits in packed.values()) == (1 + 1 + 2 if structured else 2 + 11 + 4)
    again = unpack_masks(layers, packed, structured)
    assert all(torch.equal(again[path], masks[path]) for path in masks)
    assert masks_digest(again) == masks_digest(masks)
    again["b"][0] = ~again["b"][0]
    assert masks_digest(again) != masks_digest(masks)
    with pytest.raises(ConfigError, match='mask of "a" is not one of'):
        unpack_masks(layers, {**packed, "a": packed["a"][:-1]}, structured)


def test_layers_of_other_names_are_found_by_their_number():
    layers = {"bert.q": nn.Linear(2, 2), "bert.k": nn.Linear(2, 2)}
    assert layers_of_masks(layers, ["bert.k"]) == {"bert.k": layers["bert.k"]}
    assert layers_of_masks(layers, ["q", "k"]) == {"q": layers["bert.q"], "k": layers["bert.k"]}
    with pytest.raises(ConfigError, match="masks are for 1 layers, and the base has 2"):
        layers_of_masks(layers, ["q"])


def test_what_has_no_values_is_refused():
    with pytest.raises(ConfigError, match="no linear or convolution weights"):
        prunable_layers(nn.Sequential(nn.LayerNorm(3)))
    with pytest.raises(ConfigError, match=r'"0" is quantised, sharded or not loaded'):
        prunable_layers(nn.Sequential(nn.Linear(2, 2, device="meta")))
    with pytest.raises(ConfigError, match="prunes none of the filters"):
        magnitude_masks({"a": nn.Linear(3, 2)}, 0.1, structured=True)
