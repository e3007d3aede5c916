"""Default learning rates: those that the committed measurements give."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from peft_lab import registry

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def defaults() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import defaults

        yield defaults
    sys.modules.pop("defaults")


def test_a_card_has_the_rate_that_was_measured(defaults: ModuleType) -> None:
    lines = defaults.scores()
    for name in sorted(lines["method"].unique()):
        measured = defaults.chosen_rate(defaults.relative_scores(lines, name))
        assert registry.method(name).learning_rate == defaults.EXCEPTIONS.get(name, measured), name


def test_the_page_follows_from_the_measurements(defaults: ModuleType) -> None:
    assert defaults.PAGE.read_text(encoding="utf-8") == defaults.page() + "\n"
