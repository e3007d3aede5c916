"""The preset uniadapter: what towers share, the count, its formula, and the two modes of blocks that fuse."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.backbones import MODELS, tiny_inputs
from support.properties import adapter_parameters, assert_close, move, output
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear, relu
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel, ViTConfig, ViTModel

from peft_lab.adapters import BottleneckConfig
from peft_lab.errors import ConfigError


def _config(**fields: Any) -> Any:
    return BottleneckConfig.from_preset("uniadapter", **fields)


def _adapted(name: str, **fields: Any) -> tuple[nn.Module, Any]:
    base = MODELS[name]().eval()
    torch.manual_seed(0)
    return base, get_peft_model(copy.deepcopy(base), _config(**fields)).eval()


def _count(base: nn.Module, **fields: Any) -> int:
    return sum(p.numel() for p in adapter_parameters(get_peft_model(base, _config(**fields))).values())


def test_counts() -> None:
    """One modality: d r + r + d r + d + 2 d a block. Two of one width: the up projections alone are counted twice."""
    r, layers = 128, 12
    with torch.device("meta"):
        vit, siglip, clip = ViTModel(ViTConfig()), SiglipModel(SiglipConfig()), CLIPModel(CLIPConfig())
    down, up = 768 * r + r + 2 * 768, 768 * r + 768
    assert _count(vit, width=r) == layers * (down + up)
    assert _count(siglip, width=r) == layers * (down + 2 * up)
    # CLIP's text tower is 512 wide: nothing can be shared.
    narrow = 2 * 512 * r + r + 512 + 2 * 512
    assert _count(clip, width=r) == layers * (down + up + narrow)


def _values(model: nn.Module, path: str) -> dict[str, Tensor]:
    """The adapter's own tensors below a path, by the name of the part."""
    found = {}
    for name, value in adapter_parameters(model).items():
        if path in name:
            found[name.rpartition("bottleneck_mlp_")[2].removesuffix(".default")] = value
    return found


@torch.no_grad()
def test_towers_share_the_way_down() -> None:
    """X + mlp(norm(x)) + 0.1 up(relu(down(LN(x)))) in both towers, with one down, stored in the first of them."""
    base, model = _adapted("clip", width=3)
    inputs = tiny_inputs(base)
    assert torch.equal(output(model, inputs), output(base, inputs))
    move(model)
    by_hand = copy.deepcopy(base)
    for number in range(2):
        shared = _values(model, f"text_model.encoder.layers.{number}.")
        assert set(shared) == {"norm", "norm_bias", "down", "down_bias", "up", "up_bias"}
        assert set(_values(model, f"vision_model.encoder.layers.{number}.")) == {"up", "up_bias"}
        for tower in ("text_model", "vision_model"):
            block = by_hand.get_submodule(f"{tower}.encoder.layers.{number}")
            own, kept = shared | _values(model, f"{tower}.encoder.layers.{number}."), []

            def add(m: Any, args: Any, out: Tensor, own: Any = own, kept: list[Tensor] = kept) -> Tensor:
                x = layer_norm(kept.pop(), (16,), own["norm"], own["norm_bias"])
                hidden = relu(linear(x, own["down"], own["down_bias"]))
                return out + 0.1 * linear(hidden, own["up"], own["up_bias"])

            block.layer_norm2.register_forward_pre_hook(lambda m, args, kept=kept: kept.append(args[0]))
            block.mlp.register_forward_hook(add)
    assert_close(output(model, inputs), output(by_hand, inputs))


def _mode(model: Any, inputs: dict[str, Tensor], fused: bool) -> Tensor:
    with torch.no_grad():
        return model(**inputs, use_itm_head=fused).itm_score


@torch.no_grad()
def test_fused_tokens_take_both_projections() -> None:
    base, model = _adapted("blip", width=3)
    inputs = tiny_inputs(base)
    start = {fused: _mode(base, inputs, fused) for fused in (True, False)}
    assert all(torch.equal(_mode(model, inputs, fused), score) for fused, score in start.items())
    text = _values(model, "text_encoder.encoder.layer.0.")
    assert set(text) == {"up", "up_bias", "up_fused", "up_fused_bias"}
    image = _values(model, "vision_model.encoder.layers.0.")
    assert set(image) == {"norm", "norm_bias", "down", "down_bias", "up", "up_bias"}
    # Moving the fused projections alone changes the fused scores alone.
    for name, value in adapter_parameters(model).items():
        if "up_fused" in name:
            value.normal_(std=0.5)
    assert torch.equal(_mode(model, inputs, False), start[False])
    assert not torch.allclose(_mode(model, inputs, True), start[True], atol=1e-4)
    # The sum of both acts on fused tokens: the same scores with everything in one of the two.
    move(model)
    scores = _mode(model, inputs, True)
    for number in range(2):
        own = _values(model, f"text_encoder.encoder.layer.{number}.")
        for part in ("", "_bias"):
            own[f"up{part}"] += own[f"up_fused{part}"]
            own[f"up_fused{part}"].zero_()
    assert_close(_mode(model, inputs, True), scores)
    assert not torch.allclose(_mode(model, inputs, False), start[False], atol=1e-4)


@torch.no_grad()
def test_text_mode_reads_the_stream_of_the_norm_that_ran() -> None:
    """Without an image no cross-attention runs, and the adapter reads what attention gave."""
    base, model = _adapted("blip", width=3)
    move(model)
    inputs = tiny_inputs(base)
    by_hand = copy.deepcopy(base)
    for number in range(2):
        block, kept = by_hand.text_encoder.encoder.layer[number], []
        own = _values(model, f"vision_model.encoder.layers.{number}.")
        own |= _values(model, f"text_encoder.encoder.layer.{number}.")

        def add(m: Any, args: Any, out: Tensor, own: Any = own, kept: list[Tensor] = kept) -> Tensor:
            x = layer_norm(kept.pop(), (16,), own["norm"], own["norm_bias"])
            return out + 0.1 * linear(relu(linear(x, own["down"], own["down_bias"])), own["up"], own["up_bias"])

        block.attention.output.LayerNorm.register_forward_hook(lambda m, a, out, kept=kept: kept.append(out))
        block.output.dropout.register_forward_hook(add)
    text = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    found = model.get_base_model().text_encoder(**text).last_hidden_state
    assert_close(found, by_hand.text_encoder(**text).last_hidden_state)


def test_gradients_reach_all_parts_and_a_file_holds_them_once(tmp_path: Any) -> None:
    base, model = _adapted("blip", width=3, scale="learned")
    move(model).train()
    inputs = tiny_inputs(base)
    model(**inputs).itm_score.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter_parameters(model).values())
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(_mode(again, inputs, True), _mode(model, inputs, True))


@torch.no_grad()
def test_rows_and_deletion() -> None:
    base, model = _adapted("siglip", width=3)
    move(model)
    model.add_adapter("other", _config(width=2, share_down=False))
    move(model, "other", seed=3)
    inputs = tiny_inputs(base, batch=3)
    image = {"pixel_values": inputs["pixel_values"]}
    features = [model.get_base_model().get_image_features(**image).pooler_output]
    model.set_adapter("other")
    features.append(model.get_base_model().get_image_features(**image).pooler_output)
    mixed = model(**inputs, adapter_names=["default", "other", "__base__"]).vision_model_output.pooler_output
    for row in range(2):
        assert_close(mixed[row], features[row][row])
    model.delete_adapter("default")
    assert not adapter_parameters(model, "default")
    assert_close(model.get_base_model().get_image_features(**image).pooler_output, features[1])


def test_sharing_needs_one_adapter_a_block() -> None:
    with pytest.raises(ConfigError, match="share_down needs one adapter a block"):
        BottleneckConfig(placement="houlsby", share_down=True)
