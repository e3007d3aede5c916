"""Prompt-CAM: its counts, its formula by hand, the head it leaves alone, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from support.backbones import CLASSES, TINY, VARIANTS, tiny_inputs
from support.properties import IMAGE_CLASSIFIERS, IMAGES, adapt, adapter_parameters, config, move, output
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from peft_lab.errors import ConfigError


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 1_843_969),
        ({"deep": False}, 200 * 768 + 769),
        ({"class_block": 11}, 1_843_969),
        ({"class_block": 0}, 200 * 768 + 769),
        ({"class_block": 6, "num_prompts": 10}, 6 * 10 * 768 + 200 * 768 + 769),
    ],
)
def test_published_counts(fields, expected):
    """200 classes on ViT-B/16: prompts, and a scoring vector with its bias."""
    with torch.device("meta"):
        base = ViTForImageClassification(ViTConfig(num_labels=200))
    model = get_peft_model(base, config("prompt_cam", base, **fields))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


INTERPOLATED = [{"class_block": i, "num_prompts": n} for i in (0, 1, 2) for n in (None, 2)]


@pytest.mark.parametrize("fields", INTERPOLATED)
@torch.no_grad()
def test_class_prompts_of_a_block_in_between_pass_on_to_the_last(fields):
    """Each earlier block has prompts of its own, of no class, whose outputs are dropped."""
    settings = TINY["vit"]().config
    settings.num_hidden_layers = 4
    base = ViTForImageClassification(settings).eval()
    model, at = move(adapt("prompt_cam", base, **fields)), fields["class_block"]
    parameters = {name.split("layers.")[1]: p for name, p in adapter_parameters(model).items()}
    x, before = base.vit.embeddings(**tiny_inputs(base)), 0
    for depth, block in enumerate(base.vit.layers):
        if depth <= at:
            prompts = parameters.pop(f"{depth}.prompt_cam_prompts.default")
            assert len(prompts) == (CLASSES if depth == at else fields["num_prompts"] or CLASSES)
            x, before = torch.cat([prompts.expand(2, -1, -1), x[:, before:]], 1), len(prompts)
        x = block(x)
    weight, bias = parameters.pop("3.prompt_cam_weight.default"), parameters.pop("3.prompt_cam_bias.default")
    assert not parameters
    expected = base.vit.layernorm(x[:, :CLASSES]) @ weight[0] + bias
    torch.testing.assert_close(output(model, tiny_inputs(base)), expected, atol=1e-5, rtol=1e-5)


def test_interpolated_trains_loads_and_shares_a_batch(tmp_path):
    base = TINY["vit"]()
    model = move(adapt("prompt_cam", base, class_block=1, num_prompts=5))
    model(**tiny_inputs(base, labels=True)).loss.backward()
    # The bias is one number for all classes, so the loss does not depend on it.
    trained = {name: p for name, p in adapter_parameters(model).items() if "prompt_cam_bias" not in name}
    assert all(bool(p.grad.abs().sum() > 0) for p in trained.values())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    inputs = tiny_inputs(base, batch=3)
    assert torch.equal(output(loaded, inputs), output(model, inputs))
    model.add_adapter("shallow", config("prompt_cam", deep=False))
    move(model, "shallow", seed=4)
    names = ["shallow", "__base__", "default"]
    mixed = output(model, inputs, adapter_names=names)
    for row, name in enumerate(names):
        alone = output(model, {k: v[row : row + 1] for k, v in inputs.items()}, adapter_names=[name])
        torch.testing.assert_close(mixed[row : row + 1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"class_block": 2}, r"class_block=2 is none of the blocks that may write prompts: \[0, 1\]"),
        ({"class_block": 1, "layers_to_transform": [0]}, r"class_block=1 is none of the blocks .*: \[0\]"),
        ({"class_block": -1}, "must be at least 0"),
        ({"class_block": 1, "deep": False}, "goes with deep=True"),
        ({"num_prompts": 4}, "goes with class_block"),
        ({"num_prompts": 0, "class_block": 1}, "must be at least 1"),
    ],
)
def test_bad_class_blocks(fields, match):
    base = TINY["vit"]()
    with pytest.raises(ConfigError, match=match):
        get_peft_model(base, config("prompt_cam", **fields))
    assert type(base.vit.layers[0]).__name__ == "ViTLayer"


@pytest.mark.parametrize("deep", [True, False])
@torch.no_grad()
def test_equals_blocks_run_by_hand(deep):
    base = TINY["vit"]().eval()
    model = move(adapt("prompt_cam", base, deep=deep))
    parameters = {name.split("layers.")[1]: p for name, p in adapter_parameters(model).items()}
    inputs = tiny_inputs(base, labels=True)
    x = base.vit.embeddings(inputs["pixel_values"])
    for depth, block in enumerate(base.vit.layers):
        if depth == 0 or deep:
            prompts = parameters[f"{depth}.prompt_cam_prompts.default"].expand(2, -1, -1)
            x = torch.cat([prompts, x if depth == 0 else x[:, CLASSES:]], 1)
        x = block(x)
    z = base.vit.layernorm(x[:, :CLASSES])
    expected = z @ parameters["1.prompt_cam_weight.default"][0] + parameters["1.prompt_cam_bias.default"]
    out = model(**inputs)
    assert (out.logits - expected).abs().max() < 1e-6
    assert (out.loss - torch.nn.functional.cross_entropy(expected, inputs["labels"])).abs() < 1e-6
    as_tuple = model(**inputs, return_dict=False)
    assert torch.equal(as_tuple[0], out.loss)
    assert torch.equal(as_tuple[1], out.logits)


@torch.no_grad()
def test_final_norm_around_the_stack():
    """DINOv2 has its norm outside of the module that runs the blocks; the one trained is the one used."""
    base = TINY["dinov2_with_registers"]().eval()
    model = move(adapt("prompt_cam", base, modules_to_save=["dinov2_with_registers.layernorm"]))
    norm = model.get_base_model().dinov2_with_registers.layernorm.modules_to_save["default"]
    norm.weight.normal_()
    named = {".".join(name.split(".")[-3:-1]): p for name, p in adapter_parameters(model).items()}
    inputs = tiny_inputs(base)
    x = base.dinov2_with_registers.embeddings(**inputs)
    for depth, block in enumerate(base.dinov2_with_registers.encoder.layer):
        prompts = named[f"{depth}.prompt_cam_prompts"].expand(2, -1, -1)
        x = block(torch.cat([prompts, x if depth == 0 else x[:, CLASSES:]], 1))
    expected = norm(x[:, :CLASSES]) @ named["1.prompt_cam_weight"][0] + named["1.prompt_cam_bias"]
    torch.testing.assert_close(output(model, inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", [*IMAGE_CLASSIFIERS, "clip_classifier", "siglip_classifier", "deit_teacher"])
@torch.no_grad()
def test_head_is_not_used(family):
    """Another head changes no logits of the adapter; without the adapter it does."""
    base = {**TINY, **VARIANTS}[family]()
    inputs = tiny_inputs(base)
    model = move(adapt("prompt_cam", base))
    logits = output(model, inputs)
    plain = output(base, inputs)
    assert not torch.allclose(logits, plain, atol=1e-4)
    for name, parameter in model.named_parameters():
        assert not (parameter.requires_grad and "classifier" in name)
        if "classifier" in name:
            parameter.add_(1)
    assert torch.equal(output(model, inputs), logits)
    with model.disable_adapter():
        assert not torch.allclose(output(model, inputs), plain)
    assert torch.equal(output(model, inputs), logits)


def test_trains_with_trainer_and_loads(tmp_path):
    base = TINY["vit"]()
    model = get_peft_model(copy.deepcopy(base), config("prompt_cam"))
    pixels = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(24) % CLASSES
    pixels += labels[:, None, None, None]
    rows = Dataset.from_dict({"pixel_values": pixels.tolist(), "labels": labels.tolist()}).with_format("torch")
    arguments = TrainingArguments(
        str(tmp_path), max_steps=40, per_device_train_batch_size=12, learning_rate=3e-2, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.75 * before
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    inputs = {"pixel_values": pixels}
    assert torch.equal(output(loaded, inputs), output(model, inputs))


def test_dropout_is_one_for_the_batch():
    base = TINY["vit"]()
    model = move(adapt("prompt_cam", base, dropout=0.5)).train()
    pixels = tiny_inputs(base)["pixel_values"][:1].repeat(2, 1, 1, 1)
    first, second = (model(pixels).logits for _ in range(2))
    torch.testing.assert_close(first[0], first[1], atol=1e-6, rtol=0)
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("family", ["clip", "dinov3_vit"])
def test_what_has_no_head_is_refused(family):
    with pytest.raises(ConfigError, match=r"image classifier, and .* has none; load .*AutoModelForImageClassification"):
        adapt("prompt_cam", TINY[family]())


def test_adapter_on_a_model_without_the_head_is_refused(tmp_path):
    base = TINY["vit"]()
    adapt("prompt_cam", base).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="ViTModel has none"):
        PeftModel.from_pretrained(base.vit, tmp_path)
    base.config.num_labels = 5
    other = type(base)(base.config)
    other.vit.load_state_dict(base.vit.state_dict())
    with pytest.raises(ConfigError, match=r"shape \[3, 16\], expected \[5, 16\]"):
        PeftModel.from_pretrained(other, tmp_path)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
@pytest.mark.parametrize("method", IMAGES)
def test_text_is_refused(method, family):
    with pytest.raises(ConfigError, match=f'Method "{method}" is made for images'):
        adapt(method, TINY[family]())


@pytest.mark.parametrize("family", ["swin", "resnet"])
def test_families_without_a_place_for_prompts_are_refused(family):
    with pytest.raises(ConfigError, match="prompts"):
        adapt("prompt_cam", TINY[family]())


def test_bad_fields_are_refused():
    with pytest.raises(ConfigError, match=r"modules_to_save holds classifier.*leave the head out"):
        adapt("prompt_cam", TINY["vit"](), modules_to_save=["classifier"])
    adapt("prompt_cam", TINY["vit"](), modules_to_save=["layernorm"])
    with pytest.raises(ConfigError, match=r"dropout=1\.0 must be at least 0 and below 1"):
        config("prompt_cam", dropout=1.0)
