"""Files of every method: what they hold, and every way to load them."""

from __future__ import annotations

import copy
import itertools
import json

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
from support.backbones import TINY, tiny_inputs, unknown
from support.cover import MAIN, cover, each_place
from support.properties import (
    DRAWS,
    EVERY_OWN,
    HEADS,
    IMAGES,
    KEEPS_HEAD,
    METHODS,
    ON_FIXED,
    ON_OPS,
    OWN,
    TEXTS,
    adapt,
    adapter_parameters,
    assert_close,
    config,
    equal_states,
    equal_weights,
    move,
    output,
    pairs,
    text_or_image,
)
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

import peft_lab
from peft_lab.backbones import module_roles
from peft_lab.errors import ConfigError
from peft_lab.tuners import AdapterLayer

own = pytest.mark.parametrize("method", EVERY_OWN)


@pairs([*METHODS, *DRAWS], MAIN)
def test_file_holds_exactly_the_adapter_and_the_head(base, method, family, tmp_path):
    model = adapt(method, base)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    prefix, buffers = model.base_model.prefix, dict(model.named_buffers())
    heads = tuple(f"base_model.model.{h}." for h in module_roles.head_modules(base))
    # What is frozen in an adapter and cannot be made again from the base is saved too.
    frozen = [value for name, value in model.state_dict().items() if f".{prefix}" in name and name in buffers]
    assert len([k for k in state if f".{prefix}" in k]) == len(adapter_parameters(model)) + len(frozen)
    assert all(f".{prefix}" in k or k.startswith(heads) for k in state)
    own_names = set(adapter_parameters(model))
    saved = [p for n, p in model.named_parameters() if p.requires_grad or n in own_names]
    assert sum(v.numel() for v in state.values()) == sum(p.numel() for p in [*saved, *frozen])
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pairs([*OWN, *KEEPS_HEAD, *DRAWS, *HEADS], MAIN)
def test_every_way_to_load_gives_the_same(base, method, family, tmp_path):
    inputs = tiny_inputs(base)
    model = move(adapt(method, base))
    expected = output(model, inputs)
    base.save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    fresh = lambda: type(base).from_pretrained(tmp_path / "base")  # noqa: E731
    lazy = PeftModel.from_pretrained(fresh(), tmp_path / "adapter", low_cpu_mem_usage=True)
    assert equal_states(get_peft_model_state_dict(lazy), get_peft_model_state_dict(model))
    assert_close(output(lazy, inputs), expected)
    native = fresh()
    native.load_adapter(tmp_path / "adapter")
    assert_close(output(native, inputs), expected)
    assert_close(output(type(base).from_pretrained(tmp_path / "adapter"), inputs), expected)
    renamed = PeftModel.from_pretrained(fresh(), tmp_path / "adapter", adapter_name="another")
    assert_close(output(renamed, inputs), expected)


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


@pytest.mark.parametrize("method", [*IMAGES, *DRAWS])
def test_auto_peft_model_for_images(method, tmp_path):
    TINY["vit"]().save_pretrained(tmp_path / "base")
    base = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    model = move(get_peft_model(base, config(method)))
    expected = output(model, tiny_inputs(base))
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter")
    assert torch.equal(output(loaded, tiny_inputs(base)), expected)


@pytest.mark.parametrize("method", [m for m in EVERY_OWN if m not in TEXTS])
def test_adapters_named_in_the_old_way_load(method, tmp_path):
    """Module names of transformers 4 in the config, the fingerprints and the file."""
    base = TINY["vit"]()
    targets = {} if method in ON_FIXED else {"target_modules": ["q_proj", "v_proj"]}
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
    torch.testing.assert_close(output(PeftModel.from_pretrained(base, tmp_path), tiny_inputs(base)), expected)


def _old(name: str) -> str:
    name = name.replace("vit.layers.", "vit.encoder.layer.")
    if name in ("q_proj", "v_proj"):
        return {"q_proj": "query", "v_proj": "value"}[name]
    return name.replace("attention.q_proj", "attention.attention.query").replace(
        "attention.v_proj", "attention.attention.value"
    )


def _change_config(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


#: Ways to read an adapter's config, and ways to load it.
READERS = {
    "the method's config": lambda method, base, folder: type(config(method)).from_pretrained(folder),
    "PeftConfig": lambda method, base, folder: PeftConfig.from_pretrained(folder),
}
LOADERS = {
    "from_pretrained": lambda method, base, folder: PeftModel.from_pretrained(base, folder),
    "from_pretrained, trainable": lambda method, base, folder: PeftModel.from_pretrained(
        base, folder, is_trainable=True
    ),
    "load_adapter": lambda method, base, folder: adapt(method, base).load_adapter(folder, "more"),
    "load_adapter of peft_lab": lambda method, base, folder: peft_lab.load_adapter(base, folder),
    "load_adapter of transformers": lambda method, base, folder: base.load_adapter(folder),
}


@pytest.mark.parametrize("method", cover(EVERY_OWN, each_place))
def test_empty_fields_of_a_newer_peft_are_read_and_others_refused(method, tmp_path):
    base = TINY[text_or_image(method)]()
    move(adapt(method, base)).save_pretrained(tmp_path)
    for door, enter in {**READERS, **LOADERS}.items():
        _change_config(tmp_path, of_a_newer_peft=None)
        enter(method, copy.deepcopy(base), tmp_path)
        for value in (0, ""):
            _change_config(tmp_path, of_a_newer_peft=value)
            with pytest.raises(ConfigError, match="of_a_newer_peft"):
                pytest.fail(f"{door} takes {value!r}: {enter(method, copy.deepcopy(base), tmp_path)}")
    with pytest.raises(ConfigError, match="of_a_newer_peft"):
        config(method, of_a_newer_peft=None)


@pytest.mark.parametrize("method", cover(EVERY_OWN, each_place))
def test_a_config_alone_is_read_and_loads_nothing(method, tmp_path):
    base = TINY[text_or_image(method)]()
    fields = {} if method in ON_FIXED else {"target_modules": r".*(query|key)"}
    saved = config(method, **fields)
    saved.save_pretrained(tmp_path)
    for enter in READERS.values():
        assert enter(method, base, tmp_path) == saved
    for door in ("from_pretrained", "from_pretrained, trainable", "load_adapter", "load_adapter of peft_lab"):
        with pytest.raises(ConfigError, match=r"no adapter_model\.safetensors"):
            LOADERS[door](method, base, tmp_path)
    # It is as good as the one that was saved, also to be saved again with weights.
    again = get_peft_model(base, READERS["the method's config"](method, base, tmp_path))
    again.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).inference_mode


@pytest.mark.parametrize("method", [m for m in EVERY_OWN if m not in ON_FIXED])
def test_a_slow_regex_of_a_config_alone_is_refused(method, tmp_path):
    config(method, target_modules=r"(a+)+b").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="for ever"):
        READERS["the method's config"](method, None, tmp_path)


UNKNOWN = ["layoutlm", "pegasus", "gptj", "codegen", "starcoder2", "gpt_neox"]


@pytest.mark.parametrize(("method", "name"), cover(itertools.product(ON_OPS, UNKNOWN)))
def test_families_outside_of_the_table_take_a_second_adapter_and_a_choice_of_blocks(method, name):
    """Default targets are found below the adapters that are there."""
    base = unknown(name)
    model = get_peft_model(base, config(method))
    model.add_adapter("second", config(method))
    model.add_adapter("first_block", config(method, layers_to_transform=[0]))
    model.add_adapter("third", config(method))
    adapted = {path: {*m.configs} for path, m in model.named_modules() if isinstance(m, AdapterLayer)}
    chosen = {path for path, names in adapted.items() if "first_block" in names}
    assert all({"default", "second", "third"} <= names for names in adapted.values())
    assert chosen == {
        path for path in adapted if module_roles.layer_index(base, path.split("base_model.model.")[1]) == 0
    }
    assert 0 < len(chosen) < len(adapted)
    alone = get_peft_model(unknown(name), config(method, layers_to_transform=[0]))
    assert {path for path, m in alone.named_modules() if isinstance(m, AdapterLayer)} == chosen
