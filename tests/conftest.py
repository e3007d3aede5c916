"""Settings for the whole suite, set before torch is imported and inherited by the processes that tests start."""

from __future__ import annotations

import os

import pytest

# Two workers with two threads each on two cores would spend their time waiting for one another.
os.environ["OMP_NUM_THREADS"] = "1"
# Many tests ask for equal bits, and on some processors the bits of a product by MKL depend on where its matrices lie in
# memory, unless it is told otherwise.
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--matrix", action="store_true", help="run the cases that the full run leaves out, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--matrix"):
        return
    left_out = [item for item in items if item.get_closest_marker("matrix")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not item.get_closest_marker("matrix")]
