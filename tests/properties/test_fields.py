"""Fields of every config: each has an effect, and targets are chosen as they say."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from peft import get_peft_model_state_dict
from support.backbones import TINY, tiny_inputs
from support.cover import MAIN, cover
from support.properties import (
    EVERY_OWN,
    HEADS,
    IMAGE_LOGITS,
    KEEPS_HEAD,
    METHODS,
    ON_STACKS,
    OWN,
    RESIDUAL,
    TEXTS,
    adapt,
    adapter_parameters,
    as_read,
    config,
    home,
    main_tensor,
    move,
    output,
    pairs,
)

from peft_lab import registry
from peft_lab.backbones import module_roles
from peft_lab.errors import ConfigError
from peft_lab.tuners.registration import config_class
from peft_lab.tuners.sequence import encoder_outputs
from peft_lab.tuners.sequence.tuner import stacks_of

own = pytest.mark.parametrize("method", EVERY_OWN)
CONFIGS = {m: config_class(m).__dataclass_fields__ for m in (*EVERY_OWN, *KEEPS_HEAD)}
FIELDS = [(m, f) for m, fields in CONFIGS.items() for f in fields.values() if "other" in f.metadata]


def test_every_own_field_names_a_value_to_try():
    """A knob without a value to try it with would escape the next test."""
    for method in CONFIGS:
        cls = config_class(method)
        inherited = set(cls.__mro__[1].__dataclass_fields__)
        own = {f.name: f for f in dataclasses.fields(cls) if f.name not in inherited}
        untried = {name for name, f in own.items() if "untried" in f.metadata}  # tested by themselves
        assert own.keys() - untried <= {f.name for m, f in FIELDS if m == method}


@pytest.mark.parametrize(("method", "field"), FIELDS, ids=lambda value: getattr(value, "name", value))
@torch.no_grad()
def test_every_field_has_an_effect(method, field, tmp_path):
    """On the trainable count, on output or loss of start or moved adapter, or on what the file holds."""
    base = TINY[field.metadata.get("family", home(method))]()
    seen = []
    for fields in ({}, {field.name: field.metadata["other"]}):
        model = adapt(method, base, **fields | (field.metadata.get("with", {}) if fields else {}))
        start = output(model, tiny_inputs(base))
        count = sum(p.numel() for p in adapter_parameters(model).values())
        moved = output(move(model), tiny_inputs(base))
        torch.manual_seed(2)
        # where dropout and terms of the loss show
        result = model.train()(**as_read(model, tiny_inputs(base, labels=True)))
        trained = main_tensor(result), torch.as_tensor(getattr(result, "loss", None) or 0.0)
        size = sum(v.numel() for v in get_peft_model_state_dict(model).values())
        seen.append((count, size, start.tolist(), moved.tolist(), *(value.tolist() for value in trained)))
    assert seen[0] != seen[1]


@pytest.mark.parametrize(
    ("method", "field"),
    cover([(m, f) for m, f in FIELDS if m in EVERY_OWN], lambda case: {case[0], case[1].name}),
    ids=lambda value: getattr(value, "name", value),
)
def test_a_field_of_a_second_adapter_acts_as_in_the_first(method, field):
    """What the adapter that came first does not need, such as a hook, is put in for the second one."""
    base = TINY[field.metadata.get("family", home(method))]()
    fields = {field.name: field.metadata["other"], **field.metadata.get("with", {})}
    alone = move(adapt(method, base, **fields))
    both = adapt(method, base)
    both.add_adapter("second", config(method, **fields))
    both.set_adapter("second")
    both.load_state_dict({_for("second", k): v for k, v in alone.state_dict().items()}, strict=False)
    torch.testing.assert_close(output(both, tiny_inputs(base)), output(alone, tiny_inputs(base)))


def _for(adapter: str, key: str) -> str:
    return ".".join(adapter if part == "default" else part for part in key.split("."))


@pairs(METHODS, TINY)
def test_declared_roles_are_the_ones_adapted(base, method, family):
    model = adapt(method, base)
    wanted = registry.method(method).roles
    if method in ON_STACKS:  # whole blocks of one stack
        assert wanted == ("block",)
        assert model.targeted_module_names in stacks_of(base).values()
    elif method in TEXTS:  # the norm whose output is that of the encoder
        targeted = model.targeted_module_names
        assert targeted == encoder_outputs(base)
        assert {module_roles.module_locations(base)[name]["role"] for name in targeted} <= {*wanted}
    else:
        targets, expected = model.peft_config["default"].target_modules, module_roles.target_modules(base, wanted)
        assert (sorted(targets) if isinstance(targets, set) else targets) == expected
    head = {n for h in module_roles.head_modules(base) for n, _ in base.named_modules() if n.startswith(h)}
    assert not head & set(model.targeted_module_names)


@pairs(OWN, ["vit", "llama", "t5"])
def test_layers_to_transform_chooses_blocks(base, method, family):
    if method in TEXTS:  # behind all blocks
        with pytest.raises(ConfigError, match="takes no layers_to_transform"):
            adapt(method, base, layers_to_transform=[1])
        return
    model = adapt(method, base, layers_to_transform=[1])
    with_parameters = {name.partition(f".{model.base_model.prefix}")[0] for name in adapter_parameters(model)}
    assert {module_roles.layer_index(base, name.removeprefix("base_model.model.")) for name in with_parameters} == {1}
    if method in ON_STACKS:
        with pytest.raises(ConfigError, match=r"layers_to_transform holds 2; .* blocks 0 to 1"):
            adapt(method, base, layers_to_transform=[1, 2])
        return
    targeted = model.targeted_module_names
    assert {module_roles.layer_index(base, name) for name in targeted} == {1}
    if method in RESIDUAL:  # the name of a block is its number
        return
    listed = adapt(method, base, layers_to_transform=1, target_modules=sorted({n.split(".")[-1] for n in targeted}))
    assert {module_roles.layer_index(base, name) for name in listed.targeted_module_names} == {1}


@pytest.mark.parametrize("method", [name for name in registry.list_methods() if registry.method(name).presets])
def test_a_preset_among_the_fields_names_the_call_that_makes_its_config(method):
    cls, presets = config_class(method), registry.method(method).presets
    with pytest.raises(ConfigError, match=rf"use {cls.__name__}\.from_preset\(NAME\)\. Presets: {', '.join(presets)}"):
        cls(preset=next(iter(presets)))


@pytest.mark.parametrize("method", [*EVERY_OWN, *KEEPS_HEAD])
def test_no_layers_at_all_are_refused(method):
    with pytest.raises(ConfigError, match=r"layers_to_transform=\[\] names no block"):
        config(method, layers_to_transform=[])


@own
def test_regex_and_layers_do_not_contradict_in_silence(method):
    refused = {
        **dict.fromkeys(ON_STACKS, "takes no target_modules"),
        **dict.fromkeys((*HEADS, *TEXTS), "takes no layers_to"),
    }
    with pytest.raises(ConfigError, match=refused.get(method, "regex")):
        adapt(method, TINY[home(method)](), layers_to_transform=[1], target_modules=r".*q_proj")


@pairs(OWN, MAIN)
def test_exclude_modules_leaves_out(base, method, family):
    full = adapt(method, base).targeted_module_names
    if method in ON_STACKS:  # a block left out would lose the slots on their way
        with pytest.raises(ConfigError, match=r"takes no exclude_modules.*layers_to_transform"):
            adapt(method, base, exclude_modules=[full[0]])
        return
    if len(full) == 1:
        with pytest.raises(ValueError, match="No modules were targeted"):
            adapt(method, base, exclude_modules=full)
        return
    model = adapt(method, base, exclude_modules=[full[0]])
    assert sorted(model.targeted_module_names) == sorted(set(full) - {full[0]})


@own
def test_modules_to_save_can_be_set_empty_or_otherwise(method, tmp_path):
    base = TINY[home(method)]()
    norm = "embeddings.LayerNorm" if home(method) == "bert" else "layernorm"
    assert adapt(method, base, modules_to_save=[]).peft_config["default"].modules_to_save == []
    heads = [] if method in (*IMAGE_LOGITS, *HEADS) else ["classifier"]
    model = adapt(method, base, modules_to_save=[*heads, norm])
    assert any(f"{norm}.modules_to_save" in n for n, p in model.named_parameters() if p.requires_grad)


PEFT = ["ia3", "ln_tuning", "vera", "oft", "loha", "hra"]


@pytest.mark.parametrize(("name", "family"), cover(itertools.product(PEFT, ["vit", "bert", "swin", "modernbert"])))
def test_tuners_of_peft_get_targets_and_the_head_by_role(base, name, family):
    """Families that peft has no default targets for included."""
    model = adapt(name, base)
    assert model.targeted_module_names
    assert set(model.peft_config["default"].modules_to_save) == set(module_roles.head_modules(base))
    assert torch.isfinite(output(model, tiny_inputs(base))).all()
