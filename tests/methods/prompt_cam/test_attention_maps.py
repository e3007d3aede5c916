"""Attention maps of class prompts: equal to eager attention's weights, heads pruned as the paper says, pictures."""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import replace

import pytest
import torch
import yaml
from PIL import Image
from support.backbones import CLASSES, TINY, VARIANTS, tiny_inputs
from support.properties import adapt, move
from support.tiny_runs import without_torch
from torch import Tensor
from transformers import (
    BeitForImageClassification,
    IJepaConfig,
    IJepaForImageClassification,
    Siglip2Config,
    Siglip2ForImageClassification,
)
from typer.testing import CliRunner

from peft_lab.adapters.sequence.prompt_cam.attention_maps import LastBlock, draw, named_classes, panels
from peft_lab.errors import ConfigError, PeftLabError
from peft_lab.tuners.sequence.layer import SequenceLayer

PREFIX = {"vit": 1, "deit": 2, "dinov2": 1, "dinov2_with_registers": 5, "clip_classifier": 1, "siglip_classifier": 0}


def _models(family: str, **fields):
    """The same adapted model with fused and with eager attention."""
    found = []
    for attention in ("sdpa", "eager"):
        base = {**TINY, **VARIANTS}[family]()
        base.set_attn_implementation(attention)
        found.append(move(adapt("prompt_cam", base, **fields)))
    return found


@pytest.mark.parametrize("family", PREFIX)
@torch.no_grad()
def test_maps_are_the_weights_of_eager_attention(family):
    model, eager = _models(family)
    pixels = tiny_inputs(eager.get_base_model())["pixel_values"]
    weights: list[Tensor] = []
    attentions = [m for m in eager.modules() if type(m).__name__.endswith("Attention") and hasattr(m, "q_proj")]
    attentions[-1].register_forward_hook(lambda m, args, out: weights.append(out[1]))
    logits = eager(pixel_values=pixels).logits
    expected = weights[0][:, :, :CLASSES, CLASSES + PREFIX[family] :]
    found = LastBlock(model, pixels)
    assert found.attention.shape == (2, CLASSES, 2, 2, 2)
    torch.testing.assert_close(found.attention.flatten(3), expected.transpose(1, 2), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.logits, logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_grid_is_that_of_the_image():
    """Two rows and four columns: the patch that is looked at stands where it stands in the image."""
    model, eager = _models("dinov2")
    pixels = torch.randn(1, 3, 16, 32, generator=torch.Generator().manual_seed(0))
    weights: list[Tensor] = []
    last = [m for m in eager.modules() if hasattr(m, "q_proj")][-1]
    last.register_forward_hook(lambda m, args, out: weights.append(out[1]))
    eager(pixel_values=pixels)
    found = LastBlock(model, pixels).attention
    assert found.shape == (1, CLASSES, 2, 2, 4)
    for row in range(2):
        for column in range(4):
            patch = weights[0][0, :, :CLASSES, CLASSES + 1 + 4 * row + column]
            torch.testing.assert_close(found[0, ..., row, column], patch.T, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("blur", ["keys", "patches"])
@pytest.mark.parametrize("heads", [[], [0], [1], [0, 1]])
@torch.no_grad()
def test_a_lost_head_looks_everywhere_alike(heads, blur):
    """Against the last block run by hand with uniform weights in the row of the class prompt."""
    model = _models("vit")[0]
    base = model.get_base_model()
    pixels = tiny_inputs(base)["pixel_values"]
    found, target, row = LastBlock(model, pixels, blur), 1, 1
    block, hidden = found.layer.base_layer, found._args[0][row : row + 1]
    normed, attention = block.layernorm_before(hidden), block.attention
    q, k, v = (
        p(normed).unflatten(-1, (2, 8)).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    weights = (q @ k.mT / 8**0.5).softmax(-1)
    first = 0 if blur == "keys" else CLASSES + 1  # the patches stand behind the prompts and the class token
    weights[:, heads, target] = 0
    weights[:, heads, target, first:] = 1 / (weights.shape[-1] - first)
    x = hidden + attention.o_proj((weights @ v).transpose(1, 2).flatten(2))
    x = x + block.mlp(block.layernorm_after(x))
    z = base.vit.layernorm(x[:, :CLASSES])
    logits = z @ found.layer.prompt_cam_weight["default"][0] + found.layer.prompt_cam_bias["default"]
    lost = torch.zeros(1, 2, dtype=torch.bool)
    lost[:, heads] = True
    torch.testing.assert_close(found.without(row, target, lost)[0], logits.softmax(-1)[0, target], atol=1e-6, rtol=1e-5)
    if not heads:
        torch.testing.assert_close(logits[0], found.logits[row], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", PREFIX)
@torch.no_grad()
def test_the_papers_pruning_leaves_attention_to_the_patches_alone(family):
    """Every family, whatever its output projection is called: other values at other tokens change nothing."""
    model = _models(family)[0]
    pixels = tiny_inputs(model.get_base_model())["pixel_values"]
    all_lost = torch.ones(1, 2, dtype=torch.bool)
    keys, patches = (LastBlock(model, pixels, blur).without(0, 1, all_lost) for blur in ("keys", "patches"))
    assert not torch.allclose(keys, patches, atol=1e-6)
    assert len(LastBlock(model, pixels, "patches").needed_heads(0, 1, keep=1)) == 1


def test_heads_go_greedily(monkeypatch):
    """With four heads and known costs the cheapest goes first, and what is cheap then next."""
    found = LastBlock(_models("vit")[0], tiny_inputs(TINY["vit"]())["pixel_values"])
    costs = torch.tensor([0.1, 0.5, 0.2, 0.3])
    tried: list[Tensor] = []

    def without(self, row, target, heads):
        tried.append(heads)
        together = heads[:, 0] & heads[:, 2]  # two heads that do the same: losing both is dear
        return 1 - heads.float() @ costs - 0.9 * together

    monkeypatch.setattr(LastBlock, "without", without)
    monkeypatch.setattr(LastBlock, "heads", 4)
    assert found.needed_heads(0, 0, keep=4) == [0, 1, 2, 3]
    assert found.needed_heads(0, 0, keep=3) == [1, 2, 3]
    assert found.needed_heads(0, 0) == [1, 2]
    assert found.needed_heads(0, 0, keep=1) == [2]
    assert [len(heads) for heads in tried[-3:]] == [4, 3, 2]
    with pytest.raises(ConfigError, match="5 heads cannot be kept: the last block has 4"):
        found.needed_heads(0, 0, keep=5)


def test_what_has_no_class_prompts_is_refused():
    pixels = tiny_inputs(TINY["vit"]())["pixel_values"]
    with pytest.raises(ConfigError, match="no active adapter with a prompt for each class"):
        LastBlock(adapt("vpt", TINY["vit"]()), pixels)
    model = adapt("prompt_cam", TINY["vit"]())
    with model.disable_adapter(), pytest.raises(ConfigError, match="no active adapter"):
        LastBlock(model, pixels)
    settings = TINY["beit"]().config
    settings.use_relative_position_bias = True
    with pytest.raises(ConfigError, match="also depends on positions"):
        LastBlock(adapt("prompt_cam", BeitForImageClassification(settings)), pixels)


# Pictures -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run folder with an adapter, its base and two images."""
    from transformers import ViTImageProcessorPil

    place = tmp_path_factory.mktemp("maps")
    base = TINY["vit"]()
    base.config.id2label = {0: "cat", 1: "dog", 2: "bird"}
    base.config.label2id = {"cat": 0, "dog": 1, "bird": 2}
    base.save_pretrained(place / "base")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(place / "base")
    base = type(base).from_pretrained(place / "base")
    model = move(adapt("prompt_cam", base))
    model.peft_config["default"].base_model_name_or_path = str(place / "base")
    model.save_pretrained(place / "adapter")
    adapt("vpt", base).save_pretrained(place / "other")
    for number, size in enumerate([(40, 20), (16, 16)]):
        Image.effect_noise(size, 80).convert("RGB").save(place / f"{number}.png")
    (place / "bomb.png").write_bytes(_bomb(20_000))
    task = {
        **{
            "name": "animals",
            "kind": "image_classification",
            "data": {"builder": "imagefolder", "files": {"train": "."}},
        },
        **{"columns": {"image": "image", "label": "label"}, "labels": ["cat", "dog", "bird"], "metrics": ["accuracy"]},
        **{"version": "1", "licence": "CC0-1.0"},
    }
    (place / "task.yaml").write_text(yaml.safe_dump(task))
    return place


def _bomb(side: int) -> bytes:
    """The start of a PNG file that says it holds a square image of this side."""
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + header
        + struct.pack(">I", zlib.crc32(header))
        + bytes(4)
        + b"IDAT"
    )


def _command(folder, *arguments: str, task: bool = True):
    from peft_lab.cli.app import app

    named = ["--task", str(folder / "task.yaml")] if task else []
    return CliRunner().invoke(app, ["attention-maps", *(str(a) for a in arguments), *named])


@pytest.mark.parametrize("blur", ["keys", "patches"])
def test_command_writes_a_picture(folder, tmp_path, blur):
    picture = tmp_path / "maps.png"
    images = (folder / "0.png", folder / "1.png")
    done = _command(folder, folder / "adapter", *images, "--output", picture, "--classes", "bird, cat", "--blur", blur)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["bird", "cat", "bird", "cat", "Picture"]
    assert all("heads " in line for line in lines[:4])
    with Image.open(picture) as opened:
        assert opened.format == "PNG"
        assert min(opened.size) > 400


def test_without_a_task_the_labels_are_those_of_the_base(folder, tmp_path):
    images = (folder / "0.png", folder / "1.png")
    done = [
        _command(folder, folder / "adapter", *images, "--output", tmp_path / f"{task}.png", task=task)
        for task in (True, False)
    ]
    assert [d.exit_code for d in done] == [0, 0], done[1].output
    assert done[0].stdout.splitlines()[:-1] == done[1].stdout.splitlines()[:-1]
    assert "cat" in done[1].stdout
    assert (tmp_path / "True.png").read_bytes() == (tmp_path / "False.png").read_bytes()


def test_names_of_classes_with_commas():
    model = TINY["vit"]()
    model.config.id2label = {0: "tench, Tinca tinca", 1: "dog", 2: "bird"}
    assert named_classes(model, ["bird, dog"]) == ["bird", "dog"]
    assert named_classes(model, ["tench, Tinca tinca", "dog"]) == ["tench, Tinca tinca", "dog"]
    assert named_classes(model, ["brid,dog"]) == ["brid", "dog"]


def test_classes_may_be_given_one_at_a_time(folder, tmp_path):
    options = ("--classes", "bird", "--classes", "dog,cat")
    done = _command(folder, folder / "adapter", folder / "0.png", "--output", tmp_path / "maps.png", *options)
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["bird", "dog", "cat", "Picture"]


def test_tokens_that_are_no_grid_of_patches_are_refused():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = adapt("prompt_cam", IJepaForImageClassification(IJepaConfig(image_size=16, patch_size=8, **sizes)))
    assert LastBlock(model, torch.randn(1, 3, 16, 16)).attention.shape[-2:] == (2, 2), "patches alone are a grid"
    for module in model.modules():
        if isinstance(module, SequenceLayer):
            module.stack = replace(module.stack, prefix_tokens=1)
    with pytest.raises(ConfigError, match=r"need a token for each of 2 x 2 patches, and .* has 3"):
        LastBlock(model, torch.randn(1, 3, 16, 16))
    towers = {"vision_config": {**sizes, "patch_size": 8, "num_patches": 4}, "text_config": sizes}
    model = adapt("prompt_cam", Siglip2ForImageClassification(Siglip2Config(**towers)))
    with pytest.raises(ConfigError, match=r"Siglip2ForImageClassification is given values of shape \[1, 4, 192\]"):
        LastBlock(model, torch.randn(1, 4, 192))


def test_images_stand_upright_as_in_training(folder, tmp_path, monkeypatch):
    """A photo taken with the camera turned: `datasets` turns it, and so must what the map lies over."""
    from datasets import Image as Feature

    from peft_lab.adapters.sequence.prompt_cam import attention_maps

    image = Image.effect_noise((40, 20), 80).convert("RGB")
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "turned.png", exif=exif)
    seen: list[Image.Image] = []
    monkeypatch.setattr(attention_maps, "write", lambda model, processor, images, *args, **kwargs: seen.extend(images))
    _command(folder, folder / "adapter", tmp_path / "turned.png", "--output", tmp_path / "maps.png")
    trained = Feature(mode="RGB").decode_example({"path": str(tmp_path / "turned.png"), "bytes": None})
    assert trained.size == (20, 40)
    assert seen[0].tobytes() == trained.tobytes()


@pytest.mark.parametrize(
    ("adapter", "image", "options", "answer"),
    [
        ("adapter", "no.png", [], 'There is no image file ".*no.png"'),
        ("adapter", "0.png", ["--output", "maps.jpg"], 'maps.jpg" must be a .png file'),
        ("adapter", "0.png", ["--output", "none/maps.png"], "in a folder that exists"),
        ("other", "0.png", [], "holds vpt, which has no prompt for each class; prompt_cam has"),
        ("adapter", "task.yaml", [], 'task.yaml" cannot be read as an image'),
        ("adapter", "bomb.png", [], 'bomb.png" cannot be read as an image: Image size .400000000 pixels'),
        ("adapter", "0.png", ["--output", "folder.png"], 'folder.png" must be a .png file'),
        ("adapter", "0.png", ["--classes", "brid"], 'Did you mean "bird"'),
        ("adapter", "0.png", ["--heads", "3"], "3 heads cannot be kept: the last block has 2"),
    ],
)
def test_command_says_what_is_wrong(folder, adapter, image, options, answer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    done = _command(folder, folder / adapter, folder / image, *options)
    assert isinstance(done.exception, PeftLabError)
    assert re.search(answer, str(done.exception))
    assert [path.name for path in tmp_path.rglob("*")] == ["folder.png"]


def test_more_images_than_a_picture_holds_are_refused(folder, tmp_path):
    done = _command(folder, folder / "adapter", *[folder / "0.png"] * 200, "--output", tmp_path / "maps.png")
    assert re.search("200 images make a picture higher than .* give at most 95 at a time", str(done.exception))
    assert not (tmp_path / "maps.png").exists()


def test_checks_come_before_torch(folder, tmp_path):
    loaded, _, output = without_torch(["attention-maps", str(folder / "other"), str(folder / "0.png")], tmp_path)
    assert "holds vpt" in output
    assert loaded == []


@torch.no_grad()
def test_rows_of_the_picture():
    from transformers import ViTImageProcessorPil

    model = _models("vit")[0]
    model.config.id2label = {0: "cat", 1: "dog", 2: "bird"}
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    images = [Image.new("RGB", (30, 30), colour) for colour in ("red", "blue")]
    rows = panels(model, processor, images, rivals=1)
    assert [row.first for row in rows] == [True, False, True, False]
    assert [("predicted" in row.title) for row in rows] == [True, False, True, False]
    assert abs(rows[0].pixels - [1, 0, 0]).max() < 1e-2
    assert all(len(row.needed) == 1 and row.maps.shape == (2, 2, 2) for row in rows)
    named = panels(model, processor, images[:1], classes=["bird", "cat"], keep=2)
    assert [row.title.split()[0] for row in named] == ["bird", "cat"]
    assert named[0].needed == [0, 1]
    with pytest.raises(ConfigError, match=r'"brid" is no class.*Did you mean "bird"'):
        panels(model, processor, images, classes=["brid"])
    figure = draw(rows)
    assert len(figure.axes) == 4 * 3
    framed = [axes.spines["left"].get_linewidth() > 1 for axes in figure.axes]
    assert sum(framed) == 4
