"""Training of every method: what it changes, under checkpointing, in half precision and compiled."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from support.backbones import TINY, tiny_inputs
from support.cover import MAIN, cover, each_method
from support.properties import (
    CONV_NETS,
    DRAWS,
    FITTED,
    HEADS,
    IMAGE_LOGITS,
    IMAGES,
    KEEPS_HEAD,
    METHODS,
    ON_OPS,
    OWN,
    SEQUENCE,
    TRAINED,
    TRAINED_HEADS,
    UNTRAINED,
    adapt,
    adapter_parameters,
    as_read,
    assert_close,
    equal_states,
    main_tensor,
    move,
    output,
    pairs,
)

from peft_lab.backbones import module_roles


@pairs([*METHODS, *KEEPS_HEAD, *DRAWS, *HEADS], TINY)
def test_only_what_is_declared_trains(base, method, family):
    if (method, family) == ("lora", "mobilenet_v2"):
        pytest.skip("peft's LoRA layer hides the stride that MobileNetV2 reads to pad")
    model = adapt(method, base).train()
    heads = [] if method in (*IMAGE_LOGITS, *KEEPS_HEAD, *HEADS) else module_roles.head_modules(base)
    assert set(model.peft_config["default"].modules_to_save or ()) == set(heads)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    own_names = set(adapter_parameters(model))
    assert bool(own_names) == (method not in FITTED)
    assert own_names & trainable == (set() if method in UNTRAINED else own_names)
    assert all("modules_to_save.default" in n for n in trainable - own_names)
    assert bool(trainable - own_names) == bool(heads)
    if not trainable:
        return
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # LoRA's A has no gradient before B has moved
        optimizer.zero_grad()
        main_tensor(model(**as_read(model, tiny_inputs(base)))).square().mean().backward()
        optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed <= trainable
    # A pooled output does not depend on every op of the last block.
    assert len(changed & own_names) >= 0.6 * len(own_names & trainable)


@pairs([*OWN, *KEEPS_HEAD, *DRAWS, *TRAINED_HEADS], CONV_NETS)
def test_training_leaves_running_statistics_to_the_base(base, method, family, tmp_path):
    """A loop of anybody's: `model.train()` and steps. What the norms of a conv net gather is in no adapter file."""
    inputs, other = tiny_inputs(base), tiny_inputs(base, batch=4)
    plain = output(base, inputs)
    model = adapt(method, base)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    for _ in range(2):
        model.train()
        optimizer.zero_grad()
        images = {"pixel_values": 2 * other["pixel_values"] + 1}
        main_tensor(model(**as_read(model, images))).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    assert model.training
    trained = output(model, inputs)
    assert not torch.equal(trained, plain)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(output(loaded, inputs), trained)
    with model.disable_adapter():
        assert torch.equal(output(model, inputs), plain)
    bare = model.unload()
    assert equal_states(dict(bare.named_buffers()), dict(base.named_buffers()))
    assert not bare._forward_pre_hooks


@pytest.mark.parametrize(("method", "family"), [("svfit", "resnet")])
def test_a_norm_that_is_trained_on_purpose_gathers_statistics(base, method, family, tmp_path):
    inputs, norm = tiny_inputs(base), "resnet.embedder.embedder.normalization"
    model = adapt(method, base, modules_to_save=["classifier", norm])
    before = {n: b.clone() for n, b in model.named_buffers()}
    model.train()(pixel_values=2 * inputs["pixel_values"] + 1)
    changed = {n for n, b in model.named_buffers() if not torch.equal(b, before[n])}
    assert {n.rpartition(".")[2] for n in changed} == {"running_mean", "running_var", "num_batches_tracked"}
    assert all(f"{norm}.modules_to_save.default." in n for n in changed)
    trained = output(model, inputs)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path), inputs), trained)


@pairs([*TRAINED, *KEEPS_HEAD, *DRAWS, *TRAINED_HEADS], MAIN)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(base, method, family, reentrant):
    if not base.supports_gradient_checkpointing:
        pytest.skip(f"transformers has no gradient checkpointing for {family}")
    inputs = tiny_inputs(base)
    grads = []
    for checkpointing in (False, True):
        model = move(adapt(method, base)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant and "input_ids" in inputs:
                model.enable_input_require_grads()
        main_tensor(model(**as_read(model, inputs))).square().mean().backward()
        grads.append({n: p.grad for n, p in adapter_parameters(model).items()})
    compared = 0
    for name, grad in grads[0].items():
        if grads[1][name] is None:
            # Reentrant checkpointing of images: the first block's input needs no gradient, so peft's users get none.
            assert reentrant
            assert "pixel_values" in inputs
            continue
        assert_close(grads[1][name], grad)
        compared += 1
    assert compared or reentrant


@pairs([*TRAINED, *KEEPS_HEAD, *DRAWS, *TRAINED_HEADS], MAIN)
def test_bfloat16_base_with_float32_adapter(base, method, family):
    model = adapt(method, copy.deepcopy(base).to(torch.bfloat16))
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in tiny_inputs(base).items()}
    out = main_tensor(model.train()(**as_read(model, inputs)))
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in adapter_parameters(model).values())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter_parameters(model).values())


@pairs([*TRAINED, *KEEPS_HEAD, *DRAWS, *TRAINED_HEADS], MAIN)
def test_autocast_keeps_gradients_finite(base, method, family):
    model = adapt(method, base).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = main_tensor(model(**as_read(model, tiny_inputs(base)))).float().square().mean()
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter_parameters(model).values())


#: What is compiled: one family of each sort is enough where the layers are those of the sequence.
COMPILED = [(m, f) for m in ON_OPS for f in ("bert", "vit", "llama")]
COMPILED += [(m, "llama") for m in SEQUENCE] + [(m, "vit") for m in (*IMAGES, *KEEPS_HEAD, *DRAWS, *HEADS)]


@pytest.mark.full
@pytest.mark.parametrize(
    ("method", "family"),
    cover(COMPILED, lambda case: set() if case[0] in SEQUENCE else {"ops"}, full=each_method),
)
def test_compiled_equals_eager(base, method, family):
    inputs = tiny_inputs(base)
    model = move(adapt(method, base))
    expected = output(model, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    assert_close(output(compiled, inputs), expected)
    move(model, seed=7)
    assert not torch.allclose(output(compiled, inputs), expected, atol=1e-4)
    assert_close(output(compiled, inputs), output(model, inputs))
