"""Verdict on peft's own tests, and the cases that are made of LoRA's."""

from __future__ import annotations

from peft import LoHaConfig, LoraConfig
from peft_suite.cases import cases_of
from peft_suite.verdict import Expected, Outcome, judge, read_expected, summary

from peft_lab import registry
from peft_lab.tuners.registration import config_class

_NODE = "tests/test_x.py::TestX::{}[{}:0-model]"


def _outcomes(**states):
    return {
        _NODE.format(test, method): Outcome(method, state, "" if state == "passed" else "Boom: no such thing")
        for test, by_method in states.items()
        for method, state in by_method.items()
    }


def test_each_outcome_has_its_place():
    outcomes = _outcomes(
        good={"lora": "passed", "ssf": "passed"},
        offline={"lora": "failed", "ssf": "failed"},
        refused={"lora": "passed", "ssf": "failed", "vpt": "failed"},
        listed={"lora": "passed", "ssf": "passed"},
        rounding={"lora": "passed", "ssf": "passed"},
        other_error={"lora": "passed", "ssf": "failed"},
        left_out={"lora": "passed", "ssf": "skipped"},
    )
    expected = [
        Expected(tests=["x::refused[ssf:0*"], error="no such", reason="r"),
        Expected(tests=["*::listed*"], error="", reason="r"),
        Expected(tests=["*::rounding*"], error="", reason="r", may_pass=True),
        Expected(tests=["*::other_error*"], error="something else", reason="r"),
        Expected(tests=["*"], error="", reason="r", places=["weight"]),
        Expected(tests=["*"], error="", reason="r", lacks="merge", methods=["ssf"]),
        Expected(tests=["*::good*"], error="", reason="r", but=["*model]"]),
    ]
    verdict = judge(outcomes, expected)
    found = {}
    for name in ("passed", "refused", "environment", "skipped", "failed", "unexpected_passes"):
        found[name] = [case.partition("[")[0] for case, _, _ in getattr(verdict, name)]
    assert found == {
        "passed": ["x::good", "x::rounding"],
        "refused": ["x::refused"],
        "environment": ["x::offline"],
        "skipped": ["x::left_out"],
        "failed": ["x::refused", "x::other_error"],
        "unexpected_passes": ["x::listed"],
    }
    assert verdict.wrong
    assert verdict.control == {"passed": 6, "failed": 1}
    good = judge({node: outcome for node, outcome in outcomes.items() if "good" in node}, expected)
    assert not good.wrong
    assert summary(good)["methods"] == {"ssf": {"passed": 1}}


def test_cases_are_those_of_lora_that_the_method_has_fields_for(request):
    request.config.addinivalue_line("markers", "random_start: of the plugin")
    rows = [
        ("A LoRA", "MLP", LoraConfig, {"target_modules": ["lin0"], "r": 4, "init_lora_weights": False}),
        ("B LoRA", "MLP", LoraConfig, {"target_modules": ["lin0"], "use_dora": True}),
        ("C LoHa", "MLP", LoHaConfig, {"target_modules": ["lin0"]}),
        ("D LoRA", "MLP", LoraConfig, {"target_modules": ["lin1"], "modules_to_save": ["lin0"]}),
    ]
    found = {case.id: case for case in cases_of(rows, ["lora", "svfit"], 4)}
    assert {*found} == {"lora:A_LoRA", "lora:D_LoRA", "svfit:A_LoRA", "svfit:D_LoRA"}
    assert found["lora:A_LoRA"].values == rows[0]
    name, model, cls, fields = found["svfit:A_LoRA"].values
    assert (name, model, cls, fields) == ("A LoRA", "MLP", config_class("svfit"), {"target_modules": ["lin0"]})
    assert [mark.name for mark in found["svfit:A_LoRA"].marks] == ["random_start"]
    assert not found["svfit:D_LoRA"].marks
    instance = cases_of([LoraConfig(target_modules=["lin0"], r=16)], ["lora", "svfit"], 1)[1].values[0]
    assert isinstance(instance, config_class("svfit"))
    assert instance.target_modules == ["lin0"]
    assert cases_of([(LoHaConfig, {})], ["lora", "svfit"], 2) == []


def test_entries_name_methods_and_places_that_there_are():
    for entry in read_expected():
        assert {*entry.methods} <= {*registry.list_methods()}
        assert {*entry.places} <= {*registry.PLACES}
        assert entry.reason
