"""A merged model answers as the unmerged one, also once it is saved and loaded, or merging it changes nothing."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from peft import PeftModel, get_peft_model
from support.backbones import MODELS, TINY, Custom, tiny_inputs
from support.cover import MAIN, cover
from support.operations import make
from support.properties import (
    CONVOLUTIONAL,
    NO_CONVOLUTION,
    OWN,
    adapt,
    adapter_parameters,
    assert_close,
    config,
    equal_weights,
    fill,
    move,
    output,
)
from torch import nn

from peft_lab import registry
from peft_lab.errors import ConfigError
from peft_lab.export.to_lora import convert
from peft_lab.tuners.layer import AdapterLayer
from peft_lab.tuners.registration import has_trait

MERGED = [name for name in OWN if registry.method(name).can("merge")]
ADDITIVE = [name for name in MERGED if registry.method(name).place == "weight"]
IN_ORDER = [name for name in MERGED if name not in ADDITIVE]
AUTO = [
    hf.AutoModel,
    hf.AutoModelForCausalLM,
    hf.AutoModelForSeq2SeqLM,
    hf.AutoModelForSequenceClassification,
    hf.AutoModelForImageClassification,
    hf.AutoModelForSpeechSeq2Seq,
]


def full(*values: str) -> list[Any]:
    return [pytest.param(value, marks=pytest.mark.full) for value in values]


def layers(model: nn.Module) -> list[AdapterLayer]:
    return [module for module in model.modules() if isinstance(module, AdapterLayer)]


def second(model: Any, method: str) -> None:
    """Another adapter, with values of its own, that leaves the head to the first; both are active."""
    model.add_adapter("second", config(method, modules_to_save=[]))
    move(fill(model), "second", scale=0.1, seed=2)
    model.base_model.set_adapter(["default", "second"])


def merge_adapter_and_unload(model: Any) -> Any:
    model.merge_adapter()
    return model.unload()


def merge_one_after_the_other(model: Any) -> Any:
    """Between the two merges one adapter acts merged and one does not."""
    before = output(model, tiny_inputs(model.get_base_model()))
    model.merge_adapter(["default"])
    assert_close(output(model, tiny_inputs(model.get_base_model())), before, 1e-4)
    model.merge_adapter(["second"])
    return model.unload()


def merge_by_name(model: Any) -> Any:
    """The active adapter is another one than that which is merged."""
    model.base_model.set_adapter("second")
    try:
        return model.merge_and_unload(adapter_names=["default", "second"])
    finally:
        assert model.base_model.active_adapter == "second" or not layers(model)
        if layers(model):
            model.base_model.set_adapter(["default", "second"])


def merge_again(model: Any) -> Any:
    model.merge_adapter()
    model.unmerge_adapter()
    model.merge_adapter()
    return model.merge_and_unload()


#: Ways to merge: the merged model, and what comes before the unmerged one is asked.
WAYS: dict[str, tuple[Callable[[Any], Any], Callable[[Any, str], Any]]] = {
    "merge_and_unload": (lambda model: model.merge_and_unload(), lambda model, method: None),
    "safe_merge": (lambda model: model.merge_and_unload(safe_merge=True), lambda model, method: None),
    "merge_adapter": (merge_adapter_and_unload, lambda model, method: None),
    "again": (merge_again, lambda model, method: None),
    "in_bfloat16": (lambda model: model.merge_and_unload(), lambda model, method: model.to(torch.bfloat16)),
    "several": (lambda model: model.merge_and_unload(), second),
    "one_of_several": (merge_one_after_the_other, second),
    "by_name": (merge_by_name, second),
    "in_inference_mode": (torch.inference_mode()(merge_adapter_and_unload), lambda model, method: None),
}


def _cases() -> list[Any]:
    """Each way on each main architecture, and each family in two ways; daily each way once and each main family."""
    found = list(itertools.product(MERGED, WAYS, [*MAIN, "roberta"]))
    families = [family for family in MODELS if family != "vit_mae"]  # it masks patches at random
    for number, (family, method) in enumerate(itertools.product(families, MERGED)):
        found += [(method, [*WAYS][(number + step) % len(WAYS)], family) for step in (0, 5)]
    fits = [case for case in found if not (case[0] in NO_CONVOLUTION and case[2] in CONVOLUTIONAL)]
    return cover([*dict.fromkeys(fits)], lambda case: {case[:2], *({case[2]} & {*MAIN, "roberta"})})


@pytest.mark.parametrize(("method", "way", "family"), _cases())
def test_the_merged_model_answers_as_the_unmerged_one(base, method, way, family, tmp_path):
    inputs = tiny_inputs(base)
    # peft then saves a text classifier's head whole, which in some families is a module of several layers.
    task = {"task_type": "SEQ_CLS"} if "SequenceClassification" in type(base).__name__ else {}
    merge, prepare = WAYS[way]
    model = move(adapt(method, base, **({} if prepare is second else task)), scale=0.1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save.default" in name:
                parameter.mul_(1.5)
    exact = output(model, inputs)
    prepare(model, method)
    inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    unmerged, tolerance = output(model, inputs), 1e-4
    if way == "in_bfloat16":
        # Merged and unmerged round apart from each other, in a deep net each by more than the usual tolerance.
        rounding = (unmerged - exact).abs().max() / exact.abs().max()
        tolerance = max(5e-2, 3 * rounding.item())
    try:
        merged = merge(model)
    except ConfigError as error:
        _check_refusal(error, base, model)
        assert torch.equal(output(model, inputs), unmerged)
        return
    assert not layers(merged)
    assert_close(output(merged, inputs), unmerged, tolerance)
    merged.save_pretrained(tmp_path)
    for cls in (type(merged), *(auto for auto in AUTO if _builds(auto, merged))):
        # transformers loads two biases of DeBERTa in float32 whatever the dtype, and such a model does not run
        again = cls.from_pretrained(tmp_path).to(merged.dtype)
        assert {*again.state_dict()} == {*merged.state_dict()}
        # Rotary angles are float32 again after a reload.
        assert_close(output(again, inputs), output(merged, inputs), 1e-2 if way == "in_bfloat16" else 1e-4)


def _check_refusal(error: ConfigError, base: Any, model: Any) -> None:
    """A refusal names a bias that the class has not, and leaves the model as it was."""
    assert "has no place for" in str(error)
    assert str(error).split('(the first is "')[1].split('"')[0] not in base.state_dict()
    assert not any(layer.merged for layer in layers(model))
    assert model.get_base_model().config.to_dict() == base.config.to_dict()


def _builds(auto: Any, model: Any) -> bool:
    found = auto._model_mapping.get(type(model.config), None) if auto._model_mapping else None
    return type(model) in (found if isinstance(found, tuple) else (found,))


def test_a_model_without_room_for_biases_is_refused_and_one_with_a_flag_gets_it():
    with pytest.raises(ConfigError, match=r"patch_embedding\.bias"):
        adapt("ssf", TINY["clip"]()).merge_and_unload()
    with pytest.raises(ConfigError, match="T5ForConditionalGeneration has no place"):
        adapt("ssf", TINY["t5"]()).merge_adapter()
    adapt("ssf", TINY["t5"](), shift=False).merge_and_unload()
    model = adapt("ssf", TINY["llama"]())
    assert not model.config.attention_bias
    merged = model.merge_and_unload()
    assert merged.config.attention_bias
    assert merged.config.mlp_bias


@pytest.mark.parametrize("method", MERGED)
def test_biases_of_a_model_inside_of_another_are_checked_too(method):
    whole = Custom(backbone=TINY["t5"](), classifier=nn.Linear(4, 2))
    model = get_peft_model(whole, config(method, target_modules=r"backbone\.encoder.*\.q"))
    if method in ADDITIVE:
        model.merge_and_unload()
        return
    with pytest.raises(ConfigError, match=r"first is \"encoder\.block\.0.*q\.bias"):
        model.merge_and_unload()


@pytest.mark.parametrize(("method", "door"), list(itertools.product(MERGED, ["merge_adapter", "merge_and_unload"])))
@pytest.mark.parametrize("safe", [True, False])
def test_what_overflows_in_the_dtype_of_the_base_is_refused(method, door, safe):
    base = TINY["bert"]().half()
    model = move(adapt(method, base))  # a factor of zero would not overflow
    last = [p for p in adapter_parameters(model).values() if "layer.1" in _path_of(model, p)]
    with torch.no_grad():
        last[0].fill_(1e8)
    before = copy.deepcopy(model)
    with pytest.raises(ConfigError, match="infinite numbers in the weights of a Linear in float16"):
        getattr(model, door)(safe_merge=safe)
    # Nothing is merged, the layers before the one that overflows included.
    assert equal_weights(model, before)


def _path_of(model: nn.Module, wanted: nn.Parameter) -> str:
    return next(name for name, parameter in model.named_parameters() if parameter is wanted)


@pytest.mark.parametrize("method", MERGED)
def test_adapters_that_cannot_be_merged_now_are_refused(method):
    model = move(adapt(method, TINY["bert"]()))
    second(model, method)
    before = copy.deepcopy(model)
    with pytest.raises(ConfigError, match='no adapter "third"'):
        model.merge_adapter(["default", "third"])
    model.base_model.set_adapter("second")
    with pytest.raises(ConfigError, match='"default" is not active'):
        model.merge_adapter(["default"])
    model.base_model.set_adapter(["default", "second"])
    if method in IN_ORDER:
        with pytest.raises(ConfigError, match='"second" can be merged only together'):
            model.merge_adapter(["second"])
    assert equal_weights(model, before)


@pytest.mark.parametrize("method", ADDITIVE)
def test_the_active_adapters_that_are_not_merged_go_on_acting(method):
    base = TINY["bert"]()
    model, inputs = move(adapt(method, base)), tiny_inputs(base)
    second(model, method)
    both = output(model, inputs)
    model.merge_adapter(["second"])
    assert_close(output(model, inputs), both)
    # A merge that does not go with the next active adapters is undone.
    for layer in layers(model):
        layer.set_adapter("default")
    assert not any(layer.merged for layer in layers(model))


@pytest.mark.parametrize("method", MERGED)
@torch.no_grad()
def test_a_state_dict_of_a_merged_model_is_not_merged_twice(method):
    base, x = make("linear")
    model = move(get_peft_model(copy.deepcopy(base), config(method, target_modules=["op"])).eval())
    fresh, unmerged = copy.deepcopy(model), model.state_dict()
    expected = model(x)
    model.merge_adapter()
    assert model.state_dict().keys() == unmerged.keys()
    with pytest.raises(ConfigError, match="default merged into its weights"):
        fresh.load_state_dict(model.state_dict())
    # Into a merged model go the weights of another that is merged, and those of one that is not.
    for state in (model.state_dict(), unmerged):
        other = copy.deepcopy(fresh)
        other.merge_adapter()
        other.load_state_dict(state)
        torch.testing.assert_close(other(x), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("method", [m for m in MERGED if registry.method(m).can("embedding")])
def test_an_adapter_saved_while_merged_is_the_same_adapter(method, tmp_path):
    base = TINY["llama"]()
    model, inputs = move(adapt(method, base, target_modules=["embed_tokens"])), tiny_inputs(base)
    expected = output(model, inputs)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    assert_close(output(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path), inputs), expected)


@pytest.mark.parametrize("method", [m for m in MERGED if registry.method(m).can("embedding")])
@pytest.mark.parametrize("family", ["gpt2", "t5", *full("bart", "whisper", "gemma2", "t5_classifier")])
def test_tied_weights_are_merged_as_they_act_or_refused(base, method, family, tmp_path):
    ties = {*base.all_tied_weights_keys, *base.all_tied_weights_keys.values()}
    inputs, refused = tiny_inputs(base), 0
    for number, path in enumerate(name.removesuffix(".weight") for name in sorted(ties)):
        model = move(adapt(method, base, target_modules=path.replace(".", r"\.")))
        expected = output(model, inputs)
        try:
            merged = model.merge_and_unload()
        except ConfigError as error:
            refused += "other modules have the weight" in str(error)
            continue
        merged.save_pretrained(tmp_path / str(number))
        assert_close(output(type(base).from_pretrained(tmp_path / str(number)), inputs), expected)
    assert refused == (1 if len(ties) > 2 else 0)


@pytest.mark.parametrize("method", MERGED)
def test_a_module_that_stands_at_two_places_is_not_merged(method):
    linear = nn.Linear(4, 4)
    model = get_peft_model(Custom(op=linear, other=nn.ModuleList([linear])), config(method, target_modules=["op"]))
    with pytest.raises(ConfigError, match="stands at another place"):
        model.merge_and_unload()


@pytest.mark.parametrize("method", MERGED)
@pytest.mark.parametrize("family", ["roberta", *full("electra", "camembert")])
def test_adapters_inside_of_a_head_that_is_saved_whole_are_merged_and_unloaded(base, method, family):
    """The first adapter acts inside of the head, which the second one saves whole."""
    inputs = tiny_inputs(base)
    for unload in (False, True):
        model = adapt(method, base, target_modules=["query", "dense"], modules_to_save=["out_proj"])
        model.add_adapter("second", config(method, target_modules=["query"], modules_to_save=["classifier"]))
        assert any(name.endswith("modules_to_save.second.dense.base_layer") for name, _ in model.named_modules())
        # All layers share one table of owners, those that peft has copied with the head included.
        assert len({id(layer.owners) for layer in layers(model)}) == 1
        model.set_adapter("second")
        plain, expected = output(base, inputs), output(move(fill(model), "second"), inputs)
        bare = model.unload() if unload else model.merge_and_unload()
        assert {*bare.state_dict()} == {*base.state_dict()}
        assert_close(output(bare, inputs), plain if unload else expected)


@pytest.mark.parametrize("method", [m for m in MERGED if has_trait(registry.method(m), "exports_lora")])
@pytest.mark.parametrize("op", ["linear", "conv1d"])
@torch.no_grad()
def test_a_conversion_of_a_merged_model_is_that_of_the_unmerged_one(method, op):
    base, _ = make(op)
    model = move(get_peft_model(copy.deepcopy(base), config(method, target_modules=["op"])).eval())
    before = convert(model)
    model.merge_adapter()
    after = convert(model)
    assert before.ranks == after.ranks
    for key, value in before.state.items():
        torch.testing.assert_close(after.state[key], value)
