"""Whole runs of pixel prompts: from training to a pipeline, resumed, and with what they refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml
from peft import AutoPeftModel
from PIL import Image
from safetensors.torch import load_file
from support.backbones import tiny
from support.properties import KEEPS_HEAD, adapt, output
from support.tiny_runs import make_backbone, make_decoder, make_task, make_writing_task, same_weights
from transformers import AutoImageProcessor, ResNetConfig, ResNetForImageClassification, pipeline

from peft_lab import evaluate, predict, registry, train
from peft_lab.errors import ConfigError
from peft_lab.export.merge import merge
from peft_lab.loading.load_run import load

MEAN, STD = [0.2, 0.3, 0.4], [0.5, 0.25, 0.125]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A ResNet of a few thousand parameters that tells seven classes apart, with a processor."""
    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    model = ResNetForImageClassification(ResNetConfig(**sizes, num_labels=7)).train()
    for _ in range(20):  # running statistics, without which a random net says the same of every image
        model(torch.randn(16, 3, 16, 16))
    model.save_pretrained(folder)
    processor = {
        **{"image_processor_type": "BitImageProcessor", "do_normalize": True, "do_rescale": True, "do_resize": True},
        **{"size": {"shortest_edge": 16}, "do_center_crop": True, "crop_size": {"height": 16, "width": 16}},
        **{"image_mean": MEAN, "image_std": STD, "rescale_factor": 1 / 255, "do_convert_rgb": True, "resample": 2},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Three colours with noise, as files of images."""
    folder = tmp_path_factory.mktemp("colours")
    draw = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 6)):
        for name, colour in COLOURS.items():
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = np.clip(np.array(colour) + draw.normal(0, 30, (16, 16, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{index}.png")
    path = folder / "colours.yaml"
    values = {
        **{"name": "colours", "kind": "image_classification", "metrics": ["accuracy", "ece"], "version": "1"},
        **{"data": {"builder": "imagefolder", "files": {"train": "train", "test": "test"}}, "licence": "CC0-1.0"},
        "columns": {"image": "image", "label": "label"},
    }
    path.write_text(yaml.safe_dump(values))
    return path


def run(task, backbone, output_dir, **changes):
    options = {
        **{
            "task": str(task),
            "model_name_or_path": str(backbone),
            "method": "pixel_prompt",
            "output_dir": str(output_dir),
        },
        **{"num_train_epochs": 4, "per_device_train_batch_size": 8, "learning_rate": 0.3, "disable_tqdm": True},
        **{"method_args": {"image_size": 16, "inner_size": 8}, "use_cpu": True, "save_strategy": "epoch"},
    }
    return train({**options, **changes})


def test_a_run_from_training_to_pipeline(task, backbone, tmp_path):
    folder = tmp_path / "run"
    result = run(task, backbone, folder, method_args={"inner_size": 8, "sparsity": 0.2})
    config = result.model.peft_config["default"]
    assert config.image_size == 16, "the processor's"
    assert config.labels == ["blue", "green", "red"]
    assert config.image_mean == pytest.approx(MEAN, abs=1e-6)
    assert config.image_std == pytest.approx(STD, abs=1e-6)
    count = 3 * (16**2 - 8**2)
    assert result.metrics["parameters"]["adapter"] == result.metrics["parameters"]["trainable"] == count
    scored = result.metrics["metrics"]["test"]
    assert scored["accuracy"] > 0.5
    assert "num_labels" not in (folder / "README.md").read_text()

    assert evaluate(folder)["accuracy"] == scored["accuracy"]
    assert evaluate(folder)["ece"] == pytest.approx(scored["ece"], abs=1e-6)
    image = task.parent / "test" / "red" / "0.png"
    found = predict(folder, [str(image)])[0]
    assert found["label"] in COLOURS
    loaded = load(folder)
    assert loaded.model.config.id2label == {0: "blue", 1: "green", 2: "red"}
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    piped = pipeline("image-classification", model=loaded.model, image_processor=processor, device="cpu")(str(image))
    assert piped[0]["label"] == found["label"]
    assert piped[0]["score"] == pytest.approx(found["score"], abs=1e-5)
    plain = AutoPeftModel.from_pretrained(folder).eval()
    pixels = processor(Image.open(image), return_tensors="pt")
    assert torch.equal(output(plain, pixels), output(loaded.model, pixels))
    with pytest.raises(ConfigError, match="changes what goes into the base"):
        merge(folder, tmp_path / "merged")


@pytest.mark.full
def test_resuming_gives_the_same_bits(task, backbone, tmp_path):
    """Also within an epoch, where the mapping is that of the checkpoint."""
    options = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 3}
    steps = run(task, backbone, tmp_path / "whole", **options).metrics["global_step"] // 3
    assert steps > 2
    for step in (steps + 1, 2 * steps):
        checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
        run(task, backbone, tmp_path / f"from-{step}", **options, resume_from_checkpoint=str(checkpoint))
        assert same_weights(tmp_path / "whole", tmp_path / f"from-{step}")


@pytest.mark.full
@pytest.mark.parametrize("mapping", ["random", "frequency"])
def test_other_mappings_stay_as_they_began(mapping, task, backbone, tmp_path):
    arguments = {"image_size": 16, "inner_size": 8, "mapping": mapping}
    run(task, backbone, tmp_path, method_args=arguments, num_train_epochs=2)
    files = [load_file(p / "adapter_model.safetensors") for p in (*tmp_path.glob("checkpoint-*"), tmp_path)]
    maps = [v for state in files for k, v in state.items() if k.endswith("mapping")]
    assert len(maps) == 3
    assert all(torch.equal(m, maps[0]) for m in maps)


def test_a_backbone_without_a_trained_head_or_with_too_few_classes_is_refused(task, backbone, tmp_path):
    bare = tmp_path / "bare"
    ResNetForImageClassification.from_pretrained(backbone).resnet.save_pretrained(bare)
    small = tmp_path / "small"
    ResNetForImageClassification.from_pretrained(backbone, num_labels=2, ignore_mismatched_sizes=True).save_pretrained(
        small
    )
    for folder in (bare, small):
        (folder / "preprocessor_config.json").write_text((backbone / "preprocessor_config.json").read_text())
    with pytest.raises(ConfigError, match=r"brings no trained head \(classifier"):
        run(task, bare, tmp_path / "run")
    with pytest.raises(ConfigError, match="tells 2 apart, the task 3"):
        run(task, small, tmp_path / "run")


@pytest.mark.parametrize("kind", ["text_classification", "causal_lm"])
def test_tasks_of_text_are_refused(kind, tmp_path):
    words = make_task(tmp_path) if kind == "text_classification" else make_writing_task(tmp_path)
    folder = make_backbone(tmp_path / "base") if kind == "text_classification" else make_decoder(tmp_path / "base")
    with pytest.raises(ConfigError, match=f'keeps the head of an image classifier does not go with kind "{kind}"'):
        run(words, folder, tmp_path / "run")


@pytest.mark.parametrize("method", KEEPS_HEAD)
def test_only_methods_for_images_keep_a_head(method):
    info = registry.method(method)
    assert info.can("images")
    assert adapt(method, tiny("vit")).targeted_module_names == ["classifier"]
