"""Names of adapters at every door: an adapter of every method works whole under a name, or the name is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.backbones import TINY, tiny_inputs
from support.cover import cover, each_place
from support.properties import EVERY_OWN, adapt, adapter_parameters, config, equal_states, move, output, text_or_image
from torch import nn

import peft_lab
from peft_lab.errors import ConfigError
from peft_lab.tuners.registration import newer_peft_needed

#: Names that no model can have an adapter of, whatever its method.
IMPOSSIBLE = ["", " ", "two words", "v1.0", "a/b", "..", "a\\b", "tab\t", "x" * 300, "keys", "training", "__base__"]
#: Names that stand for something else in the models of these tests, or in the wrappers of peft and torch.
TAKEN = ["attention", "weight", "bias", "0", "base_layer", "modules_to_save", "base_model", "_orig_mod"]
#: Names that are good ones; the last lies in the names of many modules.
GOOD = ["v1_0", "en-de", "Große", "keys_2", "e"]
own = pytest.mark.parametrize("method", EVERY_OWN)


def _add(method, base, folder, name):
    base.add_adapter(name, config(method))


def _load_more(method, base, folder, name):
    base.load_adapter(folder, name)


def _checked(method, base, folder, name):
    return peft_lab.load_adapter(base, folder, name)


def _native_add(method, base, folder, name):
    base.add_adapter(config(method), adapter_name=name)


def _native_load(method, base, folder, name):
    base.load_adapter(folder, adapter_name=name)


#: Doors to a model without adapters; transformers reads an empty name as "default".
FIRST = {
    "get_peft_model": lambda method, base, folder, name: get_peft_model(base, config(method), adapter_name=name),
    "from_pretrained": lambda method, base, folder, name: PeftModel.from_pretrained(base, folder, adapter_name=name),
    "load_adapter of peft_lab": _checked,
}
if not newer_peft_needed():
    FIRST |= {"add_adapter of transformers": _native_add, "load_adapter of transformers": _native_load}
#: Doors to a `PeftModel`.
SECOND = {"add_adapter": _add, "load_adapter": _load_more, "load_adapter of peft_lab": _checked}


@pytest.mark.parametrize("method", cover(EVERY_OWN, each_place))
def test_a_name_that_cannot_be_is_refused_at_every_door(method, tmp_path):
    base = TINY[text_or_image(method)]()
    model = adapt(method, base)
    model.save_pretrained(tmp_path)
    prefix, layer = model.base_model.prefix, model.base_model.tuner_layer_cls
    before, state = [name for name, _ in base.named_modules()], model.state_dict()
    for name in (
        *IMPOSSIBLE,
        *TAKEN,
        prefix[:-1],
        prefix[0],
        [*layer.adapter_layer_names, *layer.other_param_names][0],
    ):
        for door, enter in SECOND.items():
            with pytest.raises(ConfigError, match=r"Adapter name .* cannot be used"):
                pytest.fail(f"{door} takes {name!r}: {enter(method, model, tmp_path, name)}")
            assert list(model.peft_config) == ["default"]
        for door, enter in FIRST.items():
            if name == "" and "transformers" in door:
                continue
            with pytest.raises(ConfigError, match=r"Adapter name .* cannot be used"):
                pytest.fail(f"{door} takes {name!r}: {enter(method, base, tmp_path, name)}")
            assert [n for n, _ in base.named_modules()] == before
            assert not getattr(base, "peft_config", {})
    assert equal_states(model.state_dict(), state)
    # A refusal leaves nothing behind that would stop a good name.
    (FIRST["get_peft_model"] if newer_peft_needed() else _native_add)(method, base, tmp_path, "good-name")


@pytest.mark.full
@pytest.mark.parametrize(("method", "name"), cover([(m, n) for m in EVERY_OWN for n in GOOD if n not in f"{m}_"]))
def test_a_good_name_works_for_the_whole_life_of_an_adapter(method, name, tmp_path):
    base = TINY[text_or_image(method)]()
    inputs = tiny_inputs(base)
    model = adapt(method, base)
    model.add_adapter(name, config(method))
    move(model, "default", seed=1), move(model, name, seed=2)
    first = output(model, inputs)
    model.set_adapter(name)
    second = output(model, inputs)
    model.save_pretrained(tmp_path)
    for where, expected in ((tmp_path, first), (tmp_path / name, second)):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), where, adapter_name=name)
        torch.testing.assert_close(output(loaded, inputs), expected)
        native = copy.deepcopy(base)
        native.load_adapter(where, adapter_name=name)
        torch.testing.assert_close(output(native, inputs), expected)
    model.load_adapter(tmp_path, "third")
    model.delete_adapter("default")
    model.set_adapter("third")
    torch.testing.assert_close(output(model, inputs), first)
    model.delete_adapter(name)
    assert not adapter_parameters(model, name)
    assert list(model.peft_config) == ["third"]


class _Alike(nn.Module):
    """A model with a linear layer, and another one under a name of choice."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.op = nn.Linear(4, 4)
        self.add_module(name, nn.Linear(4, 4))


@pytest.mark.parametrize("saved", [True, False])
@own
def test_a_base_with_names_of_the_method_is_refused(method, saved):
    """Also where the module of that name is one to save: peft would take it for the adapter's parameters."""
    named = f"my_{method}_head"
    fields = {"modules_to_save": [named]} if saved else {}
    if text_or_image(method) == "bert" and "block" not in peft_lab.list_methods()[method].roles:
        model: nn.Module = _Alike(named)
        fields["target_modules"] = ["op"]
    else:
        model = TINY[text_or_image(method)]()
        model.add_module(named, nn.Linear(4, 4))
    with pytest.raises(ConfigError, match=named):
        get_peft_model(model, config(method, **fields))
