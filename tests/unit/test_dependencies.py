"""Packages that the code imports: those of a plain `pip install peft-lab`, and extras where something asks for them."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from peft_lab.metrics import METRICS

ROOT = Path(__file__).parents[2]
FILES = sorted(file for folder in ("peft_lab", "adapters", "tasks") for file in (ROOT / folder).rglob("*.py"))
#: Packages that may be absent, as they are imported; the tests of their users see to the sentence that asks for one.
OPTIONAL = (
    *("matplotlib", "ray", "rouge_score", "seqeval", "sacrebleu", "soundfile", "ot"),
    *("onnx", "onnxruntime", "bitsandbytes", "torchao", "deepspeed"),
)


def imported(tree: ast.Module) -> Iterator[str]:
    """Top-level packages that a module imports anywhere but for type checkers."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def required(distribution: str, extra: str = "") -> set[str]:
    """Distributions that an installation of one brings along, plain or with an extra, by their normalised names."""
    found = set()
    for requirement in map(Requirement, importlib.metadata.requires(distribution) or []):
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            found.add(normal(requirement.name))
    return found


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_import_is_of_a_required_package_or_of_an_extra():
    distributions, plain = importlib.metadata.packages_distributions(), required("peft-lab")
    assert len(plain) > 15
    # the form in which datasets holds its rows
    plain |= required("datasets") & {"pyarrow"}
    missing = {}
    for file in FILES:
        for name in set(imported(ast.parse(file.read_text(encoding="utf-8")))):
            if name in sys.stdlib_module_names or name in ("peft_lab", *OPTIONAL):
                continue
            if plain.isdisjoint(map(normal, distributions.get(name, ()))):
                missing.setdefault(name, []).append(str(file.relative_to(ROOT)))
    assert missing == {}


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if metric.package])
def test_the_extra_that_a_metric_asks_for_brings_its_package(name):
    assert normal(METRICS[name].package) in required("peft-lab", METRICS[name].extra)
