"""Pixel prompts: counts, formulas and label mappings by hand, the kept head, and the pruned base."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.backbones import MODELS, TINY, tiny, tiny_inputs
from support.properties import CLASSIFIERS, adapter_parameters, equal_weights, move, output
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader
from transformers import (
    Trainer,
    TrainingArguments,
    ViTConfig,
)
from transformers import ViTForImageClassification as ViT

from peft_lab import ReadTrainingData, load_adapter, read_training_data
from peft_lab.adapters import PixelPromptConfig
from peft_lab.adapters.input.pixel_prompt.mapped_head import greedy_mapping
from peft_lab.errors import AdapterMismatchError, ConfigError

MEAN, STD = [0.2, 0.3, 0.4], [0.5, 0.25, 0.125]


def put_on(base, name="default", **fields):
    """A copy of the base with one adapter, in eval mode."""
    return get_peft_model(copy.deepcopy(base), PixelPromptConfig(**fields), adapter_name=name).eval()


def head_of(model):
    return next(m for m in model.modules() if type(m).__name__ == "PixelPromptLayer")


# Counts and formulas --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({"program": "pad"}, 69_840),  # Bahng: 12 p (S - p) with p = 30
        ({"program": "frame", "inner_size": 128}, 3 * (224**2 - 128**2)),  # ILM-VP, large data sets
        ({"program": "frame"}, 3 * (224**2 - 128**2)),
        ({"program": "frame", "inner_size": 32}, 3 * (224**2 - 32**2)),  # ILM-VP, CIFAR and the like
        ({"program": "full"}, 3 * 224**2),
        ({"program": "pad", "border": 10, "image_size": 100}, 12 * 10 * 90),
    ],
)
def test_published_counts(fields, count):
    with torch.device("meta"):
        base = ViT(ViTConfig(num_labels=1000))
    model = get_peft_model(base, PixelPromptConfig(labels=["a", "b"], **fields))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def border_mask(size, inner):
    """1 on the border, 0 where the image is, as ILM-VP pads: one pixel more to the left and above if it must be."""
    mask, start = torch.ones(size, size), (size - inner + 1) // 2
    mask[start : start + inner, start : start + inner] = 0
    return mask


@pytest.mark.parametrize("inner", [8, 11])
@torch.no_grad()
def test_frame_is_the_formula_of_the_paper(inner):
    """normalize(pad(x) + sigmoid(program) * mask) on images in [0, 1], which were normalised before they came in."""
    base, size, start = TINY["vit"](), 16, (16 - inner + 1) // 2
    model = move(put_on(base, inner_size=inner, image_mean=MEAN, image_std=STD, mapping="first"))
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    raw = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    small = nn.functional.interpolate(raw, (inner, inner), mode="bilinear", antialias=True)
    canvas, program = torch.zeros(2, 3, size, size), torch.zeros(3, size, size)
    canvas[:, :, start : start + inner, start : start + inner] = small
    mask = border_mask(size, inner)
    program[:, mask.bool()] = next(iter(adapter_parameters(model).values()))
    expected = base(((canvas + program.sigmoid() * mask) - mean) / std).logits
    torch.testing.assert_close(model((raw - mean) / std).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("program", "inner"), [("pad", 10), ("full", 0)])
@torch.no_grad()
def test_additive_programs_add_to_the_normalised_image(program, inner):
    base = TINY["resnet"]()
    model = move(put_on(base, program=program, image_size=16, mapping="first", **({"border": 3} if inner else {})))
    added = torch.zeros(3, 16, 16)
    added[:, border_mask(16, inner).bool()] = next(iter(adapter_parameters(model).values()))
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(output(model, {"pixel_values": pixels}), output(base, {"pixel_values": pixels + added}))


@torch.no_grad()
def test_images_of_any_size_become_those_of_the_model():
    base = TINY["vit"]()
    for program in ("frame", "pad", "full"):
        model = put_on(base, program=program, mapping="first")
        assert model(torch.randn(2, 3, 37, 21)).logits.shape == (2, 3)


def test_a_backbone_of_images_that_are_not_square_is_refused():
    settings = _vit_config(3)
    settings.image_size = (16, 32)
    with pytest.raises(ConfigError, match="prompts square images, and those of this backbone are 16 x 32 pixels"):
        put_on(ViT(settings))
    settings.image_size = (16, 16)
    assert put_on(ViT(settings), mapping="first")(torch.randn(2, 3, 16, 16)).logits.shape == (2, 3)


def test_grey_border_at_the_start():
    """sigmoid(0) = 0.5, so a black image has a border of 0.5 in units of white."""
    base = tiny("vit")
    model, seen = put_on(base, image_mean=MEAN, image_std=STD), []
    model.get_base_model().vit.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((*args, *kwargs.values())[0]), with_kwargs=True
    )
    model(-torch.tensor(MEAN)[:, None, None] / torch.tensor(STD)[:, None, None].expand(1, 3, 16, 16))
    raw = seen[0] * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    assert raw[0, :, 0].allclose(torch.tensor(0.5))
    assert raw[0, :, 8, 8].abs().max() < 1e-6


# Label mappings -------------------------------------------------------------------------------------------------------


def brute_force(counts):
    """The greedy mapping by looking at every free pair in each round, in the order of the flat index."""
    sources, targets = counts.shape
    mapping, taken = {}, set()
    while len(mapping) < targets:
        free = [(s, t) for s in range(sources) for t in range(targets) if s not in taken and t not in mapping]
        source, target = max(free, key=lambda pair: counts[pair])  # max keeps the first of equals
        mapping[target] = source
        taken.add(source)
    return [mapping[t] for t in range(targets)]


def test_greedy_mapping_equals_brute_force():
    draw = np.random.default_rng(0)
    for sources, targets, top in itertools.product((3, 5, 8), (1, 2, 3), (1, 3, 50)):
        counts = draw.integers(0, top + 1, (sources, targets))
        before = counts.copy()
        mapping = greedy_mapping(counts)
        assert mapping == brute_force(counts)
        assert len({*mapping}) == targets
        assert (counts == before).all()


@pytest.mark.parametrize(
    ("counts", "mapping"),
    [
        ([[5, 4], [4, 0], [0, 0]], [0, 1]),  # greedy, not the best assignment: 5 goes first and leaves target 1 nothing
        ([[0, 0], [2, 2], [0, 0]], [1, 0]),  # a tie goes to the lower target, an absent class to the lowest free source
        ([[0, 0, 0], [0, 0, 0], [0, 0, 7]], [0, 1, 2]),
    ],
)
def test_greedy_mapping_by_hand(counts, mapping):
    assert greedy_mapping(np.array(counts)) == mapping


def marked_batches(base, count=40):
    """Batches of images of the target classes 0 and 2, which differ in colour."""
    generator = torch.Generator().manual_seed(3)
    size = base.config.image_size
    labels = torch.arange(count) % 2 * 2
    pixels = torch.randn(count, 3, size, size, generator=generator)
    pixels += 4 * torch.randn(count, 3, 1, 1, generator=generator) + 3 * (labels[:, None, None, None] - 1)
    return [{"pixel_values": p, "labels": t} for p, t in zip(pixels.split(5), labels.split(5), strict=True)]


def counted(model, batches, sources, targets):
    counts = np.zeros((sources, targets), dtype=int)
    for batch in batches:
        for source, target in zip(output(model, batch).argmax(-1), batch["labels"], strict=True):
            counts[source, target] += 1
    return counts


@pytest.mark.parametrize("mapping", ["frequency", "iterative"])
def test_mapping_counts_what_the_base_says_under_the_prompt(mapping):
    """Class 1 has no image, and `frequency` counts without the prompt, whatever the pixels start at."""
    base = ViT(_vit_config(7))
    model = put_on(base, labels=["a", "b", "c"], mapping=mapping, program="full", init_std=10.0)
    values = next(iter(adapter_parameters(model).values())).detach().clone()
    batches = marked_batches(base)
    prompts = {"iterative": values.reshape(3, 16, 16), "frequency": torch.zeros(3, 16, 16)}
    shown = {way: [{**b, "pixel_values": b["pixel_values"] + p} for b in batches] for way, p in prompts.items()}
    expected = {way: brute_force(counted(base, seen, 7, 3)) for way, seen in shown.items()}
    assert expected["iterative"] != expected["frequency"]
    head_of(model).read_data(iter(batches), 0)
    found = head_of(model).pixel_prompt_mapping["default"].tolist()
    assert found == expected[mapping]
    assert len({*found}) == 3
    assert torch.equal(next(iter(adapter_parameters(model).values())), values)
    logits = output(model, batches[0])
    with torch.no_grad():
        source = base(batches[0]["pixel_values"] + values.reshape(3, 16, 16)).logits
    torch.testing.assert_close(logits, source[:, found])

    swapped = [{**b, "labels": 2 - b["labels"]} for b in batches]
    head_of(model).read_data(iter(swapped), 1)
    again = head_of(model).pixel_prompt_mapping["default"].tolist()
    assert (again == found) == (mapping == "frequency")


def _vit_config(classes):
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    return ViTConfig(**small, image_size=16, patch_size=8, num_labels=classes, initializer_range=0.5)


def test_random_mapping_is_injective_and_drawn():
    base = ViT(_vit_config(50))
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(head_of(put_on(base, labels=["a", "b", "c"], mapping="random")).pixel_prompt_mapping["default"])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert all(len(m.unique()) == 3 and m.min() >= 0 and m.max() < 50 for m in found)
    head = head_of(put_on(base, labels=["a", "b", "c"], mapping="first"))
    assert head.pixel_prompt_mapping["default"].tolist() == [0, 1, 2]


def test_training_without_the_data_that_the_mapping_needs_is_an_error(tmp_path):
    base = TINY["vit"]()
    model = put_on(base, labels=["a", "b"]).train()
    inputs = {**tiny_inputs(base), "labels": torch.tensor([0, 1])}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model(**inputs).loss.backward()
    optimizer.step()
    with pytest.raises(
        ConfigError,
        match=r"reads the training data.*ReadTrainingData\(\) to the callbacks.*peft_lab\.read_training_data\(",
    ):
        model(**inputs)
    read_training_data(model, [inputs])
    assert model.training
    model(**inputs)
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True).train()(**inputs)  # has a mapping


@pytest.mark.parametrize("mapping", ["frequency", "iterative"])
def test_a_loop_of_ones_own_finds_the_mapping_that_a_trainer_finds(mapping, tmp_path):
    base = ViT(_vit_config(7))
    batches = marked_batches(base)
    rows = [{"pixel_values": x, "labels": y} for b in batches for x, y in zip(*b.values(), strict=True)]
    fields = {"labels": ["a", "b", "c"], "mapping": mapping, "program": "full", "init_std": 10.0}
    torch.manual_seed(0)
    model = put_on(base, **fields)
    other = copy.deepcopy(model)
    flags = {"max_steps": 1, "learning_rate": 0.0, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    arguments = TrainingArguments(output_dir=str(tmp_path), save_strategy="no", **flags)
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[ReadTrainingData()]).train()
    read_training_data(other, DataLoader(rows, 5, shuffle=True))
    found = [head_of(m).pixel_prompt_mapping["default"].tolist() for m in (model, other)]
    assert found[0] == found[1] != [0, 1, 2]
    read_training_data(other, [{**b, "labels": 2 - b["labels"]} for b in batches], epoch=1)
    assert (head_of(other).pixel_prompt_mapping["default"].tolist() == found[1]) == (mapping == "frequency")


@pytest.mark.parametrize(
    ("labels", "got"),
    [
        (torch.eye(2), r"torch.float32 \[2, 2\]"),
        (torch.tensor([0.0, 1.0]), r"torch.float32 \[2\]"),
        (torch.tensor([[0], [1]]), r"torch.int64 \[2, 1\]"),
        (torch.tensor([1, 3]), "values from 1 to 3"),
        (None, "NoneType"),
    ],
)
def test_labels_that_cannot_be_counted_are_refused(labels, got):
    base = TINY["vit"]()
    model = put_on(base)
    before = head_of(model).pixel_prompt_mapping["default"].clone()
    with pytest.raises(ConfigError, match=f"whole numbers from 0 to 2, one for each image, got {got}"):
        read_training_data(model, [{**tiny_inputs(base), "labels": labels}])
    assert torch.equal(head_of(model).pixel_prompt_mapping["default"], before)


# The kept head, disabling, several adapters, the pruned base ---------------------------------------------------------


@pytest.mark.parametrize("family", [*CLASSIFIERS, "deit_teacher", "clip_classifier", "siglip_classifier"])
def test_logits_loss_and_labels_are_those_of_the_targets(family, tmp_path):
    base = MODELS[family]()
    own_labels = dict(base.config.id2label)
    inputs = {**tiny_inputs(base), "labels": torch.tensor([0, 1])}
    if family == "deit_teacher":  # which has two heads and computes no loss
        del inputs["labels"]
    plain = output(base, tiny_inputs(base))
    model = move(put_on(base, labels=["cat", "dog"], mapping="random"))
    out = model(**inputs)
    assert out.logits.shape == (2, 2)
    if "labels" in inputs:
        torch.testing.assert_close(out.loss, nn.functional.cross_entropy(out.logits, inputs["labels"]))
    assert model.config.id2label == {0: "cat", 1: "dog"}
    assert model.config.label2id == {"cat": 0, "dog": 1}
    with model.disable_adapter():
        assert torch.equal(output(model, tiny_inputs(base)), plain)
        assert model.config.id2label == own_labels
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(output(loaded, tiny_inputs(base)), out.logits)
    assert loaded.config.id2label == {0: "cat", 1: "dog"}
    with pytest.raises(NotImplementedError, match="changes what goes into the base"):
        model.merge_adapter()
    bare = model.unload()
    assert equal_weights(bare, base)
    assert bare.config.id2label == own_labels
    assert not bare._forward_pre_hooks
    assert torch.equal(output(bare, tiny_inputs(base)), plain)


def test_file_holds_the_border_and_the_mapping_only(tmp_path):
    model = put_on(ViT(_vit_config(9)), labels=["a", "b", "c"], mapping="random")
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert {k.rpartition(".")[2]: (v.dtype, v.shape) for k, v in state.items()} == {
        "pixel_prompt_program": (torch.float32, (3, 16**2 - 10**2)),
        "pixel_prompt_mapping": (torch.int64, (3,)),
    }


def test_adapters_with_other_classes_and_sparsities_take_turns():
    base = ViT(_vit_config(9))
    inputs = tiny_inputs(base)
    plain = output(base, inputs)
    model = put_on(base, "two", labels=["a", "b"], mapping="random", sparsity=0.5)
    model.add_adapter("three", PixelPromptConfig(labels=["x", "y", "z"], mapping="random", program="pad"))
    two = output(model, inputs)
    model.set_adapter("three")
    assert output(model, inputs).shape == (2, 3)
    assert model.config.num_labels == 3
    assert torch.equal(model.get_base_model().vit.layers[0].mlp.fc1.weight, base.vit.layers[0].mlp.fc1.weight)
    model.set_adapter("two")
    assert torch.equal(output(model, inputs), two)
    assert model.config.num_labels == 2
    with pytest.raises(ConfigError, match="one adapter at a time, got two, three"):
        model.base_model.set_adapter(["two", "three"])
    with pytest.raises(ConfigError, match="does not serve rows of one batch"):
        model(**inputs, adapter_names=["two", "three"])
    inside = model.get_base_model()
    model.delete_adapter("two")
    assert inside.config.num_labels == 3
    model.delete_adapter("three")
    assert torch.equal(output(inside, inputs), plain)
    assert inside.config.num_labels == 9
    assert torch.equal(inside.vit.layers[0].mlp.fc1.weight, base.vit.layers[0].mlp.fc1.weight)


@pytest.mark.parametrize("family", ["vit", "resnet"])
@pytest.mark.parametrize("sparsity", [0.3, 0.9])
def test_sparsity_prunes_as_torch_does_and_comes_off(family, sparsity, tmp_path):
    base = TINY[family]()
    by_torch = copy.deepcopy(base)
    parts = [(m, "weight") for n, m in by_torch.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    parts = [(m, name) for m, name in parts if m.weight.shape[0] != base.config.num_labels]
    prune.global_unstructured(parts, prune.L1Unstructured, amount=sparsity)
    for module, name in parts:
        prune.remove(module, name)
    model = move(put_on(base, sparsity=sparsity, mapping="first"))
    inputs = tiny_inputs(base)
    pruned = model.get_base_model()
    weights = {n: p for n, p in pruned.named_parameters() if "pixel_prompt" not in n}
    expected = dict(by_torch.named_parameters())
    assert all(torch.equal(p, expected[n.replace(".base_layer", "")]) for n, p in weights.items())
    zeros = sum(int((m.weight == 0).sum()) for m, _ in parts)
    assert zeros == pytest.approx(sparsity * sum(m.weight.numel() for m, _ in parts), abs=1)

    logits = output(model, inputs)
    dense = move(put_on(base, mapping="first"))
    assert not torch.allclose(output(dense, inputs), logits, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(output(model, inputs), output(base, inputs))
    assert torch.equal(output(model, inputs), logits)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(output(loaded, inputs), logits)
    assert equal_weights(loaded.unload(), base)
    assert equal_weights(model.unload(), base)


def test_layers_of_zeros_alone_are_not_counted_as_pruned():
    """EfficientNet-Lite as an EfficientNet has squeeze-excite layers that are the identity, of zeros."""
    base = TINY["resnet"]()
    convolution = next(m for m in base.modules() if isinstance(m, nn.Conv2d))
    convolution.weight.data.zero_()
    model = put_on(base, sparsity=0.5, mapping="first")
    others = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.weight.any()]
    share = sum(int((m.weight == 0).sum()) for m in others) / sum(m.weight.numel() for m in others)
    assert share == pytest.approx(0.5, abs=0.01)


@torch.no_grad()
def test_a_copy_is_a_model_of_its_own():
    base = ViT(_vit_config(9))
    model = put_on(base, labels=["a", "b"], mapping="random", sparsity=0.5)
    inputs = tiny_inputs(base)
    before, other = output(model, inputs), copy.deepcopy(model)
    move(other)
    head_of(other).pixel_prompt_mapping["default"].copy_(torch.tensor([8, 7]))
    assert not torch.allclose(output(other, inputs), before, atol=1e-4)
    assert equal_weights(other.unload(), base)
    assert torch.equal(output(model, inputs), before)


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"program": "frames"}, 'Did you mean "frame"'),
        ({"mapping": "itertive"}, 'Did you mean "iterative"'),
        ({"program": "full", "border": 3}, 'border=3 does not go with program="full"'),
        ({"border": 3, "inner_size": 8}, "border=3 does not go with inner_size"),
        ({"program": "pad", "inner_size": 8}, 'inner_size=8 is for program="frame"'),
        ({"border": 8}, "border=8 leaves no place .* 16 pixels"),
        ({"inner_size": 16}, "inner_size=16 leaves no place"),
        ({"border": 0}, "border=0 must be at least 1"),
        ({"image_size": 5000}, "image_size=5000 is larger than 2048"),
        ({"init_std": -1.0}, "init_std=-1.0 must be between"),
        ({"image_std": [1.0, 0.0, 1.0]}, "must be positive"),
        ({"image_mean": [0.5]}, "one number for each of the 3 channels"),
        ({"labels": ["a"]}, "at least two classes"),
        ({"labels": ["a", "b", "a"]}, "each once"),
        ({"labels": ["a", "b", "c", "d"]}, "at least as many classes as the task: .* tells 3 apart, the task 4"),
        ({"sparsity": 1.0}, "sparsity=1.0 must be at least 0 and below 1"),
        ({"target_modules": ["fc1"]}, "acts on the whole model and takes no target_modules"),
        ({"layers_to_transform": [0]}, "takes no layers_to_transform"),
        ({"modules_to_save": ["classifier"]}, "keeps as it is; leave it out"),
    ],
)
def test_bad_values_are_refused_and_leave_the_model_as_it_was(fields, message):
    base = TINY["vit"]()
    with pytest.raises(ConfigError, match=message):
        get_peft_model(base, PixelPromptConfig(**fields))
    assert not base._forward_pre_hooks
    assert type(base.classifier) is nn.Linear
    assert base.config.num_labels == 3


@pytest.mark.parametrize(("family", "message"), [("bert", "made for images"), ("dinov3_vit", "keeps the linear head")])
def test_models_without_images_or_head_are_refused(family, message):
    with pytest.raises(ConfigError, match=message):
        get_peft_model(TINY[family](), PixelPromptConfig())


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (torch.tensor([0, 1, 9]), "distinct source classes from 0 to 8"),
        (torch.tensor([0, -1, 2]), "distinct source classes"),
        (torch.tensor([0, 1, 1]), "distinct source classes"),
        (torch.tensor([0, 1]), "has shape \\[2\\], expected \\[3\\]"),
        (torch.tensor([0.0, 1.0, 2.0]), "holds torch.float32, expected torch.int64"),
        (torch.tensor([0, 1, 2], dtype=torch.int32), "holds torch.int32, expected torch.int64"),
        (None, "lacks .*pixel_prompt_mapping"),
    ],
)
def test_a_damaged_mapping_is_refused(mapping, message, tmp_path):
    base = ViT(_vit_config(9))
    put_on(base, labels=["a", "b", "c"], mapping="random").save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    key = next(k for k in state if k.endswith("mapping"))
    state = {k: v for k, v in state.items() if k != key} | ({} if mapping is None else {key: mapping})
    save_file(state, file, metadata={"format": "pt"})
    for put in (PeftModel.from_pretrained, load_adapter):
        with pytest.raises(ConfigError, match=message):
            put(copy.deepcopy(base), tmp_path)


def test_a_base_with_another_head_is_refused(tmp_path):
    """So is one with a fresh head for the targets, as a user would load it for any other method."""
    put_on(ViT(_vit_config(9)), labels=["a", "b", "c"], mapping="random").save_pretrained(tmp_path)
    for classes, message in ((3, "shape"), (9, "differs from the one")):
        other = ViT(_vit_config(classes))
        nn.init.normal_(other.classifier.weight)
        with pytest.raises(AdapterMismatchError, match=message):
            load_adapter(other, tmp_path)
