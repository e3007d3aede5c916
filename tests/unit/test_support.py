"""The tests' own tools: a daily cover loses no need, and code is checked without running it."""

from __future__ import annotations

import itertools

import pytest
from support import processor_time
from support.backbones import TINY
from support.code import missing_names
from support.cover import MAIN, Needs, cover, each_family, each_method, each_place, each_value, places_and_families
from support.properties import METHODS


@pytest.mark.parametrize("needs", [each_value, each_place, each_family, places_and_families])
def test_a_cover_has_all_needs(needs: Needs) -> None:
    cases = list(itertools.product(METHODS, TINY))
    marked = cover(cases, needs)
    daily = [case.values for case in marked if not case.marks]
    assert [case.values for case in marked] == cases
    assert set().union(*map(needs, daily)) == set().union(*map(needs, cases))
    assert len(daily) < len(cases) / 2


def test_a_full_run_may_have_a_smaller_cover() -> None:
    cases = list(itertools.product(METHODS, TINY))
    marked = cover(cases, each_place, full=each_method)
    chosen = [case.values for case in marked if not any(mark.name == "matrix" for mark in case.marks)]
    assert {method for method, _ in chosen} == set(METHODS)
    assert {family for _, family in chosen} == set(TINY)
    assert set().union(*map(each_method, chosen)) == set().union(*map(each_method, cases))
    assert len(chosen) < len([case for case in cover(cases, each_place) if case.marks != (pytest.mark.matrix,)])


def test_a_cover_of_single_values_keeps_all() -> None:
    assert not [case for case in cover(MAIN) if case.marks]


@pytest.mark.parametrize(("slowness", "used", "kept"), [(1, 9, True), (1, 11, False), (2, 11, True), (2, 21, False)])
def test_a_limit_grows_with_the_slowness_of_the_machine(
    slowness: float, used: float, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor_time, "cpu_seconds", lambda _: slowness * processor_time._SECONDS_OF_WORK)
    assert processor_time.keeps_limit(used, 10) is kept


def test_names_that_do_not_exist_are_found() -> None:
    code = "import torch.nn as nn, json\nfrom pathlib import Path, Pth\nnn.Linear\nnn.Linar\njson.loads\nPath.home"
    assert missing_names(code) == ["pathlib.Pth", "nn.Linar"]
    with pytest.raises(SyntaxError):
        missing_names("import")
