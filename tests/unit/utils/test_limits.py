"""Limits of what is read: bytes, values, depth, patterns, and sizes that a config asks for."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from peft_lab.errors import ConfigError, TaskError
from peft_lab.utils import bounded_files, plain_yaml
from peft_lab.utils.patterns import may_take_for_ever


@pytest.mark.parametrize("error", [ConfigError, TaskError])
def test_only_plain_files_of_the_size_are_read(error: type[ConfigError], tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert bounded_files.read_bytes(tmp_path / "a", 5) == b"12345"
    with pytest.raises(error, match="more than the 4"):
        bounded_files.read_bytes(tmp_path / "a", 4, error)
    os.mkfifo(tmp_path / "pipe")
    for name, words in (("pipe", "plain file"), (".", "plain file|cannot be read"), ("none", "cannot be read")):
        with pytest.raises(error, match=words):
            bounded_files.read_bytes(tmp_path / name, 5, error)
    with pytest.raises(error, match="plain file"):
        bounded_files.read_bytes(Path("/dev/zero"), 5, error)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1e999}', "too large a number"),
        ('{"a": ' + "9" * 50 + "}", "too large a number"),
        ('{"a": "\\ud800"}', "surrogates not allowed"),
        ("[" + "1," * 1_000_001 + "1]", "more than 1,000,000 values"),
        ('{"a":' + "[" * 33 + "]" * 33 + "}", "nested more than"),
    ],
)
def test_json_beyond_the_limits(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        bounded_files.parse_json(text.encode(), "The file")


def test_json_of_others_may_hold_what_json_has_not() -> None:
    """Configs of some models have an infinite limit."""
    found = bounded_files.parse_json(b'{"limit": [0.0, Infinity], "a": 1, "a": 2}', "The config", lenient=True)
    assert found == {"limit": [0.0, float("inf")], "a": 2}


def test_a_yaml_file_with_aliases_is_read() -> None:
    text = "a: &x [1, 2]\nb: *x\nc: {d: *x}\n"
    assert plain_yaml.read(text) == {"a": [1, 2], "b": [1, 2], "c": {"d": [1, 2]}}


def test_a_yaml_file_may_hold_what_a_task_of_many_labels_has() -> None:
    labels = [f"label {i}" for i in range(20_000)]
    assert plain_yaml.read("labels:\n" + "".join(f"- {label}\n" for label in labels)) == {"labels": labels}


#: Patterns of GPT-2, Llama 3, GPT-4o, DeepSeek, BLOOM, and of numbers in groups of three.
TOKENIZERS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*",
    r" ?[^(\s|[.,!?…])]+",
    r"\d{1,3}(?=(?:\d{3})*\b)",
    r"(?=(\d{3})+(?!\d))",
)
EXPONENTIAL = ("(a+)+$", "(a|aa)+$", "(a?){1,60000}b", "((a)+)+", "(?:(?:a*)b?)*", "(a+){2,}", "(.*)*", "(?>a|b)*(x*)+")


@pytest.mark.parametrize("pattern", TOKENIZERS)
def test_patterns_of_tokenizers_pass(pattern: str) -> None:
    assert not may_take_for_ever(pattern)


@pytest.mark.parametrize("pattern", [*EXPONENTIAL, "a*" * 7 + "b", "x" * 5000, r"([a-z]+\s?)+!"])
def test_patterns_that_take_for_ever_are_found(pattern: str) -> None:
    assert may_take_for_ever(pattern)


def test_patterns_of_the_shipped_tasks_pass() -> None:
    tasks = Path(__file__).parents[3] / "tasks"
    for file in tasks.glob("*.yaml"):
        for _, text in re.findall(r'^\s+(extract|required): ("(?:[^"\\]|\\.)*")', file.read_text(), re.MULTILINE):
            assert not may_take_for_ever(json.loads(text)), file
