"""DVPT: its counts, both variants by hand, sharing, and tokens that come out alone."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from support.backbones import TINY, VARIANTS, tiny_inputs
from support.properties import PRE_NORM, adapt, adapter_parameters, config, main_tensor, move, output
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Data2VecVisionConfig,
    Data2VecVisionForImageClassification,
    ViTConfig,
    ViTModel,
)

from peft_lab.errors import ConfigError
from peft_lab.tuners.sequence.layer import SequenceLayer

PREFIX = {"vit": 1, "dinov2_with_registers": 5, "beit": 1}


def _count(model) -> int:
    return sum(p.numel() for p in adapter_parameters(model).values())


def test_published_count():
    """ViT-B/16 of CLIP at 288 pixels: four bottlenecks for twelve blocks, 50 prompts and their positions."""
    with torch.device("meta"):
        settings = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
        base = CLIPVisionModel(CLIPVisionConfig(image_size=288, patch_size=16, **settings))
    model = get_peft_model(base, config("dvpt", base, variant="author_code"))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 202_836


@pytest.mark.parametrize(("k", "p", "r"), [(3, 50, 20), (1, 10, 20), (2, 7, 3), (5, 1, 1)])
def test_count_of_the_formula(k, p, r):
    with torch.device("meta"):
        base = ViTModel(ViTConfig(num_hidden_layers=7, hidden_size=24, num_attention_heads=2))
    model = get_peft_model(base, config("dvpt", base, share_group=k, num_prompts=p, bottleneck=r))
    assert _count(model) == -(-7 // k) * (2 * 24 * r + r + 24 + 1) + 2 * p * 24


@pytest.mark.parametrize("share", [1, 2])
@pytest.mark.parametrize("family", PREFIX)
@pytest.mark.parametrize("variant", ["paper", "author_code"])
@torch.no_grad()
def test_equals_blocks_run_by_hand(variant, family, share):
    base = TINY[family]().eval()
    for block in (m for m in base.modules() if hasattr(m, "drop_path")):
        block.drop_path = nn.Softsign()  # in the place of dropped paths something that is no chance
    fields = {"num_prompts": 3, "bottleneck": 4, "share_group": share}
    model = move(adapt("dvpt", base, variant=variant, **fields))
    named = {".".join(name.split(".")[-3:-1]): p for name, p in adapter_parameters(model).items()}
    pixels = tiny_inputs(base)["pixel_values"]
    stack = getattr(base, base.base_model_prefix)
    blocks = stack.encoder.layer if "dino" in family else stack.layers
    x = stack.embeddings(pixels)
    x = x[0] if isinstance(x, tuple) else x
    x = torch.cat([(named["0.dvpt_prompts"] + named["0.dvpt_positions"]).expand(2, -1, -1), x], 1)
    for depth, block in enumerate(blocks):
        own = 0 if share == 2 else depth
        down, up = named[f"{own}.dvpt_down"], named[f"{own}.dvpt_up"]
        if family == "vit":
            x = x + block.attention(block.layernorm_before(x))[0]
            summand = block.mlp(block.layernorm_after(x))
        elif family == "beit":
            x = x + block.drop_path(block.lambda_1 * block.attention(block.layernorm_before(x))[0])
            summand = block.drop_path(block.lambda_2 * block.mlp(block.layernorm_after(x)))
        else:
            x = x + block.drop_path(block.layer_scale1(block.attention(block.norm1(x))[0]))
            summand = block.drop_path(block.layer_scale2(block.mlp(block.norm2(x))))
        quick = lambda x: x * torch.sigmoid(1.702 * x)  # noqa: E731
        if variant == "paper":
            z = quick(x) @ down.T + named[f"{own}.dvpt_down_bias"]
            p, t = z[:, :3], z[:, 3 + PREFIX[family] :]
            z = torch.cat([(p @ t.mT * 16**-0.5).softmax(-1) @ t, z[:, 3:]], 1)
        else:
            z = quick(x @ down.T + named[f"{own}.dvpt_down_bias"])
        x = x + summand + named[f"{own}.dvpt_gate"] * (z @ up.T + named[f"{own}.dvpt_up_bias"])
    expected = stack.layernorm(x[:, 3:])
    found = model.get_base_model()
    found = getattr(found, found.base_model_prefix)(pixels).last_hidden_state
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-6 * max(1, expected.abs().max())


@torch.no_grad()
def test_prompts_go_through_the_norm_before_the_blocks():
    """CLIP normalises its embeddings: prompts are put in before that, as the authors do."""
    base = VARIANTS["clip_vision"]().eval()
    model = move(adapt("dvpt", base, num_prompts=3, modules_to_save=[]))
    seen = []
    blocks = [m for m in model.modules() if isinstance(m, SequenceLayer)]
    blocks[0].base_layer.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model(**tiny_inputs(base))
    prompts, positions = (
        p for name, p in adapter_parameters(model).items() if "prompts" in name or "positions" in name
    )
    torch.testing.assert_close(seen[0][0, :3], base.pre_layrnorm(prompts + positions), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["vit", "dinov2_with_registers", "clip_vision", "beit_final_norm"])
@pytest.mark.parametrize("count", [1, 3])
@torch.no_grad()
def test_readout_is_the_mean_of_class_token_and_prompts_behind_the_norm(family, count):
    base = (TINY.get(family) or VARIANTS[family])().eval()
    inputs, seen = tiny_inputs(base), {}
    found = []
    for readout in ("class", "prompts"):
        model = move(adapt("dvpt", base, num_prompts=count, readout=readout))
        last = [m for m in model.modules() if isinstance(m, SequenceLayer)][-1]
        norm = getattr(*last.stack.norms["norm.final"])
        last.base_layer.register_forward_hook(lambda m, args, out: seen.update(x=out))
        out = model.get_base_model()(**inputs)
        plain = norm(seen["x"][:, : count + 1])
        read = plain.mean(1) if readout == "prompts" else plain[:, count]
        rest = norm(seen["x"][:, count + 1 :])
        if family == "clip_vision":
            torch.testing.assert_close(out.pooler_output, read, atol=1e-5, rtol=1e-4)
        else:
            patches = [rest[:, PREFIX[family] - 1 :].mean(1)] if "dino" in family else []
            expected = model.get_base_model().classifier(torch.cat([read, *patches], -1))
            torch.testing.assert_close(out.logits, expected, atol=1e-5, rtol=1e-4)
        found.append(main_tensor(out) if family != "clip_vision" else out.pooler_output)
    assert not torch.allclose(*found, atol=1e-3)


@pytest.mark.parametrize("family", ["vit", "dinov2"])
@torch.no_grad()
def test_rows_read_what_their_adapter_reads(family):
    base = TINY[family]()
    model = adapt("dvpt", base, num_prompts=3, readout="prompts")
    model.add_adapter("more", config("dvpt", num_prompts=5, readout="prompts"))
    model.add_adapter("plain", config("dvpt", num_prompts=4))
    for seed, name in enumerate(("default", "more", "plain")):
        move(model, name, seed=seed)
    inputs, names = tiny_inputs(base, batch=4), ["more", "plain", "__base__", "default"]
    mixed = output(model, inputs, adapter_names=names)
    for row, name in enumerate(names):
        alone = output(model, inputs, adapter_names=[name] * 4)
        torch.testing.assert_close(mixed[row], alone[row], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mixed[2], output(base, inputs)[2], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_readout_without_a_class_token_behind_a_norm_is_refused():
    for family in ("siglip", "beit", "clip_classifier"):
        base = (TINY.get(family) or VARIANTS[family])()
        with pytest.raises(ConfigError, match=f"{type(base).__name__} reads no class token behind a final norm"):
            get_peft_model(base, config("dvpt", base, readout="prompts"))
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())
    base = TINY["dinov2"]()
    with pytest.raises(ConfigError, match="call the whole model"):
        adapt("dvpt", base, readout="prompts").get_base_model().dinov2(**tiny_inputs(base))
    vit = TINY["vit"]()
    inside = adapt("dvpt", vit, readout="prompts").get_base_model().vit  # the norm is in the stack
    assert inside(**tiny_inputs(vit)).last_hidden_state.isfinite().all()


def test_gate_starts_at_zero_and_moves_first():
    model = adapt("dvpt", TINY["vit"](), share_group=1).train()
    model(**tiny_inputs(TINY["vit"](), labels=True)).loss.backward()
    for name, parameter in adapter_parameters(model).items():
        if "gate" in name:
            assert parameter.item() == 0
            assert parameter.grad.abs() > 0
        if "down" in name or "up" in name:
            assert parameter.grad.abs().sum() == 0


@pytest.mark.parametrize("variant", ["paper", "author_code"])
@torch.no_grad()
def test_rows_with_different_numbers_of_prompts(variant):
    base = TINY["vit"]()
    model = adapt("dvpt", base, num_prompts=3, variant=variant)
    model.add_adapter("other", config("dvpt", num_prompts=5, share_group=1, variant=variant))
    move(model, "default", seed=1), move(model, "other", seed=2)
    inputs = tiny_inputs(base, batch=4)
    names = ["other", "default", "__base__", "other"]
    mixed = output(model, inputs, adapter_names=names)
    for row, name in enumerate(names):
        alone = output(model, {k: v[row : row + 1] for k, v in inputs.items()}, adapter_names=[name])
        torch.testing.assert_close(mixed[row], alone[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_two_adapters_before_one_backward_with_checkpointing(reentrant):
    """A block that runs again has the branch of its own call, not that of the last one."""
    found = []
    base = TINY["vit"]()
    pixels = tiny_inputs(base)["pixel_values"]
    for checkpointing in (False, True):
        model = adapt("dvpt", base, num_prompts=3)
        model.add_adapter("other", config("dvpt", num_prompts=5, variant="author_code"))
        move(model, "default", seed=1), move(model, "other", seed=2)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        loss = 0
        for name in ("default", "other"):
            model.set_adapter(name)
            for parameter in adapter_parameters(model, "default").values():
                parameter.requires_grad_(True)
            loss = loss + model(pixels).logits.square().mean()
        loss.backward()
        found.append({n: p.grad for a in ("default", "other") for n, p in adapter_parameters(model, a).items()})
    assert all(grad is not None for grad in found[0].values())
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", PRE_NORM)
def test_unloading_leaves_no_hooks(family):
    base = TINY[family]().requires_grad_(False)  # SigLIP's pooling rounds otherwise where weights require grad
    model = adapt("dvpt", base)
    assert any(m._forward_pre_hooks for m in model.modules())
    assert any("forward" in vars(m) for m in model.modules())
    unloaded = model.unload()
    assert not any(m._forward_pre_hooks or m._forward_hooks or "forward" in vars(m) for m in unloaded.modules())
    assert torch.equal(output(unloaded, tiny_inputs(base)), output(base, tiny_inputs(base)))


def test_what_it_refuses():
    with pytest.raises(ConfigError, match=r"share_group=0 must be at least 1"):
        config("dvpt", share_group=0)
    other = Data2VecVisionForImageClassification(
        Data2VecVisionConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16)
    )
    with pytest.raises(ConfigError, match=r"no place for its branch beside mlp of Data2VecVisionLayer"):
        adapt("dvpt", other)
    for family in ("swin", "resnet"):
        with pytest.raises(ConfigError, match=r"prompts|branch"):
            adapt("dvpt", TINY[family]())
