"""Fixtures of the properties: the tiny model of a test's family."""

from __future__ import annotations

from typing import Any

import pytest
from support.backbones import MODELS
from support.properties import FITTED

#: Estimators that stand for all of them daily, because they share one layer.
DAILY = FITTED[:: len(FITTED) // 2]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the properties of the other estimators as `full`."""
    for item in items:
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if "properties" in item.path.parts and {*map(str, values)} & ({*FITTED} - {*DAILY}):
            item.add_marker(pytest.mark.full)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {}


@pytest.fixture
def base(models: dict[str, Any], family: str) -> Any:
    """The model of a family, built once for the tests of a file, which put adapters on copies of it."""
    if family not in models:
        models[family] = MODELS[family]()
    return models[family]
