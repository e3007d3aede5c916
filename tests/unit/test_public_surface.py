"""The public names of peft_lab: each is there, is what it says, and stays so whatever is imported."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
import textwrap
from types import ModuleType

import pytest
from support.tiny_runs import HEAVY

import peft_lab
from peft_lab import registry
from peft_lab.errors import ConfigError

FUNCTIONS = (
    *("compare", "evaluate", "list_kinds", "list_methods", "list_recipes", "list_tasks", "load_adapter", "load_many"),
    *("merge", "predict", "push", "recommend", "to_lora", "train"),
)
ERRORS = ("AdapterMismatchError", "ConfigError", "DivergedError", "PeftLabError", "TaskError")
OTHERS = (*ERRORS, "ReadTrainingData", "row_inputs")
CONFIGS = sorted(info.config for info in registry.list_methods().values() if info.config and info.place != "peft")

#: Arguments that each function refuses before it does anything, so that a call costs no training.
WRONG = {
    "compare": lambda folder: (folder / "missing.yaml",),
    "evaluate": lambda folder: (folder / "missing",),
    "load_adapter": lambda folder: (None, folder / "missing"),
    "load_many": lambda folder: (_linear(), {"a": folder / "missing"}),
    "merge": lambda folder: (folder / "missing", folder / "out"),
    "predict": lambda folder: (folder / "missing", ["a text"]),
    "push": lambda folder: (folder / "missing", "someone/name"),
    "recommend": lambda folder: ("no-such-task", "minilm", 1),
    "to_lora": lambda folder: (folder / "missing", folder / "out"),
    "train": lambda folder: ({"no_such_option": 1},),
}


def _linear():
    import torch

    return torch.nn.Linear(2, 2).eval()


@pytest.fixture(scope="module")
def everything() -> list[str]:
    """Import every module of the package, those of methods and kinds of task too."""
    names = []
    # in an editable installation the last two lie outside the folder of the first
    for package in ("peft_lab", "peft_lab.adapters", "peft_lab.tasks"):
        folders = importlib.import_module(package).__path__
        names += [found.name for found in pkgutil.walk_packages(folders, f"{package}.")]
    assert "peft_lab.adapters.weight.lora" in names
    assert "peft_lab.tasks.kinds.causal_lm" in names
    for name in names:
        if name not in ("peft_lab.__main__", "peft_lab.utils._safe_path"):  # these change the process
            importlib.import_module(name)
    return names


def test_every_public_name_is_there_and_no_other():
    assert {*FUNCTIONS, *OTHERS} <= {*peft_lab.__all__}
    assert {*peft_lab.__all__, *CONFIGS} <= {*dir(peft_lab)}
    for name in peft_lab._LAZY:
        assert name in peft_lab.__all__


@pytest.mark.parametrize("name", [*peft_lab.__all__, *CONFIGS])
def test_a_public_name_is_no_module_after_everything_was_imported(name, everything):
    first, second = getattr(peft_lab, name), getattr(peft_lab, name)
    assert first is second
    assert not isinstance(first, ModuleType)
    assert callable(first)
    assert first.__name__ == name


def test_no_module_at_the_top_bears_a_public_name(everything):
    top = {name.split(".")[1] for name in everything}
    assert not top & {*peft_lab.__all__, *CONFIGS}


@pytest.mark.parametrize("name", sorted(WRONG))
def test_a_function_can_be_called_twice(name, everything, tmp_path):
    for _ in range(2):
        with pytest.raises(peft_lab.PeftLabError):
            getattr(peft_lab, name)(*WRONG[name](tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name.startswith("list_")])
def test_a_listing_can_be_called_twice(name, everything):
    assert getattr(peft_lab, name)() == getattr(peft_lab, name)()
    assert {*WRONG} | {name for name in FUNCTIONS if name.startswith("list_")} == {*FUNCTIONS}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_the_one_of_its_method(name):
    from peft_lab import adapters

    assert getattr(peft_lab, name) is getattr(adapters, name)


def test_svfit_is_imported_from_either_place():
    from peft_lab import SVFitConfig
    from peft_lab.adapters import SVFitConfig as same

    assert SVFitConfig is same


def test_errors_are_those_of_the_engine():
    assert peft_lab.ConfigError is ConfigError
    for name in ("AdapterMismatchError", "ConfigError", "TaskError"):
        assert issubclass(getattr(peft_lab, name), peft_lab.PeftLabError)


def test_a_name_that_is_not_there_is_answered_with_the_nearest_one():
    with pytest.raises(AttributeError, match=r"'recomend'\. Did you mean \"recommend\"\?"):
        peft_lab.recomend  # noqa: B018
    with pytest.raises(AttributeError, match="SVFitConfig"):
        peft_lab.SvfitConfig  # noqa: B018


def test_the_listings_import_nothing_heavy():
    script = f"""
        import sys, peft_lab
        peft_lab.list_methods(), peft_lab.list_tasks(), peft_lab.list_kinds(), peft_lab.list_recipes()
        print([name for name in {HEAVY!r} if name in sys.modules])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"
