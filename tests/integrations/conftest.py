"""Record of the uses that were tried with other libraries, for the table in docs/compatibility.md.

A test that stands for a line of the table bears the marker `integration(library=..., use=...)`. With
`--record-integrations` the outcomes of a test file are written to docs/integrations/<name>.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "integrations"
_OPTION = "--record-integrations"
_PROPERTY, _REFUSED = "integration", "refused"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(_OPTION, action="store_true", help="write what worked to docs/integrations")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "integration(library, use): a line of the table in docs/compatibility.md")
    if not config.getoption(_OPTION):
        return
    # A part of a file would take the other lines of the table away.
    if config.option.keyword or config.option.markexpr or any("::" in argument for argument in config.args):
        raise pytest.UsageError(f"{_OPTION} needs whole test files, without -k, -m and single tests.")
    # The workers of xdist send their reports to one process, which writes.
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Recorder())


@pytest.fixture
def refused(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Record, with a few words of reason, that the test has seen a documented refusal."""
    return lambda reason: record_property(_REFUSED, reason)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    marker = item.get_closest_marker("integration")
    if marker is not None and _PROPERTY not in dict(item.user_properties):
        method = getattr(item, "callspec", None) and item.callspec.params.get("method", "")
        entry = {**marker.kwargs, "file": item.path.stem.removeprefix("test_"), "method": str(method or "")}
        item.user_properties.append((_PROPERTY, entry))
    yield


class _Recorder:
    """Collector of the outcomes of all tests, which are written when the run ends."""

    def __init__(self) -> None:
        self.files: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties = dict(report.user_properties)
        entry: Any = properties.get(_PROPERTY)
        # A test counts once: by its call, or by what stopped it before or after that.
        if entry is None or (report.when != "call" and report.passed):
            return
        uses = self.files.setdefault(entry["file"], {})
        use = uses.setdefault(
            (entry["library"], entry["use"]), {"works": [], "refused": {}, "failed": [], "skipped": {}}
        )
        method = entry["method"]
        if report.failed:
            use["failed"].append(method)
        elif report.skipped:
            use["skipped"][method] = report.longrepr[2].removeprefix("Skipped: ") if report.longrepr else ""
        elif _REFUSED in properties:
            use["refused"][method] = properties[_REFUSED]
        else:
            use["works"].append(method)

    def pytest_sessionfinish(self) -> None:
        RESULTS.mkdir(exist_ok=True)
        for name, uses in self.files.items():
            entries = []
            for (library, use), outcome in sorted(uses.items()):
                # A method with several cases works only if all of them do.
                failed = sorted({*outcome["failed"]})
                refused = {m: reason for m, reason in sorted(outcome["refused"].items()) if m not in failed}
                works = sorted({*outcome["works"]} - {*failed} - {*refused})
                skipped = {m: reason for m, reason in sorted(outcome["skipped"].items()) if m not in works}
                entry = {"works": works, "refused": refused, "failed": failed, "skipped": skipped}
                entries.append({"library": library, "version": _version(library), "use": use, **entry})
            text = json.dumps(entries, indent=1, ensure_ascii=False) + "\n"
            (RESULTS / f"{name}.json").write_text(text, encoding="utf-8")


def _version(library: str) -> str:
    """Installed version of a distribution, "" if it is not installed."""
    try:
        # without the part that names a build, such as +cpu
        return metadata.version(library).split("+")[0]
    except metadata.PackageNotFoundError:
        return ""
