"""What the tests of reports share."""

from __future__ import annotations

import importlib.util

import pytest


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide matplotlib, so that nothing is drawn, which takes most of the time of a report."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a))
