"""Regexes of an adapter's config: read off the weights, or refused where they may be slow."""

from __future__ import annotations

import time
from typing import Any

import pytest
from support.processor_time import keeps_limit

from peft_lab.adapter_files.name_patterns import check_key_pattern, check_pattern, pattern_fields, without_patterns
from peft_lab.errors import ConfigError

HEADER: dict[str, tuple[str, list[int]]] = {
    "base_model.model.a.query.lora_A.weight": ("F32", [2, 4]),
    "base_model.model.a.query.lora_B.weight": ("F32", [4, 2]),
    "base_model.model.a.value.lora_A.weight": ("F32", [2, 4]),
    "base_model.model.classifier.weight": ("F32", [3, 4]),
}
SLOW = ("(a+)+$", "(a|a)*$", "(.*)*x", "(?:a?){30}a{30}", ".*" * 9 + "x", r"(\w+\s?)*", r"(a)\1", "(?<=a)b", "(x+x+)+y")


@pytest.mark.parametrize("pattern", [*SLOW, "(" * 3000 + ")" * 3000, "("])
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_modules_are_those_of_the_weights(field: str, pattern: str) -> None:
    found = without_patterns({field: pattern, "r": 2}, HEADER, "lora_", '"x"')
    assert found["target_modules"] == ["a.query", "a.value"]
    assert found.get("exclude_modules") is None
    assert found["r"] == 2


def test_names_stay() -> None:
    values: dict[str, Any] = {"target_modules": ["query"], "exclude_modules": ["value"]}
    assert pattern_fields(values) == []
    assert without_patterns(values, HEADER, "lora_", '"x"') == values


def test_a_head_saved_alone_stays() -> None:
    values = {"target_modules": "dummy-target-modules"}
    assert without_patterns(values, HEADER, "lora_", '"x"') == values


def test_recorded_modules_count_too() -> None:
    values = {"target_modules": ".*", "fingerprints": {"a.key": {}}}
    assert without_patterns(values, HEADER, "lora_", '"x"')["target_modules"] == ["a.key", "a.query", "a.value"]


def test_a_regex_without_modules_in_the_weights_is_refused() -> None:
    with pytest.raises(ConfigError, match="name none; write module names"):
        without_patterns({"target_modules": ".*"}, {}, "lora_", '"x"')
    with pytest.raises(ConfigError, match="sets other_modules to a regular expression"):
        without_patterns({"other_modules": ".*"}, HEADER, "lora_", '"x"')


@pytest.mark.parametrize("pattern", [*SLOW, "(" * 3000 + ")" * 3000, "(", "(a{1,60000}){2}", "(?P<n>a)(?(n)b|c)"])
def test_slow_keys_are_refused_at_once(pattern: str) -> None:
    started = time.process_time()
    with pytest.raises(ConfigError, match=r"^rank_pattern.*(regular expression|may take for ever)"):
        check_key_pattern("rank_pattern", pattern)
    assert keeps_limit(time.process_time() - started, 5)


@pytest.mark.parametrize(
    "pattern",
    [r".*\.layers\.\d+\..*\.(q|v)_proj", r"^.*(?:query|value)$", r"layer\.[0-3]\.\w+", "model.layers.0.q_proj"],
)
def test_usual_keys_pass(pattern: str) -> None:
    check_key_pattern("rank_pattern", pattern)
    check_pattern("target_modules", pattern)


def test_a_regex_that_does_not_compile_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"target_modules='\(' is not a valid regular expression"):
        check_pattern("target_modules", "(")
