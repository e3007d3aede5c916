"""Properties of every registered method on tiny models of every family. A new method is tested by registering."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from peft import (
    AutoPeftModel,
    AutoPeftModelForSequenceClassification,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file
from support.backbones import TINY, VARIANTS, tiny_inputs
from support.properties import (
    EVERY_OWN,
    IMAGE_LOGITS,
    IMAGES,
    KEEPS_HEAD,
    METHODS,
    NO_SEQUENCE,
    ON_BLOCKS,
    ON_OPS,
    OWN,
    SEQUENCE,
    TRAINED,
    UNTRAINED,
    adapt,
    adapter_parameters,
    assert_close,
    config,
    equal_weights,
    main_tensor,
    move,
    output,
    pairs,
    text_or_image,
)
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

from peft_lab import registry
from peft_lab.backbones import module_roles
from peft_lab.errors import ConfigError
from peft_lab.tuners.registration import config_class
from peft_lab.tuners.sequence.tuner import stacks_of

#: One of each shape of model: encoder, decoder, fused attention, encoder-decoder, vision transformer, two conv nets.
MAIN = ["bert", "vit", "llama", "gpt2", "t5", "swin", "resnet", "efficientnet"]
own = pytest.mark.parametrize("method", EVERY_OWN)


@pytest.fixture(scope="module")
def models():
    return {}


@pytest.fixture
def base(models, family):
    if family not in models:
        models[family] = (TINY.get(family) or VARIANTS[family])()
    return models[family]


@pairs([*OWN, *KEEPS_HEAD], TINY)
@torch.no_grad()
def test_life_of_an_adapter(base, method, family, tmp_path):
    """Start, effect, disabling, saving, loading, merging and unmerging on one model."""
    inputs = tiny_inputs(base)
    # A frozen copy: nn.MultiheadAttention (SigLIP's pooling head) rounds otherwise where its weights require grad.
    plain = output(copy.deepcopy(base).requires_grad_(False), inputs)
    model = adapt(method, base)
    assert torch.equal(output(model, inputs), plain) == registry.method(method).can("identity_start")
    moved = output(move(model), inputs)
    assert not torch.allclose(moved, plain, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(output(model, inputs), plain)
    assert torch.equal(output(model, inputs), moved)

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(output(loaded, inputs), moved)
    assert _all_equal(get_peft_model_state_dict(loaded), get_peft_model_state_dict(model))

    if not registry.method(method).can("merge"):
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(NotImplementedError, match=f'Method "{method}" cannot be merged.*because'):
                merge()
        unloaded = model.unload()
        assert type(unloaded) is type(base)
        assert torch.equal(output(unloaded, inputs), plain)
        return
    model.merge_adapter()
    assert_close(output(model, inputs), moved)
    with model.disable_adapter():
        assert torch.equal(output(model, inputs), plain)
    model.unmerge_adapter()
    assert torch.equal(output(model, inputs), moved)
    merged = model.merge_and_unload()
    assert type(merged) is type(base)
    assert_close(output(merged, inputs), moved)


@pytest.mark.parametrize("family", NO_SEQUENCE)
@pytest.mark.parametrize("method", SEQUENCE)
def test_families_without_a_place_for_prompts_are_refused(base, method, family):
    with pytest.raises(ConfigError, match="prompts"):
        adapt(method, base)


def _all_equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pairs([*METHODS, *KEEPS_HEAD], TINY)
def test_only_what_is_declared_trains(base, method, family):
    if (method, family) == ("lora", "mobilenet_v2"):
        pytest.skip("peft's LoRA layer hides the stride that MobileNetV2 reads to pad")
    model = adapt(method, base).train()
    heads = [] if method in (*IMAGE_LOGITS, *KEEPS_HEAD) else module_roles.head_modules(base)
    assert set(model.peft_config["default"].modules_to_save or ()) == set(heads)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    own_names = set(adapter_parameters(model))
    assert own_names
    assert own_names & trainable == (set() if method in UNTRAINED else own_names)
    assert all("modules_to_save.default" in n for n in trainable - own_names)
    assert bool(trainable - own_names) == bool(heads)
    if not trainable:
        return
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # LoRA's A has no gradient before B has moved
        optimizer.zero_grad()
        main_tensor(model(**tiny_inputs(base))).square().mean().backward()
        optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed <= trainable
    # A pooled output does not depend on every op of the last block.
    assert len(changed & own_names) >= 0.6 * len(own_names & trainable)


@pairs([*OWN, *KEEPS_HEAD], NO_SEQUENCE)
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
        main_tensor(model(pixel_values=2 * other["pixel_values"] + 1)).square().mean().backward()
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
    assert _all_equal(dict(bare.named_buffers()), dict(base.named_buffers()))
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


@pairs(METHODS, TINY)
def test_declared_roles_are_the_ones_adapted(base, method, family):
    model = adapt(method, base)
    wanted = registry.method(method).roles
    if method in ON_BLOCKS:  # whole blocks of one stack
        assert wanted == ("block",)
        assert model.targeted_module_names in stacks_of(base).values()
    else:
        targets, expected = model.peft_config["default"].target_modules, module_roles.target_modules(base, wanted)
        assert (sorted(targets) if isinstance(targets, set) else targets) == expected
    head = {n for h in module_roles.head_modules(base) for n, _ in base.named_modules() if n.startswith(h)}
    assert not head & set(model.targeted_module_names)


@pairs(METHODS, MAIN)
def test_file_holds_exactly_the_adapter_and_the_head(base, method, family, tmp_path):
    model = adapt(method, base)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    prefix = model.base_model.prefix
    heads = tuple(f"base_model.model.{h}." for h in module_roles.head_modules(base))
    assert len([k for k in state if f".{prefix}" in k]) == len(adapter_parameters(model))
    assert all(f".{prefix}" in k or k.startswith(heads) for k in state)
    own_names = set(adapter_parameters(model))
    saved = [p for n, p in model.named_parameters() if p.requires_grad or n in own_names]
    assert sum(v.numel() for v in state.values()) == sum(p.numel() for p in saved)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pairs([*OWN, *KEEPS_HEAD], MAIN)
def test_every_way_to_load_gives_the_same(base, method, family, tmp_path):
    inputs = tiny_inputs(base)
    model = move(adapt(method, base))
    expected = output(model, inputs)
    base.save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    fresh = lambda: type(base).from_pretrained(tmp_path / "base")  # noqa: E731
    lazy = PeftModel.from_pretrained(fresh(), tmp_path / "adapter", low_cpu_mem_usage=True)
    assert _all_equal(get_peft_model_state_dict(lazy), get_peft_model_state_dict(model))
    assert_close(output(lazy, inputs), expected, 1e-6)
    native = fresh()
    native.load_adapter(tmp_path / "adapter")
    assert_close(output(native, inputs), expected, 1e-6)
    assert_close(output(type(base).from_pretrained(tmp_path / "adapter"), inputs), expected, 1e-6)
    renamed = PeftModel.from_pretrained(fresh(), tmp_path / "adapter", adapter_name="another")
    assert_close(output(renamed, inputs), expected, 1e-6)


@pairs([*OWN, *KEEPS_HEAD], ["bert", "vit"])
def test_a_pickled_model_is_the_same(base, method, family):
    model = move(adapt(method, base))
    expected = output(model, tiny_inputs(base))
    again = pickle.loads(pickle.dumps(model))
    assert type(again.base_model) is type(model.base_model)
    assert torch.equal(output(again, tiny_inputs(base)), expected)
    with again.disable_adapter():
        assert torch.equal(output(again, tiny_inputs(base)), output(base, tiny_inputs(base)))


@pytest.mark.parametrize("method", [*EVERY_OWN, *KEEPS_HEAD])
def test_no_layers_at_all_are_refused(method):
    with pytest.raises(ConfigError, match=r"layers_to_transform=\[\] names no block"):
        config(method, layers_to_transform=[])


@pytest.mark.parametrize("method", KEEPS_HEAD)
def test_a_pruned_base_is_pruned_alike_with_little_memory(method, tmp_path):
    base = TINY["vit"]()
    model = move(adapt(method, base, sparsity=0.3))
    expected = output(model, tiny_inputs(base))
    model.save_pretrained(tmp_path)
    lazy = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(output(lazy, tiny_inputs(base)), expected)
    assert equal_weights(lazy.unload(), base)


@pytest.mark.parametrize("method", OWN)
def test_auto_peft_model(method, tmp_path):
    base = TINY["bert"]()
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = move(get_peft_model(base, config(method, task_type="SEQ_CLS")))
    expected = output(model, tiny_inputs(base))
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3)
    assert torch.equal(output(loaded, tiny_inputs(base)), expected)


@pytest.mark.parametrize("method", IMAGES)
def test_auto_peft_model_for_images(method, tmp_path):
    TINY["vit"]().save_pretrained(tmp_path / "base")
    base = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    model = move(get_peft_model(base, config(method)))
    expected = output(model, tiny_inputs(base))
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter")
    assert torch.equal(output(loaded, tiny_inputs(base)), expected)


@pytest.mark.parametrize("method", [*OWN, *KEEPS_HEAD])
def test_transformers_own_adapter_methods(method, tmp_path):
    base = TINY["vit"]()
    inputs = tiny_inputs(base)
    plain = output(base, inputs)
    base.add_adapter(config(method), adapter_name="first")
    base.add_adapter(config(method), adapter_name="second")
    move(base, "first", seed=1), move(base, "second", seed=2)
    base.set_adapter("first")
    first = output(base, inputs)
    base.set_adapter("second")
    assert not torch.allclose(output(base, inputs), first, atol=1e-5)
    base.set_adapter("first")
    base.save_pretrained(tmp_path)
    base.disable_adapters()
    assert torch.equal(output(base, inputs), plain)
    base.enable_adapters()
    base.delete_adapter("second")
    assert torch.equal(output(base, inputs), first)
    again = TINY["vit"]()
    again.load_adapter(tmp_path)
    assert torch.equal(output(again, inputs), first)


@pairs([*OWN, *KEEPS_HEAD], MAIN)
def test_several_adapters_on_one_model(base, method, family):
    inputs = tiny_inputs(base)
    model = adapt(method, base)
    model.add_adapter("second", config(method))
    move(model, "default", seed=1), move(model, "second", seed=2)
    first = output(model, inputs)
    model.set_adapter("second")
    second = output(model, inputs)
    assert not torch.allclose(first, second, atol=1e-5)
    model.set_adapter("default")
    assert torch.equal(output(model, inputs), first)
    model.delete_adapter("default")
    assert torch.equal(output(model, inputs), second)
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("default")
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter("second", config(method))


@pairs(OWN, MAIN)
def test_mixed_batch_equals_each_row_alone(base, method, family):
    names = ["second", "__base__", "default", "second"]
    inputs = tiny_inputs(base, batch=4)
    model = adapt(method, base)
    model.add_adapter("second", config(method))
    move(model, "default", seed=1), move(model, "second", seed=2)
    mixed = output(model, inputs, adapter_names=names)
    for row, name in enumerate(names):
        one = {k: v[row : row + 1] for k, v in inputs.items()}
        alone = output(model, one, adapter_names=[name])
        assert_close(mixed[row : row + 1], alone, 5e-5)
    model.set_adapter("second")
    assert_close(mixed[[0, 3]], output(model, inputs)[[0, 3]], 5e-5)
    with pytest.raises(ValueError, match="non-existing"):
        output(model, inputs, adapter_names=["nobody"] * 4)
    with pytest.raises(ValueError, match="eval"):
        model.train()(**inputs, adapter_names=names)


@pytest.mark.parametrize("method", EVERY_OWN)
def test_rows_of_a_mixed_batch_may_have_gradients_after_inference_mode(method):
    if not registry.method(method).can("mixed_batch"):
        pytest.skip("serves no mixed batches")
    base = TINY[text_or_image(method)]()
    names = [f"{method}_after", "default"]  # of this test alone: what belongs to names is kept
    model = adapt(method, base)
    model.add_adapter(names[0], config(method))
    move(model), move(model, names[0], seed=2)
    inputs = tiny_inputs(base)
    with torch.inference_mode():
        expected = main_tensor(model.eval()(**inputs, adapter_names=names))
    found = main_tensor(model(**inputs, adapter_names=names))
    assert torch.equal(found, expected)
    found.square().mean().backward()


@pairs(OWN, ["llama", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_one_adapter_a_row(base, method, family, beams):
    inputs = {k: v for k, v in tiny_inputs(base, batch=3).items() if not k.startswith("decoder")}
    model = adapt(method, base)
    model.add_adapter("second", config(method))
    move(model, "default", seed=1), move(model, "second", seed=2)
    settings = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
    mixed = model.generate(**inputs, adapter_names=["second", "__base__", "default"], **settings)
    model.set_adapter("second")
    alone = model.generate(**inputs, **settings)
    assert torch.equal(mixed[0, : alone.shape[1]], alone[0, : mixed.shape[1]])


@pairs([*TRAINED, *KEEPS_HEAD], MAIN)
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
        main_tensor(model(**inputs)).square().mean().backward()
        grads.append({n: p.grad for n, p in adapter_parameters(model).items()})
    compared = 0
    for name, grad in grads[0].items():
        if grads[1][name] is None:
            # Reentrant checkpointing of images: the first block's input needs no gradient, so peft's users get none.
            assert reentrant
            assert "pixel_values" in inputs
            continue
        torch.testing.assert_close(grads[1][name], grad, atol=1e-6, rtol=1e-5)
        compared += 1
    assert compared or reentrant


@pairs([*TRAINED, *KEEPS_HEAD], MAIN)
def test_bfloat16_base_with_float32_adapter(base, method, family):
    model = adapt(method, copy.deepcopy(base).to(torch.bfloat16))
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in tiny_inputs(base).items()}
    out = main_tensor(model.train()(**inputs))
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in adapter_parameters(model).values())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter_parameters(model).values())


@pairs([*TRAINED, *KEEPS_HEAD], MAIN)
def test_autocast_keeps_gradients_finite(base, method, family):
    model = adapt(method, base).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = main_tensor(model(**tiny_inputs(base))).float().square().mean()
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter_parameters(model).values())


#: What is compiled: one family of each sort is enough where the layers are those of the sequence.
COMPILED = [(m, f) for m in ON_OPS for f in ("bert", "vit", "llama")]
COMPILED += [(m, "llama") for m in SEQUENCE] + [(m, "vit") for m in (*IMAGES, *KEEPS_HEAD)]


@pytest.mark.parametrize(("method", "family"), COMPILED)
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


CONFIGS = {m: config_class(m).__dataclass_fields__ for m in (*EVERY_OWN, *KEEPS_HEAD)}
FIELDS = [(m, f) for m, fields in CONFIGS.items() for f in fields.values() if "other" in f.metadata]


def test_every_own_field_names_a_value_to_try():
    """A knob without a value to try it with would escape the next test."""
    for method in CONFIGS:
        cls = config_class(method)
        inherited = set(cls.__mro__[1].__dataclass_fields__)
        untried = {f.name for f in cls.__dataclass_fields__.values() if "untried" in f.metadata}  # tested by themselves
        assert {f.name for m, f in FIELDS if m == method} == set(cls.__dataclass_fields__) - inherited - untried


@pytest.mark.parametrize(("method", "field"), FIELDS, ids=lambda value: getattr(value, "name", value))
@torch.no_grad()
def test_every_field_has_an_effect(method, field, tmp_path):
    """On the trainable count, on the output of start or moved adapter, or on what the file holds."""
    base = TINY[field.metadata.get("family", "vit")]()
    seen = []
    for fields in ({}, {field.name: field.metadata["other"]}):
        model = adapt(method, base, **fields | (field.metadata.get("with", {}) if fields else {}))
        start = output(model, tiny_inputs(base))
        count = sum(p.numel() for p in adapter_parameters(model).values())
        moved = output(move(model), tiny_inputs(base))
        torch.manual_seed(2)
        trained = main_tensor(model.train()(**tiny_inputs(base)))  # where dropout shows
        size = sum(v.numel() for v in get_peft_model_state_dict(model).values())
        seen.append((count, size, start.tolist(), moved.tolist(), trained.tolist()))
    assert seen[0] != seen[1]


@pairs(OWN, ["vit", "llama", "t5"])
def test_layers_to_transform_chooses_blocks(base, method, family):
    model = adapt(method, base, layers_to_transform=[1])
    with_parameters = {name.partition(f".{model.base_model.prefix}")[0] for name in adapter_parameters(model)}
    assert {module_roles.layer_index(base, name.removeprefix("base_model.model.")) for name in with_parameters} == {1}
    if method in ON_BLOCKS:
        with pytest.raises(ConfigError, match=r"layers_to_transform holds 2; .* blocks 0 to 1"):
            adapt(method, base, layers_to_transform=[1, 2])
        return
    targeted = model.targeted_module_names
    assert {module_roles.layer_index(base, name) for name in targeted} == {1}
    listed = adapt(method, base, layers_to_transform=1, target_modules=sorted({n.split(".")[-1] for n in targeted}))
    assert {module_roles.layer_index(base, name) for name in listed.targeted_module_names} == {1}


@own
def test_regex_and_layers_do_not_contradict_in_silence(method):
    with pytest.raises(ConfigError, match="takes no target_modules" if method in ON_BLOCKS else "regex"):
        adapt(method, TINY["vit"](), layers_to_transform=[1], target_modules=r".*q_proj")


@pairs(OWN, MAIN)
def test_exclude_modules_leaves_out(base, method, family):
    full = adapt(method, base).targeted_module_names
    if method in ON_BLOCKS:  # a block left out would lose the slots on their way
        with pytest.raises(ConfigError, match=r"takes no exclude_modules.*layers_to_transform"):
            adapt(method, base, exclude_modules=[full[0]])
        return
    model = adapt(method, base, exclude_modules=[full[0]])
    assert sorted(model.targeted_module_names) == sorted(set(full) - {full[0]})


@own
def test_modules_to_save_can_be_set_empty_or_otherwise(method, tmp_path):
    base = TINY["vit"]()
    assert adapt(method, base, modules_to_save=[]).peft_config["default"].modules_to_save == []
    heads = [] if method in IMAGE_LOGITS else ["classifier"]
    model = adapt(method, base, modules_to_save=[*heads, "layernorm"])
    assert any("layernorm.modules_to_save" in n for n, p in model.named_parameters() if p.requires_grad)


@own
def test_adapters_named_in_the_old_way_load(method, tmp_path):
    """Module names of transformers 4 in the config, the fingerprints and the file."""
    base = TINY["vit"]()
    targets = {} if method in ON_BLOCKS else {"target_modules": ["q_proj", "v_proj"]}
    model = move(adapt(method, base, **targets))
    expected = output(model, tiny_inputs(base))
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    values["target_modules"] = [_old(name) for name in values["target_modules"]]
    values["fingerprints"] = {_old(k): v for k, v in values["fingerprints"].items()}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    from safetensors.torch import save_file

    path = tmp_path / "adapter_model.safetensors"
    save_file({_old(k): v for k, v in load_file(path).items()}, path)
    assert torch.equal(output(PeftModel.from_pretrained(base, tmp_path), tiny_inputs(base)), expected)


def _old(name: str) -> str:
    name = name.replace("vit.layers.", "vit.encoder.layer.")
    if name in ("q_proj", "v_proj"):
        return {"q_proj": "query", "v_proj": "value"}[name]
    return name.replace("attention.q_proj", "attention.attention.query").replace(
        "attention.v_proj", "attention.attention.value"
    )


@own
def test_same_seed_same_adapter(method):
    base = TINY["vit"]()
    one, two = adapt(method, base, seed=3), adapt(method, base, seed=3)
    assert equal_weights(one, two)


@own
def test_nothing_is_trained_in_inference_mode(method, tmp_path):
    base = TINY["vit"]()
    adapt(method, base).save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).peft_type == method.upper()
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert not [n for n, p in loaded.named_parameters() if p.requires_grad]
    trainable = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    wanted = {n for n, p in trainable.named_parameters() if p.requires_grad}
    assert wanted
    assert method in UNTRAINED or wanted >= set(adapter_parameters(trainable))


@own
def test_model_status_names_the_method(method):
    status = adapt(method, TINY["vit"]()).get_model_status()
    assert status.peft_types == {"default": method.upper()}
    assert status.requires_grad == {"default": "irregular" if method in UNTRAINED else True}
    assert status.available_adapters == ["default"]


@pytest.mark.parametrize("name", ["ia3", "ln_tuning", "vera", "oft", "loha", "hra"])
@pytest.mark.parametrize("family", ["vit", "bert", "swin", "modernbert"])
def test_tuners_of_peft_get_targets_and_the_head_by_role(base, name, family):
    """Families that peft has no default targets for included."""
    model = adapt(name, base)
    assert model.targeted_module_names
    assert set(model.peft_config["default"].modules_to_save) == set(module_roles.head_modules(base))
    assert torch.isfinite(output(model, tiny_inputs(base))).all()
