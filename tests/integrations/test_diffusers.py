"""Adapters on the networks of diffusers, and exports that diffusers loads as LoRA."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

import peft_lab
from peft_lab import registry
from peft_lab.adapter_files.names import ADAPTER_WEIGHTS
from peft_lab.errors import AdapterMismatchError, ConfigError
from peft_lab.export.to_lora import convert, to_lora
from peft_lab.tuners.registration import config_class, has_trait, make_config

METHODS = ("svfit", "ssf")
TARGETS = ["to_q", "to_v", "to_out.0"]
#: Values of fields with which a method starts at the base.
AT_BASE: dict[str, dict[str, Any]] = {"ssf": {"init_std": 0.0}}


def _unet() -> tuple[nn.Module, dict[str, Tensor]]:
    model = UNet2DConditionModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=2,
    )
    inputs = {"sample": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 3, 8)}
    return model, {**inputs, "timestep": torch.tensor([1, 5])}


def _flux() -> tuple[nn.Module, dict[str, Tensor]]:
    model = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    )
    inputs = {"hidden_states": torch.randn(1, 6, 4), "encoder_hidden_states": torch.randn(1, 3, 8)}
    inputs |= {"pooled_projections": torch.randn(1, 8), "timestep": torch.ones(1)}
    return model, {**inputs, "img_ids": torch.zeros(6, 3), "txt_ids": torch.zeros(3, 3)}


def _sd3() -> tuple[nn.Module, dict[str, Tensor]]:
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=8,
        pooled_projection_dim=16,
        out_channels=4,
    )
    inputs = {"hidden_states": torch.randn(1, 4, 8, 8), "encoder_hidden_states": torch.randn(1, 3, 8)}
    return model, {**inputs, "pooled_projections": torch.randn(1, 16), "timestep": torch.ones(1)}


NETWORKS = {"UNet2DConditionModel": _unet, "FluxTransformer2DModel": _flux, "SD3Transformer2DModel": _sd3}
networks = pytest.mark.parametrize("network", NETWORKS)
each = pytest.mark.parametrize("method", METHODS)


def build(network: str) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    model, inputs = NETWORKS[network]()
    return model.eval(), inputs


@torch.no_grad()
def output(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).sample


@torch.no_grad()
def move(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.3 * torch.randn_like(parameter))


def step(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model(**inputs).sample.square().mean().backward()
    assert trained
    assert all(parameter.grad is not None for parameter in trained)
    torch.optim.SGD(trained, lr=1.0).step()


@pytest.mark.integration(
    library="diffusers", use="`get_peft_model` on a UNet, Flux and SD3: a step, save, reload, merge"
)
@networks
@each
def test_train_save_reload_and_merge(method: str, network: str, tmp_path: Path) -> None:
    base, inputs = build(network)
    start = output(base, inputs)
    config = make_config(method, {"target_modules": TARGETS, **AT_BASE.get(method, {})}, model=base)
    model = get_peft_model(copy.deepcopy(base), config)
    assert torch.equal(output(model, inputs), start)
    step(model, inputs)
    move(model)
    moved = output(model, inputs)
    assert not torch.equal(moved, start)
    model.save_pretrained(tmp_path)
    for again in (PeftModel.from_pretrained(copy.deepcopy(base), tmp_path), peft_lab.load_adapter(base, tmp_path)):
        assert torch.equal(output(again.eval(), inputs), moved)
    merged = model.merge_and_unload()
    torch.testing.assert_close(output(merged, inputs), moved)
    other = build(network)[0]
    with torch.no_grad():
        next(p for name, p in other.named_parameters() if name.endswith("to_q.weight")).add_(1)
    with pytest.raises(AdapterMismatchError, match="differs from the one the adapter was trained on"):
        PeftModel.from_pretrained(other, tmp_path)


@pytest.mark.integration(
    library="diffusers", use="`model.add_adapter`, `disable_adapters`, `set_adapter`, `delete_adapters`"
)
@networks
@each
def test_add_adapter(method: str, network: str) -> None:
    model, inputs = build(network)
    start = output(model, inputs)
    config = {"target_modules": TARGETS, **AT_BASE.get(method, {})}
    model.add_adapter(make_config(method, config, model=model))
    assert torch.equal(output(model, inputs), start)
    step(model, inputs)
    move(model)
    moved = output(model, inputs)
    assert not torch.equal(moved, start)
    model.add_adapter(make_config(method, config, model=model), "second")
    model.set_adapter("second")
    assert torch.equal(output(model, inputs), start)
    model.set_adapter("default")
    assert torch.equal(output(model, inputs), moved)
    model.disable_adapters()
    assert torch.equal(output(model, inputs), start)
    model.enable_adapters()
    model.delete_adapters("second")
    assert torch.equal(output(model, inputs), moved)


@pytest.mark.integration(library="diffusers", use="default targets: all linear layers of the blocks, with a message")
@networks
@each
def test_default_targets(method: str, network: str, caplog: pytest.LogCaptureFixture) -> None:
    base, inputs = build(network)
    model = get_peft_model(base, config_class(method)())
    assert f'Model type "{network}" is not in the role table' in caplog.text
    step(model, inputs)


@pytest.mark.integration(library="diffusers", use="`load_lora_adapter` of an adapter converted to LoRA")
@networks
@pytest.mark.parametrize("method", [name for name in METHODS if has_trait(registry.method(name), "exports_lora")])
def test_export_loads_as_lora(method: str, network: str, tmp_path: Path) -> None:
    base, inputs = build(network)
    # The ranks of these layers differ, and so do the scalings that a loader must find.
    targets = [*TARGETS, "conv1", "proj_in"]
    model = get_peft_model(copy.deepcopy(base), make_config(method, {"target_modules": targets}, model=base))
    move(model)
    moved = output(model, inputs)
    done = convert(model)
    save_file(done.state, tmp_path / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    base.load_lora_adapter(str(tmp_path), weight_name=ADAPTER_WEIGHTS, prefix="base_model.model")
    torch.testing.assert_close(output(base, inputs), moved)


@pytest.mark.parametrize("method", [name for name in METHODS if has_trait(registry.method(name), "exports_lora")])
def test_the_command_that_exports_refuses_a_base_of_diffusers(method: str, tmp_path: Path) -> None:
    base, _ = build("FluxTransformer2DModel")
    base.save_pretrained(tmp_path / "base")
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path / "base")
    model = get_peft_model(loaded, make_config(method, {"target_modules": TARGETS}, model=loaded))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"convert it in Python by convert\(model\)"):
        to_lora(tmp_path / "adapter", tmp_path / "lora", model_name_or_path=str(tmp_path / "base"))
