"""Capabilities are checked against the layer's code, and shared parameters are stored once."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
from support.backbones import TINY
from support.properties import adapt, adapter_parameters

from peft_lab.errors import ConfigError
from peft_lab.tuners import AdapterConfig, FeatureLayer, MethodInfo, WeightLayer, register
from peft_lab.tuners.registration import warn_of_old_peft


@pytest.mark.parametrize(("installed", "warned"), [("0.21.2", True), ("0.22.0", False), ("0.22.1.dev0", False)])
def test_a_peft_older_than_transformers_asks_for_is_one_line(
    installed: str, warned: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.22.0")
    monkeypatch.setattr("peft.__version__", installed)
    with caplog.at_level("WARNING", logger="peft_lab"):
        warn_of_old_peft()
    lines = [line.getMessage() for line in caplog.records if line.name == "peft_lab"]
    assert len(lines) == warned
    for line in lines:
        assert "asks for peft 0.22.0" in line
        assert "\n" not in line


@pytest.mark.parametrize(
    ("layer", "capability", "missing"),
    [
        (WeightLayer, "merge", "delta_weight"),
        (WeightLayer, "mixed_batch", "delta_weight"),
        (FeatureLayer, "mixed_batch", "transform"),
        (FeatureLayer, "merge", "folded"),
    ],
)
def test_a_capability_without_its_code_is_refused(layer: type, capability: str, missing: str) -> None:
    @dataclass
    class HollowConfig(AdapterConfig):
        """A config of a method without code."""

    class HollowLayer(layer):
        adapter_layer_names = ("hollow_value",)

    info = MethodInfo("hollow", "Hollow", "", "weight", "HollowConfig", capabilities=("linear", capability))
    with pytest.raises(ConfigError, match=f"declares the capability {capability}, but HollowLayer has no {missing}"):
        register(info, HollowConfig, HollowLayer)


@pytest.mark.parametrize(
    ("method", "fields", "shared", "own"),
    [
        ("vpt", {"projection": 4}, "vpt_projection_weight", "vpt_prompts"),
        ("soft_prompt", {"deep": True, "prefix_projection": True}, "soft_prompt_in_weight", "soft_prompt_out_weight"),
        ("iapt", {"share": "both"}, "iapt_down", "iapt_queries"),
    ],
)
def test_shared_parameters_are_stored_once_and_found_from_every_block(
    method: str, fields: dict, shared: str, own: str
) -> None:
    model = adapt(method, TINY["bert"](), **fields)
    names = list(adapter_parameters(model))
    assert sum(f".{shared}." in name for name in names) == 1
    assert sum(f".{own}." in name for name in names) == 2
    layers = [m for m in model.modules() if type(m).__name__.endswith("Layer") and hasattr(m, "owners")]
    found = {id(layer.parameter("default", shared)) for layer in layers}
    assert len(found) == 1
    assert all(layer.parameter("default", own) is not None for layer in layers)


def test_a_second_adapter_and_a_deleted_one_share_nothing_with_others() -> None:
    model = adapt("vpt", TINY["bert"](), projection=4)
    model.add_adapter("other", model.peft_config["default"])
    layer = [m for m in model.modules() if type(m).__name__ == "VPTLayer"][-1]
    first, second = (layer.parameter(name, "vpt_projection_weight") for name in ("default", "other"))
    assert first is not second
    model.delete_adapter("default")
    assert {key[0] for key in layer.owners} == {"other"}
    assert layer.parameter("other", "vpt_projection_weight") is second


def test_copies_share_among_themselves() -> None:
    model = copy.deepcopy(adapt("vpt", TINY["bert"](), projection=4))
    layers = [m for m in model.modules() if type(m).__name__ == "VPTLayer"]
    assert layers[0].owners is layers[1].owners
    (weight,) = (p for n, p in adapter_parameters(model).items() if "projection_weight" in n)
    assert layers[1].parameter("default", "vpt_projection_weight") is weight
