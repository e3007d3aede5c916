"""Cases of peft's tests for peft-lab's methods: those of LoRA, with another config in its place."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

import pytest
from _pytest.mark import ParameterSet
from peft import LoraConfig, PeftConfig

from peft_lab import registry
from peft_lab.tuners.registration import config_class

CONTROL = "lora"
#: Files whose tests load models of transformers, which have blocks and so a place for prompts.
BLOCKS = {
    "test_config",
    "test_decoder_models",
    "test_encoder_decoder_models",
    "test_feature_extraction_models",
    "test_seq_classifier",
    "test_token_classification_qa",
    "test_torch_compile",
}
#: Those of them whose models have no text encoder.
DECODERS = {"test_decoder_models", "test_seq_classifier"}
#: Values of LoRA that say how large or how strong an adapter is; a method without such a field does without.
_SIZES = {"r", "lora_alpha", "lora_dropout", "init_lora_weights", "use_rslora"}
#: Values of a LoRA config that change nothing.
_NEUTRAL: dict[str, Any] = {"bias": "none", "fan_in_fan_out": False}
#: Values with which a method that starts elsewhere by default starts at the base model, as LoRA does.
AT_BASE: dict[str, dict[str, Any]] = {"ssf": {"init_std": 0.0}}


class _NoSuchCase(Exception):
    """A case uses a field of LoRA that the method has not."""


def methods_of(module: str) -> list[str]:
    """LoRA, which is the control, and the methods that a test module of peft suits."""
    found = [CONTROL]
    for name, info in registry.list_methods().items():
        if name == CONTROL or info.place in ("baseline", "head", "peft") or info.can("images"):
            continue
        if adapts_ops(name) or module in (BLOCKS - DECODERS if info.can("texts") else BLOCKS):
            found.append(name)
    return found


def adapts_ops(method: str) -> bool:
    """Whether a method adapts the ops that LoRA adapts; others act on blocks or on the end of an encoder."""
    return registry.method(method).can("linear")


def cases_of(values: Sequence[Any], methods: Sequence[str], arguments: int) -> list[Any]:
    """Parameters of a test for each method, made from the ones of LoRA; none if LoRA has none.

    Args:
        values: the parameters in peft's file.
        methods: names of methods, that of the control among them.
        arguments: number of arguments that one of `values` stands for.
    """
    found, seen, used = [], set(), set()
    rows = list(_lora_rows(values, arguments))
    for method in [name for name in methods if name != CONTROL]:
        for label, row in rows:
            try:
                translated = _translate(row, method)
            except _NoSuchCase:
                continue
            # Two cases of LoRA may differ in its own fields alone.
            if (key := (method, repr(translated))) not in seen:
                seen.add(key)
                used.add(label)
                found.append(_parameter(method, label, translated, _starts_random(row)))
    return [_parameter(CONTROL, label, row) for label, row in rows if label in used] + found


def _parameter(method: str, label: str, row: tuple[Any, ...], random_start: bool = False) -> Any:
    marks = [pytest.mark.random_start] if random_start else []
    return pytest.param(*row, id=f"{method}:{label}", marks=marks)


def _lora_rows(values: Sequence[Any], arguments: int) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for index, value in enumerate(values):
        row = value.values if isinstance(value, ParameterSet) else value
        row = (value,) if row is value and arguments == 1 else tuple(row)
        if {*_config_classes(row)} == {LoraConfig}:
            yield re.sub(r"\W+", "_", row[0]) if isinstance(row[0], str) else str(index), row


def _config_classes(value: Any) -> Iterator[type]:
    if isinstance(value, type) and issubclass(value, PeftConfig):
        yield value
    elif isinstance(value, PeftConfig):
        yield type(value)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _config_classes(part)


def _translate(value: Any, method: str) -> Any:
    cls = config_class(method)
    if value is LoraConfig:
        return cls
    if isinstance(value, LoraConfig):
        return cls(**AT_BASE.get(method, {}), **_fields(_given(value), method))
    if isinstance(value, tuple) and LoraConfig in value:
        parts = [_translate(part, method) for part in value]
        return tuple({**AT_BASE.get(method, {}), **part} if isinstance(part, dict) else part for part in parts)
    if isinstance(value, tuple):
        return tuple(_translate(part, method) for part in value)
    if isinstance(value, dict):
        return _fields(value, method)
    # Name of the method in a case, as peft's tests compare it.
    return method if value == CONTROL else value


def _given(config: LoraConfig) -> dict[str, Any]:
    """Fields of a config that differ from the default."""
    plain = LoraConfig()
    names = [field.name for field in fields(config) if field.name != "peft_type"]
    values = {name: getattr(config, name) for name in names if getattr(config, name) != getattr(plain, name, None)}
    # peft makes a set of it.
    return {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}


def _fields(values: dict[str, Any], method: str) -> dict[str, Any]:
    if any(isinstance(value, dict) and "target_modules" in value for value in values.values()):
        return {name: _fields(value, method) for name, value in values.items()}
    known, found = {field.name for field in fields(config_class(method))}, {}
    for name, value in values.items():
        if name in _SIZES or (name in _NEUTRAL and value == _NEUTRAL[name]):
            continue
        if name == "target_modules" and not adapts_ops(method):
            continue
        if name not in known:
            raise _NoSuchCase(name)
        found[name] = value
    return found


def _starts_random(value: Any) -> bool:
    """Whether a case of LoRA asks for random start values."""
    if isinstance(value, tuple):
        return any(_starts_random(part) for part in value)
    if isinstance(value, dict):
        return any(_starts_random(part) for part in value.values()) or value.get("init_lora_weights") is False
    return getattr(value, "init_lora_weights", True) is False
