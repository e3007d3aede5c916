"""pytest plugin: puts peft-lab's methods into peft's own tests, beside LoRA, and judges what fails.

A case that fails must be listed with its reason in expected.yaml, and a listed one must fail; a case that fails for
LoRA too on this machine is counted apart.
"""

from __future__ import annotations

import importlib
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peft_lab import registry
from peft_lab.tuners import AdapterLayer, AdapterTuner
from peft_suite.cases import AT_BASE, CONTROL, cases_of, methods_of
from peft_suite.stand_ins import load_dataset
from peft_suite.verdict import Outcome, judge, print_verdict, summary

_NOISE = 0.1


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--methods", default="", help="methods of peft-lab, separated by commas; all by default")
    parser.addoption("--record", type=Path, help="JSON file that takes the counts")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "random_start: the adapter starts at random values")
    for marker in ("single_gpu_tests", "multi_gpu_tests", "regression", "bitsandbytes"):
        config.addinivalue_line("markers", f"{marker}: of peft")
    # What peft's tests fetch from the Hub lies in the cache, or is made here.
    utils = importlib.import_module("tests.testing_utils")
    utils.hub_online_once, utils.load_dataset = nullcontext, load_dataset


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Replace LoRA's cases of a test by those of every method, and leave those of peft's other methods out."""
    marks = metafunc.definition.own_markers
    methods = methods_of(metafunc.module.__name__.rpartition(".")[2])
    if wanted := metafunc.config.getoption("--methods"):
        methods = [name for name in methods if name in (CONTROL, *wanted.split(","))]
    for index, mark in enumerate(marks):
        if mark.name != "parametrize" or len(mark.args) < 2:
            continue
        names = mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0]
        if found := cases_of(list(mark.args[1]), methods, len(names)):
            marks[index] = pytest.mark.parametrize(mark.args[0], found).mark


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests that have a case of ours."""
    kept = [item for item in items if method_of(item.nodeid)]
    config.hook.pytest_deselected(items=[item for item in items if not method_of(item.nodeid)])
    items[:] = kept


def method_of(nodeid: str) -> str:
    """Method that a case is about; "" for a test that has none."""
    _, _, parameters = nodeid.partition("[")
    for name in registry.list_methods():
        if any(part.startswith(f"{name}:") for part in parameters.split("-")):
            return name
    return ""


@pytest.fixture(autouse=True)
def _random_start(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start values that change the output, where a test asks LoRA for such ones."""
    wanted = [request.node.get_closest_marker("random_start") is not None]
    theirs = getattr(request.module, "set_init_weights_false", None)

    def set_init_weights_false(config_cls: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if not hasattr(config_cls, "info"):
            return theirs(config_cls, kwargs)
        wanted[0] = True
        return dict(kwargs)

    if theirs is not None:
        monkeypatch.setattr(request.module, "set_init_weights_false", set_init_weights_false)
    inject_adapter = AdapterTuner.inject_adapter

    def inject(tuner: AdapterTuner, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        inject_adapter(tuner, model, adapter_name, *args, **kwargs)
        at_base = tuner.info.can("identity_start") or tuner.info.name in AT_BASE
        # A method whose values come from training data has read none here.
        if (wanted[0] and at_base) or tuner.peft_config[adapter_name].values_from_data:
            _add_noise(model, adapter_name)

    monkeypatch.setattr(AdapterTuner, "inject_adapter", inject)


@torch.no_grad()
def _add_noise(model: nn.Module, adapter: str) -> None:
    for layer in [module for module in model.modules() if isinstance(module, AdapterLayer)]:
        values = [getattr(layer, name).get(adapter) for name in layer.adapter_layer_names]
        for value in [value for value in values if value is not None]:
            value.add_(torch.randn_like(value), alpha=_NOISE)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note the outcome of a case: that of its call, or of a failed fixture."""
    if report.when == "call" or report.outcome != "passed":
        crash = getattr(report.longrepr, "reprcrash", None)
        text = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr or "")
        _outcomes[report.nodeid] = Outcome(method_of(report.nodeid), report.outcome, crash.message if crash else text)


_outcomes: dict[str, Outcome] = {}


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput") or not _outcomes:
        return
    verdict = judge(_outcomes)
    session.config.verdict = verdict
    # Failures that are listed, or that LoRA has too, do not fail the run.
    session.exitstatus = pytest.ExitCode.TESTS_FAILED if verdict.wrong else pytest.ExitCode.OK
    if path := session.config.getoption("--record"):
        path.write_text(json.dumps(summary(verdict), indent=1) + "\n")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    verdict = getattr(terminalreporter.config, "verdict", None)
    if verdict is not None:
        print_verdict(verdict, terminalreporter.write_line)
