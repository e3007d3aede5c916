"""Heads that an adapter replaces: features by family, parameters and buffers, disabling, loading, training data."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from support.backbones import MODELS, VOCABULARY, tiny_inputs
from support.cover import cover
from support.fixture_methods import load
from support.properties import adapter_parameters, assert_close, output
from torch import Tensor

from peft_lab.errors import AdapterMismatchError, ConfigError
from peft_lab.tuners.head_layer import _keep_output, _keep_pooled

Config, Layer = load("mean_head").MeanHeadConfig, load("mean_head").MeanHeadLayer
IMAGES = ["vit", "dinov2", "dinov2_with_registers", "swin", "resnet", "convnext", "efficientnet", "clip_classifier"]
TEXTS = ["bert", "roberta", "distilbert", "deberta-v2", "modernbert", "mpnet", "albert", "gpt2_classifier"]
TEXTS += ["llama_classifier", "bart", "t5_classifier"]


def adapted(family: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(MODELS[family](), Config(**fields)).eval()
    generator = torch.Generator().manual_seed(1)
    for layer in layers(model):
        for means in layer.mean_head_means.values():
            means.copy_(torch.randn(means.shape, generator=generator))
    return model


def layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, Layer)]


def batch(family: str) -> dict[str, Tensor]:
    """Inputs of four rows, of which those of a text are padded."""
    inputs = tiny_inputs(MODELS[family](), batch=4)
    if "attention_mask" in inputs or "input_ids" in inputs:
        ids = torch.randint(3, VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(2))
        ids[:, -1] = 2  # the end of text, at which BART reads
        mask = torch.ones_like(ids)
        if "t5" not in family and family != "bart":
            ids[1, 4:], mask[1, 4:] = 0, 0
        inputs = {"input_ids": ids, "attention_mask": mask}
    return inputs


@torch.no_grad()
def features(family: str, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Pooled feature and mean token, by the documentation of each family."""
    model = MODELS[family]().eval()
    if family == "clip_classifier":
        hidden = model.vision_model(**inputs).last_hidden_state
        return hidden[:, 1:].mean(1), model.vision_model.post_layernorm(hidden)[:, 1:].mean(1)
    if family == "t5_classifier":
        inputs = {**inputs, "decoder_input_ids": model._shift_right(inputs["input_ids"])}
    out = model.base_model(**inputs)
    hidden = out.last_hidden_state
    if family in ("resnet", "convnext", "efficientnet"):
        return out.pooler_output.flatten(1), hidden.flatten(2).mean(2)
    if family == "swin":
        return out.pooler_output, hidden.mean(1)
    if "pixel_values" in inputs:
        prefix = {"dinov2_with_registers": 5}.get(family, 1)
        patches = hidden[:, prefix:].mean(1)
        return torch.cat([hidden[:, 0], patches], 1) if "dinov2" in family else hidden[:, 0], patches
    mask = inputs["attention_mask"]
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    last = hidden[torch.arange(4), mask.sum(1) - 1]
    if family in ("bert", "albert"):
        return out.pooler_output, mean
    return last if "classifier" in family or family == "bart" else hidden[:, 0], mean


@pytest.mark.parametrize("family", cover([*IMAGES, *TEXTS]))
@torch.no_grad()
def test_formula_on_the_features_of_each_family(family: str) -> None:
    model, inputs = adapted(family), batch(family)
    pooled, mean = features(family, inputs)
    weight, means = layers(model)[0].mean_head_weight["default"], layers(model)[0].mean_head_means["default"]
    assert_close(output(model, inputs), pooled @ weight.T + mean @ means.T)


@torch.no_grad()
def test_heads_of_a_distilled_model_give_the_same_logits() -> None:
    model = adapted("deit_teacher")
    inputs = batch("deit_teacher")
    out = model(**inputs)
    assert torch.equal(out.cls_logits, out.distillation_logits)
    assert len(adapter_parameters(model)) == 1


@pytest.mark.parametrize("family", ["bert", "resnet", "roberta"])
@torch.no_grad()
def test_disabled_the_head_of_the_base_answers(family: str) -> None:
    model, inputs = adapted(family), batch(family)
    with model.disable_adapter():
        assert torch.equal(output(model, inputs), output(MODELS[family](), inputs))
    unloaded = model.unload()
    assert torch.equal(output(unloaded, inputs), output(MODELS[family](), inputs))
    hooks = [*unloaded.modules()]
    assert not any(
        {_keep_output, _keep_pooled} & {*m._forward_hooks.values(), *m._forward_pre_hooks.values()} for m in hooks
    )


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_the_file_holds_no_head_of_the_base_and_fits_another_one(task_type: str | None, tmp_path: Path) -> None:
    """Another base of the same backbone has a head of its own, which has no part in the answers."""
    model, inputs = adapted("roberta", task_type=task_type), batch("roberta")
    assert all("mean_head" in name for name, p in model.named_parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert sorted(key.rpartition(".")[2] for key in file.keys()) == ["mean_head_means", "mean_head_weight"]  # noqa: SIM118
    base = MODELS["roberta"]()
    torch.nn.init.normal_(base.classifier.out_proj.weight)
    torch.nn.init.normal_(base.classifier.dense.weight)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(output(loaded, inputs), output(model, inputs))
    loaded.load_adapter(tmp_path, "second")
    loaded.set_adapter("second")
    assert torch.equal(output(loaded, inputs), output(model, inputs))
    other = MODELS["roberta"]()
    torch.nn.init.normal_(other.roberta.encoder.layer[1].attention.self.query.weight)
    with pytest.raises(AdapterMismatchError):
        PeftModel.from_pretrained(other, tmp_path)


@torch.no_grad()
def test_copies_adapters_and_rows_of_their_own() -> None:
    model, inputs = adapted("vit"), batch("vit")
    first = output(model, inputs)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        layers(copied)[0].mean_head_means["default"].zero_()
        assert not torch.allclose(output(copied, inputs), first)
    assert torch.equal(output(model, inputs), first)
    model.add_adapter("second", Config())
    second = output(set_active(model, "second"), inputs)
    mixed = output(model, inputs, adapter_names=["default", "second", "__base__", "default"])
    expected = torch.stack([first[0], second[1], output(MODELS["vit"](), inputs)[2], first[3]])
    assert_close(mixed, expected)
    with pytest.raises(ConfigError, match="one adapter at a time"):
        model.base_model.set_adapter(["default", "second"])


def set_active(model: Any, name: str) -> Any:
    model.set_adapter(name)
    return model


@torch.no_grad()
def test_a_half_precision_base_keeps_the_buffers_in_float32() -> None:
    torch.manual_seed(0)
    base = MODELS["vit"]().to(torch.bfloat16)
    model = get_peft_model(base, Config()).eval()
    layer = layers(model)[0]
    assert layer.mean_head_means["default"].dtype == layer.mean_head_weight["default"].dtype == torch.float32
    inputs = {"pixel_values": batch("vit")["pixel_values"].to(torch.bfloat16)}
    assert output(model, inputs).dtype == torch.bfloat16
    model.to(torch.float64)
    assert output(model, {"pixel_values": batch("vit")["pixel_values"].double()}).dtype == torch.float64


@torch.no_grad()
def test_training_data_are_read_by_class() -> None:
    model, inputs = adapted("roberta"), batch("roberta")
    labels = torch.tensor([0, 1, 2, 2])
    layers(model)[0].read_data([{**inputs, "labels": labels}], 0)
    mean = features("roberta", inputs)[1]
    expected = torch.stack([mean[0], mean[1], mean[2:].mean(0)])
    assert_close(layers(model)[0].mean_head_means["default"], expected)
    with pytest.raises(ConfigError, match="labels"):
        layers(model)[0].read_data([inputs], 0)


@pytest.mark.parametrize("family", ["gpt2", "clip", "wav2vec2", "segformer"])
def test_models_that_classify_no_rows_are_refused(family: str) -> None:
    with pytest.raises(ConfigError, match="replaces the head of a classifier"):
        get_peft_model(MODELS[family](), Config())


@pytest.mark.parametrize(
    "fields", [{"modules_to_save": ["classifier"]}, {"target_modules": ["query"]}, {"exclude_modules": ["query"]}]
)
def test_other_modules_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="leave"):
        get_peft_model(MODELS["roberta"](), Config(**fields))
