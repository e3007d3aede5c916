"""Checks of an installation: what is wrong is one line with the mend, and the exit status tells whether anything is."""

from __future__ import annotations

import importlib.metadata
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from peft_lab.cli import doctor
from peft_lab.cli.doctor import Finding


def found(check: Any) -> dict[str, str]:
    """Status of each finding by what was found."""
    return {finding.what: finding.status for finding in check()}


def test_versions_are_compared_with_the_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {*found(doctor._packages).values()} == {"ok"}
    wanted = ["numpy<1", "no-such-package-9>=1", 'matplotlib<1; extra == "plots"', 'pytest<1; extra == "test"']
    wanted.append('trl==1; extra == "integrations"')
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: wanted)
    monkeypatch.setattr(doctor, "_version", lambda: "0")
    versions = {"numpy": "2.0", "matplotlib": "3.0", "pytest": "8.0", "trl": "2.0"}

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    findings = list(doctor._packages())
    assert [(f.status, f.what.split()[0]) for f in findings] == [
        ("failed", "numpy"),
        ("failed", "no-such-package-9:"),
        ("warning", "matplotlib"),
        ("ok", "packages:"),
    ]
    assert findings[0].mend == 'pip install "numpy<1"'


def test_an_entry_point_whose_module_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [EntryPoint("theirs", "no_such_module_9:start", doctor.BACKENDS), EntryPoint("ours", "json:dumps", "x")]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **which: points)
    assert [*found(doctor._backends).values()] == ["failed", "ok"]


@pytest.mark.parametrize("switch", [doctor.TORCH_SWITCH, doctor.OUR_SWITCH])
def test_a_switch_is_told(switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(switch, "0")
    (finding,) = doctor._autoload()
    assert (finding.status, finding.mend) == ("warning", f"unset {switch}")


def test_autoload_is_tried_in_a_program_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(output: str, errors: str = "", code: int = 0) -> Finding:
        done = SimpleNamespace(returncode=code, stdout=output, stderr=errors)
        monkeypatch.setattr(doctor.subprocess, "run", lambda *args, **kwargs: done)
        (finding,) = doctor._autoload()
        return finding

    for switch in (doctor.TORCH_SWITCH, doctor.OUR_SWITCH):
        monkeypatch.delenv(switch, raising=False)
    types = str(doctor._own_types()).replace("'", '"')
    assert run(types).status == "ok"
    bad = run('["LORA"]', "peft-lab cannot register its methods")
    assert bad.status == "failed"
    assert "SVFIT" in bad.what
    assert "cannot register" in bad.what
    assert "ImportError: x" in run("", "Traceback\nImportError: x", 1).what


def test_folders_are_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PEFT_LAB_CACHE", str(tmp_path / "not" / "there"))
    assert [*found(doctor._cache).values()] == ["ok"]
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("PEFT_LAB_CACHE", "/dev/null/cache")
    assert [*found(doctor._cache).values()] == ["failed"]
    for value, status in ((str(tmp_path), "ok"), (str(tmp_path / "gone"), "failed"), ("", "warning")):
        monkeypatch.setenv("PEFT_LAB_DATA", value)
        assert [*found(doctor._data).values()] == [status]


def test_what_needs_torch_is_not_tried_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_torch", lambda: iter([Finding("failed", "import torch: broken")]))
    monkeypatch.setattr(doctor, "_methods", lambda: pytest.fail("was tried"))
    assert "not checked" in list(doctor.findings())[-1].what


def test_an_error_in_a_check_is_a_finding() -> None:
    def _broken() -> Any:
        raise OSError("disk")

    assert [(f.status, f.what) for f in doctor._attempted(_broken)] == [("failed", "broken: OSError: disk")]


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warning", 0), ("failed", 1)])
def test_the_exit_status_tells(status: Any, code: int, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(doctor, "findings", lambda: iter([Finding(status, "a\nthing", "do this")]))
    with pytest.raises(typer.Exit) as ended:
        doctor.doctor()
    assert ended.value.exit_code == code
    assert capsys.readouterr().out == f"{status} a thing Mend: do this\n"
