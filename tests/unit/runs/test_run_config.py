"""The options of a run: read as the types of their fields, and checked once."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from peft_lab import registry
from peft_lab.errors import ConfigError
from peft_lab.runs.run_config import RunConfig

RUN: dict[str, Any] = {"task": "snips", "model_name_or_path": "minilm", "method": "svfit", "output_dir": "out"}


def test_values_are_read_as_the_types_of_their_fields_however_the_run_is_made() -> None:
    flags = {"learning_rate": "1e-3", "bf16": "no", "max_steps": "5"}
    direct = RunConfig(**RUN, max_train_samples="20", method_args=["rank=8"], training_arguments=flags)  # type: ignore[arg-type]
    assert direct.max_train_samples == 20
    assert direct.method_args == {"rank": 8}
    assert direct.training_arguments == {"learning_rate": 1e-3, "bf16": False, "max_steps": 5}
    flat = RunConfig.from_mapping({**RUN, "max_train_samples": 20, "method_args": {"rank": 8}, **flags})
    assert flat == direct == RunConfig.from_mapping(direct.to_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_seconds": "long"}, "max_seconds must be a number, got 'long'"),
        ({"training_arguments": {"learning_rat": 1}}, 'Unknown key "learning_rat" for training_arguments.'),
        ({"training_arguments": {"max_steps": "x"}}, "max_steps must be a whole number, got 'x'"),
        ({"method_args": ["rank"]}, 'method_args takes key=value, got "rank"'),
    ],
)
def test_a_wrong_value_is_refused_when_the_run_is_made(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        RunConfig(**{**RUN, **change})
    assert message in str(raised.value)


def test_a_run_cannot_change_and_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig(**RUN)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.method = "lora"  # type: ignore[misc]
    info = config.check()
    monkeypatch.setattr(registry, "check_method_args", lambda *args: pytest.fail("checked twice"))
    assert config.check() is info
    assert dataclasses.replace(config, method="head").method == "head"


def test_a_checked_run_is_trained_as_it_is() -> None:
    from peft_lab.training.arguments import as_run_config

    config = RunConfig(**RUN)
    assert as_run_config(config, {}) is config
    assert as_run_config(config, {"max_steps": "3"}).training_arguments == {"max_steps": 3}


@pytest.fixture
def any_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """All libraries that quantise count as installed."""
    monkeypatch.setattr("peft_lab.backbones.quantized_loading.find_spec", lambda name: name)


@pytest.mark.usefixtures("any_library")
def test_a_quantised_form_has_one_spelling() -> None:
    run = RunConfig(**RUN, load_in_4bit="true")
    assert (run.quantization, run.load_in_4bit) == ("nf4", False)
    assert run.to_dict() == RunConfig(**RUN, quantization="nf4").to_dict()
    assert RunConfig(**RUN, load_in_8bit=True, quantization="int8").check()
    with pytest.raises(ConfigError, match="nf4 and int8"):
        RunConfig(**RUN, load_in_4bit=True, load_in_8bit=True)


@pytest.mark.usefixtures("any_library")
@pytest.mark.parametrize(
    ("change", "message"),
    [({"quantization": "nf5"}, '"nf4"'), ({"method": "full", "quantization": "int8"}, "cannot be trained")],
)
def test_a_quantised_form_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig(**{**RUN, **change}).check()


def test_a_missing_library_is_named_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_lab.backbones.quantized_loading.find_spec", lambda name: None)
    for form, library in (("nf4", "bitsandbytes"), ("torchao-float8", "torchao")):
        with pytest.raises(ConfigError, match=f"pip install {library}"):
            RunConfig(**RUN, quantization=form).check()
