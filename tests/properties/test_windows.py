"""Prompts in blocks that attend within windows: equal to windows run one by one by hand, in every stage and batch."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.backbones import CLASSES
from support.properties import (
    SEQUENCE,
    TRAINED,
    adapt,
    adapter_parameters,
    assert_close,
    config,
    equal_weights,
    move,
    output,
)
from torch import Tensor, nn
from transformers import (
    SwinBackbone,
    SwinConfig,
    SwinForImageClassification,
    Swinv2Config,
    Swinv2ForImageClassification,
)
from transformers.models.swin.modeling_swin import SwinDropPath

from peft_lab.errors import ConfigError

#: 36 x 28 pixels make 9 x 7 cells, padded to 12 x 8 for windows of 4; then 5 x 4, padded to 8 x 4 and not shifted; the
#: second image is of 16 x 16 cells: two stages with shifts, without padding.
SHAPES = [(36, 28), (64, 64)]

methods = pytest.mark.parametrize("method", SEQUENCE)


@cache
def _built() -> Any:
    settings = {"embed_dim": 8, "depths": [2, 3], "num_heads": [1, 2], "window_size": 4, "patch_size": 4}
    drops = {"drop_path_rate": 0.0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = SwinConfig(image_size=64, num_labels=CLASSES, **settings, **drops)
        model = SwinForImageClassification(made).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def _swin(attention: str = "eager") -> Any:
    model = copy.deepcopy(_built())
    model.set_attn_implementation(attention)
    return model


def _pixels(shape: tuple[int, int] = (64, 64), batch: int = 2) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, *shape, generator=torch.Generator().manual_seed(3))}


# By hand --------------------------------------------------------------------------------------------------------------


def _windows(height: int, width: int, size: int, shift: int) -> Iterator[list[tuple[int, int, int]]]:
    """The windows of a padded grid that is moved by `shift`, each a list of cells: row, column, part of the image."""
    for top in range(0, height, size):
        for left in range(0, width, size):
            cells = []
            for row in range(top, top + size):
                for column in range(left, left + size):
                    # a window at the edge holds cells from the other side of the image, which do not see each other
                    part = 2 * (row >= height - shift > 0) + (column >= width - shift > 0) if shift else 0
                    cells.append(((row + shift) % height, (column + shift) % width, part))
            yield cells


def _attend(attention: Any, x: Tensor, bias: Tensor) -> Tensor:
    """Attention of one window (cells, dim) with a bias (heads, cells, cells)."""
    heads, head = len(bias), x.shape[-1] // len(bias)
    q, k, v = (getattr(attention, f"{name}_proj")(x).unflatten(-1, (heads, head)).transpose(0, 1) for name in "qkv")
    weights = (q @ k.mT / head**0.5 + bias).softmax(-1)
    return attention.o_proj((weights @ v).transpose(0, 1).flatten(1))


def _block(block: Any, x: Tensor, prompts: Tensor, grid: tuple[int, int], shift: int) -> tuple[Tensor, Tensor]:
    """One block on one image: cells (height x width, dim) and prompts (p, dim), window by window."""
    size, table = 4, block.attention.relative_position_bias.relative_position_bias_table
    height, width = (-(-side // size) * size for side in grid)
    shift = shift if min(grid) > size else 0
    normed = torch.zeros(height, width, x.shape[-1])
    normed[: grid[0], : grid[1]] = block.layernorm_before(x).unflatten(0, grid)
    inner, count = block.layernorm_before(prompts), len(prompts)
    attended, of_prompts = torch.zeros_like(normed), []
    places = torch.zeros(table.shape[1], size**2, size**2)
    for i in range(size**2):
        for j in range(size**2):
            down, right = i // size - j // size + size - 1, i % size - j % size + size - 1
            places[:, i, j] = table[down * (2 * size - 1) + right]
    for cells in _windows(height, width, size, shift):
        parts = torch.tensor([part for _, _, part in cells])
        bias = torch.nn.functional.pad(places - 1000 * (parts[:, None] != parts), (count, 0, count, 0))
        window = torch.stack([normed[row, column] for row, column, _ in cells])
        out = block.dropout(_attend(block.attention, torch.cat([inner, window]), bias))
        of_prompts.append(out[:count])
        for (row, column, _), value in zip(cells, out[count:], strict=True):
            attended[row, column] = value
    x = x + attended[: grid[0], : grid[1]].flatten(0, 1)
    prompts = prompts + torch.stack(of_prompts).mean(0)
    return tuple(y + block.dropout(block.mlp(block.layernorm_after(y))) for y in (x, prompts))  # type: ignore[return-value]


def _by_hand(base: Any, pixels: Tensor, given: list[Tensor | None]) -> Tensor:
    """Logits of one image with prompts written before the blocks for which they are given."""
    x, grid = base.swin.embeddings(pixels)
    x, order, prompts = x[0], 0, torch.empty(0)
    for stage in base.swin.encoder.layers:
        for index, block in enumerate(stage.blocks):
            new = given[order]
            prompts = prompts if new is None else new
            x, prompts = _block(block, x, prompts, grid, 0 if index % 2 == 0 else 2)
            order += 1
        if stage.downsample is not None:
            x = stage.downsample(x[None], grid)[0]
            prompts = stage.downsample.reduction(stage.downsample.norm(torch.cat([prompts] * 4, -1)))
            grid = tuple(-(-side // 2) for side in grid)
    return base.classifier(base.swin.layernorm(x).mean(0))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("deep", [True, False])
@torch.no_grad()
def test_equals_windows_run_by_hand(deep, shape):
    base = _swin()
    for block in (block for stage in base.swin.encoder.layers for block in stage.blocks):
        block.dropout = nn.Softsign()  # in the place of dropout something that is no chance
    model = move(adapt("vpt", base, num_prompts=3, deep=deep), scale=1.0)
    prompts: list[Tensor | None] = list(adapter_parameters(model).values())
    inputs = _pixels(shape)
    found = output(model, inputs)
    given = prompts if deep else [*prompts, None, None, None, None]
    expected = torch.stack([_by_hand(base, image[None], given) for image in inputs["pixel_values"]])
    assert_close(found, expected)
    assert (expected - output(base, inputs)).abs().max() > 1e-2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_without_prompts_the_base_answers(shape, attention):
    """Switched off, in rows without an adapter and taken away again, the base answers bit for bit."""
    base = _swin(attention)
    model, inputs = adapt("vpt", base, num_prompts=3), _pixels(shape)
    plain = output(base, inputs)
    with model.disable_adapter():
        assert torch.equal(output(model, inputs), plain)
    assert torch.equal(output(model, inputs, adapter_names=["__base__"] * 2), plain)
    assert not torch.allclose(output(move(model), inputs), plain, atol=1e-3)
    assert torch.equal(output(model.unload(), inputs), plain)


# Every method ---------------------------------------------------------------------------------------------------------


@cache
def _pair(method: str, attention: str = "eager") -> Any:
    """A model with two adapters; the second one has more prompts, and writes them before the third block alone."""
    model = adapt(method, _swin(attention))
    count = "num_virtual_tokens" if method == "soft_prompt" else "num_prompts"
    model.add_adapter("other", config(method, layers_to_transform=[2], **{count: 12}))
    move(model, "default", scale=0.5, seed=1), move(model, "other", scale=0.5, seed=2)
    return model.eval()


@methods
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_sdpa_equals_eager(method, shape):
    inputs, names = _pixels(shape), ["default", "other"]
    eager, sdpa = (output(_pair(method, a), inputs, adapter_names=names) for a in ("eager", "sdpa"))
    assert_close(sdpa, eager)


@methods
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_rows_of_a_batch_answer_as_alone(method, shape):
    """Rows with more prompts, with fewer, and without any."""
    model, inputs = _pair(method), _pixels(shape, batch=3)
    names = ["other", "__base__", "default"]
    mixed = output(model, inputs, adapter_names=names)
    for row, name in enumerate(names):
        assert_close(mixed[row], output(model, inputs, adapter_names=[name] * 3)[row])
    with model.disable_adapter():
        assert_close(mixed[1], output(model, inputs)[1])
    assert (mixed[0] - output(model, inputs)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("method", [method for method in SEQUENCE if method in TRAINED])
@pytest.mark.parametrize("reentrant", [True, False])
def test_two_forwards_before_one_backward_with_checkpointing(method, reentrant):
    """Blocks are run again with the prompts of their own call, and slots that leave a stage have a gradient."""
    found = []
    for checkpointing in (False, True):
        model = move(adapt(method, _swin(), layers_to_transform=[0])).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        first, second = (model(**_pixels(shape)).logits.square().sum() for shape in SHAPES)
        (first + 3 * second).backward()
        found.append({name: p.grad for name, p in adapter_parameters(model).items()})
        stages = model.get_base_model().swin.encoder.layers
        assert all(m.gradient_checkpointing is checkpointing for stage in stages for m in (stage, *stage.blocks))
    for name, grad in found[0].items():
        assert grad.abs().sum() > 0, name
        assert_close(found[1][name], grad)


@methods
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_what_is_recorded_is_of_the_tokens(method, attention):
    base, asked = _swin(attention), {"output_hidden_states": True, "output_attentions": attention == "eager"}
    plain, out = base(**_pixels(), **asked), _pair(method, attention)(**_pixels(), **asked)
    for name in ("hidden_states", "reshaped_hidden_states", "attentions"):
        ours, theirs = (getattr(result, name, None) or () for result in (out, plain))
        assert [part.shape for part in ours] == [part.shape for part in theirs], name
        assert name == "attentions" or ours
    assert attention == "sdpa" or out.attentions


@methods
def test_save_and_load(method, tmp_path):
    base, inputs = _swin(), _pixels()
    model = move(adapt(method, base))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(_swin(), tmp_path)
    assert torch.equal(output(loaded, inputs), output(model, inputs))


@methods
def test_unload_leaves_no_hook(method):
    base, asked = _swin(), {"output_hidden_states": True}
    base(**_pixels(), **asked)  # transformers puts its own hooks in now
    before = _hooks(base)
    model = adapt(method, base)
    model(**_pixels())
    assert _hooks(model) > before
    left = model.unload()
    assert _hooks(left) == before
    assert equal_weights(left, base)


def _hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@methods
def test_an_error_in_a_stage_leaves_its_checkpointing_on(method):
    model = adapt(method, _swin()).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(0)  # of prompts that are drawn in training
    expected = model(**_pixels()).logits
    stage = model.get_base_model().swin.encoder.layers[1]
    handle = stage.blocks[1].mlp.register_forward_pre_hook(lambda module, args: args[0].view(7))
    with pytest.raises(RuntimeError, match="shape"):
        model(**_pixels())
    handle.remove()
    assert stage.gradient_checkpointing
    assert stage.blocks[1].gradient_checkpointing
    torch.manual_seed(0)
    assert torch.equal(model(**_pixels()).logits, expected)


# Single methods -------------------------------------------------------------------------------------------------------


def test_prompts_and_projections_are_as_wide_as_their_stage():
    model = adapt("vpt", _swin(), num_prompts=3, projection=5)
    shapes = {n.removeprefix("base_model.model.swin."): [*p.shape] for n, p in adapter_parameters(model).items()}
    assert [s for n, s in shapes.items() if "prompts" in n] == [[3, 5]] * 5
    assert [s for n, s in shapes.items() if "weight" in n] == [[8, 5], [16, 5]]
    assert [n.partition(".vpt")[0] for n in shapes if "bias" in n] == [f"encoder.layers.{i}.blocks.0" for i in (0, 1)]
    with pytest.raises(ConfigError, match="4 numbers, but 5 blocks"):
        adapt("vpt", _swin(), num_prompts=[1, 2, 3, 4])


def test_count_on_swin_base():
    """One set of prompts per block, as wide as its stage: 2 x 128 + 2 x 256 + 18 x 512 + 2 x 1024 for each prompt."""
    settings = {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]}
    with torch.device("meta"):
        base = SwinForImageClassification(SwinConfig(**settings))
    model = get_peft_model(base, config("vpt", base, num_prompts=50, modules_to_save=[]))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 50 * 12_032


def test_dropout_and_dropped_paths_are_the_same_when_a_block_runs_again():
    base = _swin()
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    base.swin.encoder.layers[1].blocks[1].drop_path = SwinDropPath(0.5)
    grads = []
    for reentrant in (None, True, False):
        model = adapt("vpt", base, dropout=0.2).train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(0)
        model(**_pixels()).logits.square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in adapter_parameters(model).values() if p.grad is not None]))
    assert_close(grads[1], grads[0])
    assert_close(grads[2], grads[0])


@torch.no_grad()
def test_as_a_backbone_of_feature_maps():
    base = SwinBackbone(copy.deepcopy(_built().config)).eval()
    plain = base(**_pixels()).feature_maps
    model = move(adapt("vpt", base), scale=1.0)
    maps = model(**_pixels()).feature_maps
    assert [m.shape for m in maps] == [m.shape for m in plain]
    assert not torch.allclose(maps[0], plain[0], atol=1e-3)


@pytest.mark.parametrize("method", ["dvpt", "prompt_cam"])
def test_methods_without_a_form_for_windows_say_so(method):
    with pytest.raises(ConfigError, match=f'"{method}" cannot put prompts into the windows of SwinLayer'):
        adapt(method, _swin())


@methods
def test_blocks_that_make_their_bias_inside_of_attention_are_refused(method):
    settings = {"embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4, "patch_size": 4}
    with pytest.raises(ConfigError, match="windows of Swinv2"):
        adapt(method, Swinv2ForImageClassification(Swinv2Config(image_size=32, **settings)))
