"""Cases of the daily run: a small cover of a matrix of methods and families; all other cases are marked `full`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import pytest

from peft_lab import registry

#: One family of each shape of model: encoder, decoder, fused attention, encoder-decoder, vision transformer, windows,
#: two conv nets.
MAIN = ("bert", "llama", "gpt2", "t5", "vit", "swin", "resnet", "efficientnet")
#: Those that every method runs on daily where it goes, by what they stand for.
_STANDS_FOR = {"bert": "encoder", "llama": "decoder", "gpt2": "decoder", "vit": "vision transformer"}
_STANDS_FOR |= dict.fromkeys(("swin", "resnet", "efficientnet"), "hierarchy")
Needs = Callable[[tuple[Any, ...]], set[Hashable]]


def each_value(case: tuple[Any, ...]) -> set[Hashable]:
    """Every value of every parameter."""
    return {(position, str(value)) for position, value in enumerate(case)}


def each_place(case: tuple[Any, ...]) -> set[Hashable]:
    """One method of each place, and every value of the other parameters."""
    return {registry.method(case[0]).place, *each_value(case[1:])}


def each_family(case: tuple[Any, ...]) -> set[Hashable]:
    """Every family, and every method with a text and an image."""
    method, family = case
    needs: set[Hashable] = {family}
    if family in MAIN:
        needs.add((method, "text" if MAIN.index(family) < MAIN.index("vit") else "image"))
    return needs


def places_and_families(case: tuple[Any, ...]) -> set[Hashable]:
    """Every family with one method of each place, and every method with each main architecture."""
    method, family = case
    needs: set[Hashable] = {(registry.method(method).place, family)}
    if family in _STANDS_FOR:
        needs.add((method, _STANDS_FOR[family]))
    return needs


def cover(cases: Iterable[Any], needs: Needs = each_value) -> list[Any]:
    """Mark as `full` the cases that a cover can do without.

    Args:
        cases: values of one parameter, or tuples of several.
        needs: case -> what is tested once it has run. The daily cases together test all that all cases test.
    """
    tuples = [case if isinstance(case, tuple) else (case,) for case in cases]
    daily = _chosen(tuples, needs)
    return [pytest.param(*case, marks=() if i in daily else pytest.mark.full) for i, case in enumerate(tuples)]


def _chosen(cases: list[tuple[Any, ...]], needs: Needs) -> set[int]:
    """Indices of a cover, found greedily; among equal cases the one whose values were chosen least."""
    wanted = [needs(case) for case in cases]
    left: set[Hashable] = set().union(*wanted)
    used: Counter[str] = Counter()
    chosen: set[int] = set()
    while left:
        best = max(range(len(cases)), key=lambda i: (len(wanted[i] & left), -sum(used[str(v)] for v in cases[i])))
        chosen.add(best)
        left -= wanted[best]
        used.update(str(value) for value in cases[best])
    return chosen
