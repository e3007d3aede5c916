"""Bottleneck adapters: counts, blocks of BERT and ViT run by hand, placements, biases and norms, what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model
from support.backbones import MODELS, TINY, tiny_inputs
from support.properties import adapt, adapter_parameters, assert_close, config, main_tensor, move, output
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear, relu
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from peft_lab.adapters import BottleneckConfig
from peft_lab.errors import ConfigError

PLACEMENTS = ("houlsby", "pfeiffer", "parallel")
FAMILIES = [
    "bert",
    "vit",
    "swin",
    "segformer",
    "clip_vision",
    "clip_text",
    "llama",
    "gpt2",
    "gemma2",
    "phi",
    "opt",
    "t5",
    "whisper",
]
FAMILIES += ["clip_vision", "clip_text", "bart", "mbart", "albert", "modernbert", "wav2vec2"]


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in adapter_parameters(model).values())


@pytest.mark.parametrize(
    ("preset", "fields", "expected"),
    [
        ("houlsby", {}, 24 * (2 * 768 * 64 + 64 + 768)),
        ("pfeiffer", {"reduction_factor": 16}, 12 * (2 * 768 * 48 + 48 + 768)),
        ("parallel", {"norm": "before", "scale": "learned"}, 12 * (2 * 768 * 64 + 64 + 768 + 2 * 768 + 1)),
    ],
)
def test_counts_of_bert_base(preset: str, fields: dict[str, Any], expected: int) -> None:
    with torch.device("meta"):
        base = BertModel(BertConfig())
    assert _count(get_peft_model(base, BottleneckConfig.from_preset(preset, **fields))) == expected


def test_count_of_adaptformer_64() -> None:
    """1.19 million for ViT-B/16, as published without the head."""
    with torch.device("meta"):
        base = ViTModel(ViTConfig())
    assert _count(get_peft_model(base, BottleneckConfig.from_preset("parallel"))) == 1_189_632


class Adapter:
    """The adapter of one sub-layer, written out."""

    def __init__(self, model: nn.Module, block: int, sub_layer: str) -> None:
        mark = f"bottleneck_{sub_layer}_"
        self.values = {}
        for name, value in adapter_parameters(model).items():
            if f".{block}.{mark}" in name:
                self.values[name.rpartition(mark)[2].removesuffix(".default")] = value

    def __call__(self, x: Tensor, f: Any, scale: float = 1.0) -> Tensor:
        v = self.values
        if "norm" in v:
            x = layer_norm(x, x.shape[-1:], v["norm"], v["norm_bias"])
        hidden = f(linear(x, v["down"], v.get("down_bias")))
        return v.get("scale", scale) * linear(hidden, v["up"], v.get("up_bias"))


@pytest.mark.parametrize("fields", [{}, {"norm": "before", "use_bias": False, "scale": "learned"}])
@pytest.mark.parametrize("placement", PLACEMENTS)
@torch.no_grad()
def test_equals_the_blocks_of_bert_by_hand(placement: str, fields: dict[str, Any]) -> None:
    base = TINY["bert"]().eval()
    model = move(adapt("bottleneck", base, placement=placement, width=5, **fields))
    inputs = tiny_inputs(base)
    x = base.bert.embeddings(inputs["input_ids"])
    for number, block in enumerate(base.bert.encoder.layer):
        z = block.attention.output.dense(block.attention.self(x)[0])
        if placement == "houlsby":
            z = z + Adapter(model, number, "attention")(z, gelu)
        x = block.attention.output.LayerNorm(x + z)
        z = block.output.dense(block.intermediate(x))
        z = z + Adapter(model, number, "mlp")(x if placement == "parallel" else z, gelu)
        x = block.output.LayerNorm(x + z)
    assert_close(model.get_base_model().bert(**inputs).last_hidden_state, x)


@pytest.mark.parametrize("placement", PLACEMENTS)
@torch.no_grad()
def test_equals_the_blocks_of_vit_by_hand(placement: str) -> None:
    base = TINY["vit"]().eval()
    preset = dict(BottleneckConfig.info.presets[placement])
    model = move(adapt("bottleneck", base, width=5, **preset))
    f, scale = (gelu, 1.0) if placement == "houlsby" else (relu, preset.get("scale", 1.0))
    inputs = tiny_inputs(base)
    x = base.vit.embeddings(**inputs)
    x = x[0] if isinstance(x, tuple) else x
    for number, block in enumerate(base.vit.layers):
        z = block.attention(block.layernorm_before(x))[0]
        if placement == "houlsby":
            z = z + Adapter(model, number, "attention")(z, f)
        x = x + z
        z = block.mlp(block.layernorm_after(x))
        x = x + z + Adapter(model, number, "mlp")(x if placement == "parallel" else z, f, scale)
    assert_close(main_tensor(model.get_base_model().vit(**inputs)), base.vit.layernorm(x))


@torch.no_grad()
def test_cross_attention_has_an_adapter() -> None:
    """T5: each sub-layer ends with its dropout, whose output z becomes z + A(z)."""
    base = TINY["t5"]().eval()
    model = move(adapt("bottleneck", base, width=5))
    names = {n.split("bottleneck_")[1].split("_down")[0] for n in adapter_parameters(model) if "_down." in n}
    assert names == {"attention", "cross_attention", "mlp"}
    by_hand = copy.deepcopy(base)
    for stack in ("encoder", "decoder"):
        for number, block in enumerate(by_hand.get_submodule(stack).block):
            order = ("attention", "mlp") if stack == "encoder" else ("attention", "cross_attention", "mlp")
            for part, sub_layer in zip(block.layer, order, strict=True):
                adapter = _in_stack(model, stack, number, sub_layer)
                part.dropout.register_forward_hook(lambda m, args, z, adapter=adapter: z + adapter(z, gelu))
    assert_close(output(model, tiny_inputs(base)), output(by_hand, tiny_inputs(base)))


def _in_stack(model: nn.Module, stack: str, number: int, sub_layer: str) -> Adapter:
    adapter = Adapter(model, number, sub_layer)
    path, mark = f".{stack}.block.{number}.", f"bottleneck_{sub_layer}_"
    for name, value in adapter_parameters(model).items():
        if path in name and mark in name:
            adapter.values[name.rpartition(mark)[2].removesuffix(".default")] = value
    return adapter


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("placement", PLACEMENTS)
@torch.no_grad()
def test_starts_at_the_base_and_each_part_acts(placement: str, family: str) -> None:
    base = MODELS[family]().eval()
    alone = {"modules_to_save": []}  # SegFormer's head serves no mixed batch
    model, inputs = adapt("bottleneck", base, placement=placement, width=3, **alone), tiny_inputs(base, batch=3)
    expected = output(base, inputs)
    assert torch.equal(output(model, inputs), expected)
    move(model)
    last = output(model, inputs)
    assert not torch.allclose(last, expected, atol=1e-5)
    model.add_adapter("other", config("bottleneck", placement="houlsby", width=2, **alone))
    move(model, "other", seed=4)
    mixed = output(model, inputs, adapter_names=["default", "__base__", "other"])
    assert_close(mixed[0], last[0], 1e-4)
    assert_close(mixed[1], expected[1], 1e-4)
    model.set_adapter("other")
    assert_close(mixed[2], output(model, inputs)[2], 1e-4)


@torch.no_grad()
def test_several_serial_adapters_read_the_sub_layer_itself() -> None:
    """Their order does not matter."""
    base = TINY["vit"]()
    model = move(adapt("bottleneck", base, width=3, modules_to_save=[]))
    model.add_adapter("other", config("bottleneck", width=2, modules_to_save=[]))
    move(model, "other", seed=4)
    found = []
    for names in (["default", "other"], ["other", "default"]):
        model.base_model.set_adapter(names)
        found.append(output(model, tiny_inputs(base)))
    assert_close(*found)
    model.base_model.set_adapter(["default"])
    assert not torch.allclose(found[0], output(model, tiny_inputs(base)), atol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["bert", "opt", "t5"])
def test_checkpointed_gradients_are_the_same(family: str, reentrant: bool) -> None:
    base = TINY[family]()
    model, found = move(adapt("bottleneck", base, width=3)).train(), []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        main_tensor(model(**tiny_inputs(base))).square().sum().backward()
        found.append([p.grad for p in adapter_parameters(model).values()])
    for got, wanted in zip(found[1], found[0], strict=True):
        assert_close(got, wanted, 1e-4)


def test_dropout_acts_in_training_alone() -> None:
    base = TINY["bert"]()
    model = move(adapt("bottleneck", base, dropout=0.5, width=8, backbone_eval=True))
    inputs = tiny_inputs(base)
    assert torch.equal(output(model, inputs), output(model, inputs))
    model.train()
    assert not torch.equal(model(**inputs).logits, model(**inputs).logits)


def test_sizes_and_what_is_refused() -> None:
    assert BottleneckConfig().width == 64
    assert BottleneckConfig(reduction_factor=16).width_for(768) == 48
    assert BottleneckConfig(reduction_factor=32.0).width_for(16) == 1
    with pytest.raises(ConfigError, match=r"width=8 and reduction_factor=4.* both set the width"):
        BottleneckConfig(width=8, reduction_factor=4)
    for fields, match in (
        ({"width": 0}, "width=0 must be at least 1"),
        ({"reduction_factor": -1.0}, "reduction_factor=-1.0 must be above 0"),
        ({"scale": 0.0}, "scale=0 would leave the adapter without effect"),
        ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
        ({"placement": "serial"}, "placement='serial' does not fit"),
    ):
        with pytest.raises(ConfigError, match=match):
            BottleneckConfig(**fields)
    with pytest.raises(ConfigError, match=r"has no place for its branch beside .* of ConvNextLayer"):
        adapt("bottleneck", MODELS["convnext"]())
