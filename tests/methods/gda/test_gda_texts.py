"""GDA with class texts on a two-tower checkpoint: the mixed logits, the file, runs, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from support.backbones import TINY
from support.tiny_runs import COLOURS, make_image_backbone, make_image_task, options
from transformers import AutoModel, AutoModelForImageClassification, AutoTokenizer

import peft_lab
from peft_lab.adapters.head.gda import GDA, GDAConfig
from peft_lab.errors import ConfigError
from peft_lab.training.evaluate import evaluate
from peft_lab.training.run import train

NAMES = {0: "red", 1: "dark_green", 2: "blue"}
WORDS = ["a", "photo", "of", "some", "things", ".", "dark", "red", "green", "blue"]
TEMPLATES = ["a photo of a {}.", "some {} things."]
LABELS = torch.arange(12) % 3
IMAGES = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0)) + LABELS[:, None, None, None]


def make_clip(folder: Path) -> Path:
    """Random CLIP with a tokenizer of words and an image processor."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    make_image_backbone(folder)  # for its image processor
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(words), "max_position_embeddings": 12, "eos_token_id": 3, "initializer_range": 0.5}
    config = CLIPConfig(
        text_config={**shape, **text},
        vision_config={**shape, "image_size": 32, "patch_size": 8, "initializer_range": 0.2},
        projection_dim=6,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("texts") / "clip")


def classifier(folder: Path, names: dict[int, str] | None = None) -> Any:
    return AutoModelForImageClassification.from_pretrained(folder, id2label=names or NAMES).eval()


def fitted(base: Any, **fields: Any) -> Any:
    model = get_peft_model(base, GDAConfig(**{"text_templates": TEMPLATES, **fields})).eval()
    peft_lab.read_training_data(model, [{"pixel_values": IMAGES, "labels": LABELS}])
    return model


@torch.no_grad()
def features(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Unit features of the images, and of the classes as the mean over templates, by the whole model."""
    whole, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    images = whole.get_image_features(pixel_values=IMAGES).pooler_output
    texts = []
    for name in ("red", "dark green", "blue"):
        ids = [tokenizer(template.format(name), return_tensors="pt").input_ids for template in TEMPLATES]
        each = [whole.get_text_features(input_ids=row).pooler_output[0] for row in ids]
        mean = sum(row / row.norm() for row in each)
        texts.append(mean / mean.norm())
    return (images / images.norm(dim=-1, keepdim=True)).double().numpy(), torch.stack(texts).double().numpy()


@pytest.mark.parametrize("alpha", [0.0, 0.3])
@torch.no_grad()
def test_logits_are_100_cosines_with_texts_and_alpha_gaussian_scores(alpha, clip):
    images, texts = features(clip)
    expected = 100 * images @ texts.T + alpha * GDA().fit(images, LABELS.numpy()).class_scores(images)
    found = fitted(classifier(clip), alpha=alpha)(pixel_values=IMAGES).logits
    assert np.allclose(found.numpy(), expected, atol=1e-3)
    assert np.abs(expected).max() > 1


@torch.no_grad()
def test_the_file_answers_exactly_and_needs_no_text_tower(clip, tmp_path):
    folder = shutil.copytree(clip, tmp_path / "clip")
    model = fitted(classifier(folder))
    model.save_pretrained(tmp_path / "adapter")
    base = classifier(folder)
    shutil.rmtree(folder)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(loaded(pixel_values=IMAGES).logits, model(pixel_values=IMAGES).logits)


@torch.no_grad()
def test_two_adapters_of_one_model_with_texts_and_without(clip):
    model = fitted(classifier(clip))
    expected = model(pixel_values=IMAGES).logits
    model.add_adapter("plain", GDAConfig())
    model.set_adapter("plain")
    peft_lab.read_training_data(model, [{"pixel_values": IMAGES, "labels": LABELS}])
    assert not torch.allclose(model(pixel_values=IMAGES).logits, expected)
    mixed = model(pixel_values=IMAGES, adapter_names=["default", "plain"] * 6).logits
    assert torch.allclose(mixed[::2], expected[::2], atol=1e-4)


@pytest.mark.parametrize("features", [None, pytest.param("cached", marks=pytest.mark.full)])
def test_a_run_makes_its_texts_of_the_labels_of_the_task(features, clip, tmp_path):
    task = make_image_task(tmp_path / "task")
    values = {"method": "gda", "method_args": {"text_templates": TEMPLATES, "alpha": 0.1}, "features": features}
    result = train(options(task, clip, tmp_path / "out", **values, do_predict=False, learning_rate=0, max_steps=-1))
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (saved["text_templates"], saved["alpha"]) == (TEMPLATES, 0.1)
    assert [*result.model.config.id2label.values()] == [*COLOURS]
    scored = evaluate(tmp_path / "out", split="validation")["accuracy"]
    assert scored == result.metrics["metrics"]["validation"]["accuracy"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text_templates": ["a photo"]}, "must have one {}"),
        ({"text_templates": []}, "names no text"),
        ({"alpha": 0.5}, "no effect without text_templates"),
        ({"text_templates": TEMPLATES, "pooling": "mean"}, "pooling"),
    ],
)
def test_fields_without_effect_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        GDAConfig(**fields)


@pytest.mark.parametrize("family", ["vit", "bert", "resnet"])
def test_models_without_a_text_tower_are_refused(family):
    with pytest.raises(ConfigError, match=r"two towers.* has no text tower; leave them out"):
        get_peft_model(TINY[family](), GDAConfig(text_templates=TEMPLATES))


def test_checkpoints_without_the_texts_are_refused(clip, tmp_path):
    with pytest.raises(ConfigError, match='"LABEL_0" has no name'):
        fitted(classifier(clip, {index: f"LABEL_{index}" for index in range(3)}))
    with pytest.raises(ConfigError, match="reads at most 12"):
        fitted(classifier(clip), text_templates=["a photo of " * 5 + "{}"])
    classifier(clip).save_pretrained(tmp_path / "vision")
    with pytest.raises(ConfigError, match="has no text tower"):
        fitted(classifier(tmp_path / "vision"))
    changed = classifier(clip)
    changed.vision_model.post_layernorm.weight.data += 1
    with pytest.raises(ConfigError, match=r"has another vision_model\.post_layernorm\.weight"):
        fitted(changed)
    AutoModel.from_pretrained(clip).save_pretrained(tmp_path / "bare")
    with pytest.raises(ConfigError, match=r"makes no tokens of the class text"):
        fitted(classifier(tmp_path / "bare"), text_templates=["{}"])


@pytest.mark.full
@pytest.mark.skipif(not os.environ.get("PEFT_LAB_DATA"), reason="PEFT_LAB_DATA is not set")
@torch.no_grad()
def test_texts_of_a_pretrained_model_tell_real_images_apart():
    from datasets import load_dataset
    from transformers import AutoImageProcessor

    place = Path(os.environ["PEFT_LAB_DATA"])
    rows = load_dataset("parquet", data_files=str(place / "cifar10" / "test.parquet"), split="train[:200]")
    names = dict(enumerate(["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]))
    processor = AutoImageProcessor.from_pretrained(place / "clip-mini", backend="pil")
    pixels = processor(list(rows["image"]), return_tensors="pt")["pixel_values"]
    labels = torch.tensor(rows["label"])
    model = get_peft_model(
        classifier(place / "clip-mini", names), GDAConfig(text_templates=["a photo of a {}."], alpha=0.0)
    )
    peft_lab.read_training_data(model, [{"pixel_values": pixels[:100], "labels": labels[:100]}])
    found = model(pixel_values=pixels[100:]).logits.argmax(1)
    assert (found == labels[100:]).float().mean() > 0.35
