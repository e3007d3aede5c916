"""Which adapters are active and trained, through disabling, deletion, and every public call of peft's classes."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from support.backbones import TINY, tiny_inputs
from support.cover import cover, each_place
from support.properties import (
    EVERY_OWN,
    TEXTS,
    UNTRAINED,
    adapt,
    adapter_parameters,
    config,
    move,
    needs_add_adapter,
    output,
    text_or_image,
)
from torch import nn

from peft_lab import registry
from peft_lab.errors import ConfigError
from peft_lab.tuners import AdapterLayer

own = pytest.mark.parametrize("method", EVERY_OWN)


def _trained(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def _context(model):
    with model.disable_adapter(), model.disable_adapter():
        yield


def _calls(model):
    model.base_model.disable_adapter_layers()
    yield
    model.base_model.enable_adapter_layers()


@pytest.mark.parametrize(("method", "disabled"), cover(itertools.product(EVERY_OWN, (_context, _calls))))
def test_disabling_brings_back_what_was_trained(method, disabled, tmp_path):
    base = TINY[text_or_image(method)]()
    model = adapt(method, base)
    model.save_pretrained(tmp_path)
    frozen = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    by_hand = copy.deepcopy(model)
    for parameter in [*adapter_parameters(by_hand).values()][:1]:
        parameter.requires_grad_(False)
    several = copy.deepcopy(model)
    several.add_adapter("second", config(method))
    several.set_adapter("second")
    for case in (model, frozen, by_hand, several):
        before = _trained(case)
        for _ in disabled(case):
            assert not any(_trained(case).values())
        assert _trained(case) == before
        case.base_model.enable_adapter_layers()
        assert _trained(case) == before
    # What is set meanwhile counts afterwards, and an adapter that is added meanwhile does not act.
    plain = output(copy.deepcopy(base).requires_grad_(False), tiny_inputs(base))
    for _ in disabled(model):
        model.add_adapter("second", config(method))
        move(model, "second")
        model.set_adapter("second")
        assert torch.equal(output(model, tiny_inputs(base)), plain)
    assert _trained(model) == _trained(several)


@needs_add_adapter
@own
def test_transformers_disabling_brings_back_what_was_trained(method):
    base = TINY[text_or_image(method)]()
    base.add_adapter(config(method))
    parameters = adapter_parameters(base)
    for parameter in [*parameters.values()][:1]:
        parameter.requires_grad_(False)
    before = [parameter.requires_grad for parameter in parameters.values()]
    base.disable_adapters()
    assert not any(parameter.requires_grad for parameter in parameters.values())
    base.enable_adapters()
    assert [parameter.requires_grad for parameter in parameters.values()] == before


@own
def test_deleting_the_active_adapter_gives_way_to_the_next_one_whole(method, tmp_path):
    base = TINY[text_or_image(method)]()
    model = adapt(method, base)
    model.save_pretrained(tmp_path)
    before, first = _trained(model), output(model, tiny_inputs(base))
    # "other" saves no head, and so the heads do not know it.
    model.add_adapter("other", config(method, modules_to_save=[]))
    model.delete_adapter("other")
    assert _trained(model) == before
    model.add_adapter("other", config(method, modules_to_save=[]))
    move(model, "other")
    model.set_adapter("other")
    model.delete_adapter("other")
    assert model.active_adapters == ["default"]
    assert model.get_model_status().active_adapters == ["default"]
    assert _trained(model) == before
    assert torch.equal(output(model, tiny_inputs(base)), first)
    # One that was loaded frozen stays so.
    model.load_adapter(tmp_path, "a_frozen")
    model.delete_adapter("default")
    assert model.active_adapters == ["a_frozen"]
    assert not any(_trained(model).values())
    # The last one goes, and another one takes its place.
    model.delete_adapter("a_frozen")
    assert model.active_adapters == []
    model.add_adapter("new", config(method))
    model.set_adapter("new")
    assert sum(_trained(model).values()) == sum(before.values())


@needs_add_adapter
@pytest.mark.parametrize("method", [method for method in EVERY_OWN if method not in UNTRAINED])
def test_the_next_adapter_has_its_head_in_transformers_too(method):
    base = TINY[text_or_image(method)]()
    base.add_adapter(config(method), adapter_name="default")
    before, first = _trained(base), output(base, tiny_inputs(base))
    base.add_adapter(config(method, modules_to_save=[]), adapter_name="other")
    move(base, "other")
    base.delete_adapter("other")
    assert _trained(base) == before
    assert torch.equal(output(base, tiny_inputs(base)), first)


def test_adapters_of_different_modules_give_way_to_one_for_all():
    fields = {"layers_to_transform": [0]}, {"layers_to_transform": [1]}
    for method in EVERY_OWN:
        if method in TEXTS or not {"linear", "norm"} & {*registry.method(method).capabilities}:
            continue
        model = adapt(method, TINY["bert"](), **fields[0])
        model.add_adapter("a_other", config(method, **fields[1]))
        model.add_adapter("both", config(method))
        model.set_adapter("both")
        model.delete_adapter("both")
        active = [m.active_adapters for m in model.modules() if isinstance(m, AdapterLayer)]
        assert active == [["a_other"]] * len(active)


@own
def test_a_name_of_no_adapter_is_an_error(method):
    model = adapt(method, TINY[text_or_image(method)]())
    for call in (model.set_requires_grad, model.base_model.set_adapter, model.base_model.set_requires_grad):
        with pytest.raises(ConfigError, match=r'There is no adapter "defult"\. Did you mean "default"'):
            call("defult")


# Every public call of peft's classes --------------------------------------------------------------------------------


def _raises(call, sentence: str) -> bool:
    with pytest.raises((AttributeError, NotImplementedError, ValueError), match=sentence) as caught:
        call()
    return "\n" not in str(caught.value)


def _merges(model, call) -> bool:
    method = model.base_model.info
    if method.can("merge"):
        return call() is not False
    return _raises(call, f'Method "{method.name}" cannot be merged')


def _base_weight(layer) -> bool:
    # A block has no weight of its own.
    if not hasattr(layer.get_base_layer(), "weight"):
        return _raises(layer.get_base_weight, "no attribute 'weight'")
    layer.set_base_weight(layer.get_base_weight().clone())
    return torch.equal(layer.get_base_weight(), layer.weight)


#: Call -> test of it on a model with the adapters "default" and "second", its inputs and a folder with "default".
ON_MODEL = {
    "active_adapters": lambda m, x, d: m.active_adapters == ["default"],
    "active_peft_config": lambda m, x, d: m.active_peft_config is m.peft_config["default"],
    "add_adapter": lambda m, x, d: m.add_adapter("third", copy.deepcopy(m.peft_config["second"])) is None,
    "base_model_torch_dtype": lambda m, x, d: m.base_model_torch_dtype is torch.float32,
    "create_or_update_model_card": lambda m, x, d: m.create_or_update_model_card(d) is None,
    "delete_adapter": lambda m, x, d: m.delete_adapter("third") is None and "third" not in m.peft_config,
    "disable_adapter": lambda m, x, d: m.disable_adapter().__enter__() is None,
    "from_pretrained": lambda m, x, d: isinstance(PeftModel.from_pretrained(copy.deepcopy(m.unload()), d), PeftModel),
    "generate": lambda m, x, d: callable(m.generate),  # test_mixed_batch, test_sequence_generation
    "get_base_model": lambda m, x, d: m.get_base_model() is m.base_model.model,
    "get_layer_status": lambda m, x, d: len(m.get_layer_status()) > 0,
    "get_model_status": lambda m, x, d: m.get_model_status().available_adapters == ["default", "second"],
    "get_nb_trainable_parameters": lambda m, x, d: (
        (m.get_nb_trainable_parameters()[0] > 0) == bool(adapter_parameters(m))
    ),
    "get_prompt": lambda m, x, d: _raises(lambda: m.get_prompt(2), "is no prompt learning of peft"),
    "get_prompt_embedding_to_save": lambda m, x, d: _raises(
        lambda: m.get_prompt_embedding_to_save("default"), "is no prompt learning of peft"
    ),
    "has_active_enabled_adapter": lambda m, x, d: m.has_active_enabled_adapter,
    "load_adapter": lambda m, x, d: m.load_adapter(d, "third").missing_keys == [],
    "modules_to_save": lambda m, x, d: m.modules_to_save is None or len(m.modules_to_save) > 0,
    "peft_config": lambda m, x, d: list(m.peft_config) == ["default", "second"],
    "prepare_model_for_gradient_checkpointing": lambda m, x, d: (
        m.prepare_model_for_gradient_checkpointing(m.get_base_model()) is not False
    ),
    "print_trainable_parameters": lambda m, x, d: m.print_trainable_parameters() is None,
    "push_to_hub": lambda m, x, d: callable(m.push_to_hub),  # tests/unit/hub
    "save_pretrained": lambda m, x, d: m.save_pretrained(d, selected_adapters=["default"]) is None,
    "set_adapter": lambda m, x, d: m.set_adapter("second") is None and m.active_adapters == ["second"],
    "set_requires_grad": lambda m, x, d: m.set_requires_grad("default", False) is None,
    "supports_lora_conversion": lambda m, x, d: m.supports_lora_conversion() in (True, False),
}
ON_TUNER = {
    "active_adapters": ON_MODEL["active_adapters"],
    "add_weighted_adapter": lambda m, x, d: (
        m.add_weighted_adapter(["default", "second"], [0.5, 0.5], "third") is None
        if m.base_model.tuner_layer_cls.linear
        else _raises(lambda: m.add_weighted_adapter(["default"], [1.0], "third"), "has no weighted sum of adapters")
    ),
    "delete_adapter": lambda m, x, d: m.base_model.delete_adapter("second") is None,
    "disable_adapter_layers": lambda m, x, d: m.base_model.disable_adapter_layers() is None,
    "enable_adapter_layers": lambda m, x, d: m.base_model.enable_adapter_layers() is None,
    "get_model_config": lambda m, x, d: "model_type" in m.base_model.get_model_config(m.get_base_model()),
    "inject_adapter": lambda m, x, d: (
        m.peft_config.setdefault("third", copy.deepcopy(m.peft_config["second"]))
        and m.base_model.inject_adapter(m.get_base_model(), "third") is None
    ),
    "merge_adapter": lambda m, x, d: _merges(m, m.base_model.merge_adapter),
    "merge_and_unload": lambda m, x, d: _merges(m, m.base_model.merge_and_unload),
    "set_adapter": lambda m, x, d: m.base_model.set_adapter("second") is None,
    "set_requires_grad": lambda m, x, d: m.base_model.set_requires_grad("default", False) is None,
    "supports_lora_conversion": ON_MODEL["supports_lora_conversion"],
    "unload": lambda m, x, d: not any(isinstance(part, AdapterLayer) for part in m.base_model.unload().modules()),
    "unmerge_adapter": lambda m, x, d: m.base_model.unmerge_adapter() is None,
    "uses_shared_state": lambda m, x, d: not m.base_model.uses_shared_state,
}


def _layer(model) -> AdapterLayer:
    return next(module for module in model.modules() if isinstance(module, AdapterLayer))


ON_LAYER = {
    "active_adapter": lambda m, x, d: _layer(m).active_adapter == ["default"],
    "active_adapters": lambda m, x, d: _layer(m).active_adapters == ["default"],
    "adapter_layer_names": lambda m, x, d: len(_layer(m).adapter_layer_names + _layer(m).other_param_names) > 0,
    "bias": lambda m, x, d: getattr(_layer(m), "bias", None) is getattr(_layer(m).base_layer, "bias", None),
    "delete_adapter": lambda m, x, d: _layer(m).delete_adapter("second") is None,
    "disable_adapters": lambda m, x, d: _layer(m).disable_adapters is False,
    "enable_adapters": lambda m, x, d: _layer(m).enable_adapters(False) is None and _layer(m).disable_adapters,
    "frozen_peft_weight_names": lambda m, x, d: {*_layer(m).frozen_peft_weight_names} <= {*m.peft_config},
    "get_base_layer": lambda m, x, d: not isinstance(_layer(m).get_base_layer(), AdapterLayer),
    "get_base_weight": lambda m, x, d: _base_weight(_layer(m)),
    "merge": lambda m, x, d: _merges(m, _layer(m).merge),
    "merged": lambda m, x, d: _layer(m).merged is False,
    "merged_adapters": lambda m, x, d: list(_layer(m).merged_adapters) == [],
    "other_param_names": lambda m, x, d: isinstance(_layer(m).other_param_names, tuple),
    "quantization_backend": lambda m, x, d: _layer(m).quantization_backend is None,
    "set_adapter": lambda m, x, d: _layer(m).set_adapter("second") is None,
    "set_base_weight": lambda m, x, d: _base_weight(_layer(m)),
    "set_requires_grad": lambda m, x, d: _layer(m).set_requires_grad("default", False) is None,
    "supports_lora_conversion": lambda m, x, d: _layer(m).supports_lora_conversion() in (True, False),
    "unmerge": lambda m, x, d: _layer(m).unmerge() is None,
    "weight": ON_MODEL["get_base_model"],
}
CALLS = {PeftModel: ON_MODEL, BaseTuner: ON_TUNER, BaseTunerLayer: ON_LAYER}


@pytest.mark.parametrize("peft_class", CALLS)
def test_every_public_call_of_peft_is_known(peft_class):
    """A call of a newer peft fails here until it is tried on our methods."""
    found = {name for name in dir(peft_class) if not name.startswith("_")} - {*dir(nn.Module)}
    if peft_class is BaseTuner:
        # What LoRA's tuner offers beyond is what users look for next; these belong to LoRA alone.
        found |= {name for name in vars(LoraModel) if not name.startswith("_")} - _OF_LORA
    assert found - {*CALLS[peft_class]} == set()


#: Public names of peft's LoRA tuner that have no meaning for another method.
_OF_LORA = {"prefix", "tuner_layer_cls", "target_module_mapping", "subtract_mutated_init", "add_weighted_adapter"}


@pytest.mark.parametrize("method", cover(EVERY_OWN, each_place))
def test_every_public_call_of_peft_works_or_is_refused(method, tmp_path):
    base = TINY[text_or_image(method)]()
    inputs = tiny_inputs(base)
    start = adapt(method, base)
    start.save_pretrained(tmp_path)
    start.add_adapter("second", config(method))
    for peft_class, calls in CALLS.items():
        for name, works in calls.items():
            model = copy.deepcopy(start)
            if name == "delete_adapter" and peft_class is PeftModel:
                model.add_adapter("third", config(method))
            assert works(model, inputs, tmp_path), f"{peft_class.__name__}.{name}"
