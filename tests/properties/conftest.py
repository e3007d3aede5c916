"""Fixtures of the properties: the tiny model of a test's family."""

from __future__ import annotations

from typing import Any

import pytest
from support.backbones import MODELS


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {}


@pytest.fixture
def base(models: dict[str, Any], family: str) -> Any:
    """The model of a family, built once for the tests of a file, which put adapters on copies of it."""
    if family not in models:
        models[family] = MODELS[family]()
    return models[family]
