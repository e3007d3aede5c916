"""SSF against its formula, and what is its own: what is folded where, which ops get a shift."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModel, LlamaConfig, ResNetConfig, ViTConfig

from peft_lab.adapters import SSFConfig
from peft_lab.errors import ConfigError


def _vit() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return AutoModel.from_config(ViTConfig(**sizes, image_size=8, patch_size=4), add_pooling_layer=False).eval()


def test_equals_the_paper_formula_behind_every_op():
    """Hooks that scale and shift each op's output, as the paper draws it, on channels chosen by the op's type."""
    base, images = _vit(), torch.randn(2, 3, 8, 8)
    model = get_peft_model(copy.deepcopy(base), SSFConfig(init_std=0.3)).eval()
    hooked = 0
    for name, module in model.base_model.model.named_modules():
        if not hasattr(module, "ssf_scale"):
            continue
        shape = (1, -1, 1, 1) if isinstance(module.base_layer, nn.Conv2d) else (-1,)
        scale, shift = (getattr(module, f"ssf_{p}")["default"].detach().view(shape) for p in ("scale", "shift"))
        base.get_submodule(name).register_forward_hook(lambda m, i, y, g=scale, b=shift: g * y + b)
        hooked += 1
    assert hooked == 2 + 2 * 8, "patch embedding, final norm, and eight ops a block"
    torch.testing.assert_close(model(images)[0], base(images)[0], atol=1e-6, rtol=1e-6)


def test_starts_as_the_paper_says():
    model = get_peft_model(_vit(), SSFConfig(init_std=0.02))
    scale = torch.cat([p.flatten() for n, p in model.named_parameters() if "ssf_scale" in n])
    shift = torch.cat([p.flatten() for n, p in model.named_parameters() if "ssf_shift" in n])
    assert abs(scale.mean() - 1) < 0.005
    assert abs(shift.mean()) < 0.005
    assert 0.017 < scale.std() < 0.023
    assert 0.017 < shift.std() < 0.023


def test_zero_spread_starts_at_the_base():
    base, images = _vit(), torch.randn(2, 3, 8, 8)
    expected = base(images)[0]
    assert torch.equal(get_peft_model(base, SSFConfig(init_std=0.0))(images)[0], expected)


def test_channels_are_chosen_by_type_where_the_width_equals_them():
    conv = nn.Sequential(nn.Conv2d(3, 8, 1))
    images = torch.randn(2, 3, 5, 8)
    expected = conv(images)
    model = get_peft_model(conv, SSFConfig(target_modules=["0"], init_std=0.0))
    with torch.no_grad():
        model.base_model.model[0].ssf_scale["default"][2] = 0.0
    out = model(images)
    assert torch.equal(out[:, 2], torch.zeros_like(out[:, 2]))
    torch.testing.assert_close(out[:, 3:], expected[:, 3:])


def test_merge_creates_missing_biases_and_unmerge_removes_them():
    torch.manual_seed(0)
    # not a model of transformers, whose class would drop the bias when the merged model is loaded again
    model = nn.Sequential(nn.Conv2d(3, 16, 4, stride=4, bias=False), nn.Flatten(), nn.Linear(64, 5)).eval()
    images = torch.randn(2, 3, 8, 8)
    adapted = get_peft_model(model, SSFConfig(init_std=0.3, target_modules=["0", "2"])).eval()
    expected = adapted(images)
    stem = adapted.base_model.model.get_submodule("0")
    adapted.merge_adapter()
    assert stem.base_layer.bias is not None
    adapted.unmerge_adapter()
    assert stem.base_layer.bias is None
    torch.testing.assert_close(adapted.merge_and_unload()(images), expected, atol=1e-5, rtol=1e-5)


def test_norms_without_bias_get_a_scale_only():
    torch.manual_seed(0)
    model = AutoModel.from_config(
        LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=9)
    )
    adapted = get_peft_model(model, SSFConfig())
    layer = adapted.base_model.model.layers[0]
    assert list(layer.input_layernorm.ssf_scale) == ["default"]
    assert list(layer.input_layernorm.ssf_shift) == []
    assert list(layer.self_attn.q_proj.ssf_shift) == ["default"]


def test_frozen_batch_norm_is_folded_with_its_running_statistics():
    torch.manual_seed(0)
    model = AutoModel.from_config(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2)
    images = torch.randn(2, 3, 32, 32)
    adapted = get_peft_model(model, SSFConfig(init_std=0.1, target_modules=["normalization"])).eval()
    expected = adapted(images)[0]
    torch.testing.assert_close(adapted.merge_and_unload()(images)[0], expected, atol=1e-4, rtol=1e-4)


def test_shift_can_be_left_out():
    model = get_peft_model(_vit(), SSFConfig(shift=False))
    assert not [n for n, _ in model.named_parameters() if "ssf_shift" in n]


@pytest.mark.parametrize("std", [-0.1, 1.0])
def test_bad_spread_is_refused(std):
    with pytest.raises(ConfigError, match="init_std"):
        SSFConfig(init_std=std)
