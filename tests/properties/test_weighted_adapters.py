"""Weighted sums of adapters: exact in the change of every module, or refused in one sentence."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from support.backbones import TINY, tiny_inputs
from support.cover import cover
from support.operations import OPS, make
from support.properties import (
    EVERY_OWN,
    ON_OPS,
    adapt,
    assert_close,
    config,
    equal_weights,
    move,
    output,
    text_or_image,
)
from torch import nn

from peft_lab import registry
from peft_lab.errors import ConfigError
from peft_lab.tuners import AdapterLayer
from peft_lab.tuners.registration import config_class

WEIGHTS = [0.75, -1.5, 2.0]
NAMES = ["default", "second", "third"]


#: Methods whose changes add up; importing a config registers its tuner with peft.
LINEAR = [m for m in ON_OPS if config_class(m) and PEFT_TYPE_TO_TUNER_MAPPING[m.upper()].tuner_layer_cls.linear]
CASES = [(m, op) for m in LINEAR for op, (kind, *_) in OPS.items() if registry.method(m).can(kind)]


def _three(method: str, base: nn.Module, **fields: Any) -> Any:
    model = adapt(method, base, **fields)
    for name in NAMES[1:]:
        model.add_adapter(name, config(method, **fields))
    for seed, name in enumerate(NAMES):
        move(model, name, seed=seed)
    return model


@pytest.mark.parametrize(("method", "op"), cover(CASES))
@torch.no_grad()
def test_the_change_of_an_op_is_the_weighted_sum(method, op):
    base, x = make(op)
    model = _three(method, base, target_modules=["op"])
    plain, total = base(x), torch.zeros(())
    for name, weight in zip(NAMES, WEIGHTS, strict=True):
        model.set_adapter(name)
        total = total + weight * (model(x) - plain)
    model.add_weighted_adapter(NAMES, WEIGHTS, "both")
    assert model.active_adapters == ["third"]
    model.set_adapter("both")
    assert_close(model(x), plain + total, 2e-5)
    # The sum of one adapter alone is that adapter.
    model.add_weighted_adapter(["second"], [1.0], "same", combination_type="linear")
    model.set_adapter("same")
    same = model(x)
    model.set_adapter("second")
    assert_close(same, model(x), 1e-6)


@pytest.mark.parametrize("method", LINEAR)
@torch.no_grad()
def test_a_sum_has_its_head_and_is_saved_like_any_adapter(method, tmp_path):
    base = TINY["bert"]()
    model = _three(method, base)
    head = model.get_base_model().classifier
    for name in NAMES:
        nn.init.normal_(head.modules_to_save[name].weight)
    model.add_weighted_adapter(NAMES, WEIGHTS, "both")
    start = head.original_module.weight
    wanted = start + sum(w * (head.modules_to_save[n].weight - start) for n, w in zip(NAMES, WEIGHTS, strict=True))
    assert_close(head.modules_to_save["both"].weight, wanted)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".both" in n)
    model.set_adapter("both")
    expected = output(model, tiny_inputs(base))
    model.save_pretrained(tmp_path)
    assert torch.equal(output(PeftModel.from_pretrained(base, tmp_path / "both"), tiny_inputs(base)), expected)


@pytest.mark.parametrize("method", EVERY_OWN)
def test_what_is_no_exact_sum_is_refused_and_changes_nothing(method):
    base = TINY[text_or_image(method)]()
    model = adapt(method, base)
    linear = model.base_model.tuner_layer_cls.linear
    model.add_adapter("second", config(method))
    before, names = copy.deepcopy(model), ["default", "second"]
    wrong: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((names, [0.5, 0.5], "both"), {"combination_type": "svd"}, "svd"),
        ((names, [0.5, 0.5], "both"), {"density": 0.5}, "density"),
        ((names, [0.5, 0.5], "both"), {"densty": 0.5}, "density"),
        ((names, [0.5], "both"), {}, "2 adapters and 1 weights"),
        (([], [], "both"), {}, "0 adapters"),
        ((["default", "nobody"], [1.0, 1.0], "both"), {}, "nobody"),
        ((names, [0.5, float("nan")], "both"), {}, "finite"),
        ((names, [0.5, 0.5], "second"), {}, "already exists"),
        ((names, [0.5, 0.5], "a.b"), {}, "cannot be used"),
    ]
    for args, options, words in wrong:
        with pytest.raises(ConfigError, match=words if linear else f'Method "{method}" has no weighted sum'):
            model.add_weighted_adapter(*args, **options)
        assert equal_weights(model, before)
        assert list(model.peft_config) == names


@pytest.mark.parametrize("method", LINEAR)
def test_adapters_that_differ_in_more_than_values_are_refused(method):
    fields = config_class(method).__dataclass_fields__.values()
    changes = [{"layers_to_transform": [0]}]
    for f in fields:
        if "other" in f.metadata and not f.name.startswith("init"):
            changes.append({f.name: f.metadata["other"], **f.metadata.get("with", {})})
    for change in changes:
        model = adapt(method, TINY["bert"]())
        model.add_adapter("second", config(method, **change))
        for names in (["default", "second"], ["second", "default"]):
            with pytest.raises(ConfigError, match=r"differ in|does not adapt"):
                model.add_weighted_adapter(names, [0.5, 0.5], "both")


def test_a_head_that_is_not_linear_in_its_parameters_has_no_sum():
    base = TINY["roberta"]()
    method = LINEAR[0]
    model = adapt(method, base, modules_to_save=["classifier"])
    model.add_adapter("second", config(method, modules_to_save=["classifier"]))
    with pytest.raises(ConfigError, match=r'"classifier".*RobertaClassificationHead.*no weighted sum'):
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both")


def test_a_layer_that_is_declared_linear_names_what_changes_nothing():
    class Layer(AdapterLayer):
        adapter_layer_names = ("x_value",)
        linear = True

    from peft_lab.tuners.registration import _check_capabilities

    method = next(name for name in LINEAR if not config_class(name).exports_lora)
    Layer.config_cls = config_class(method)
    info = registry.method(method)
    with pytest.raises(ConfigError, match=r"declared linear.*x_value"):
        _check_capabilities(type(info)(**{**vars(info), "capabilities": ()}), Layer)
