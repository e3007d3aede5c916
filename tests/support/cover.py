"""Cases of the daily run: a small cover of a matrix of methods and families; all other cases are marked `full`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import pytest

from peft_lab import registry

#: One family of each main architecture: encoder, decoders, vision transformer, windows, conv net.
DAILY_FAMILIES = ("bert", "llama", "gpt2", "vit", "swin", "efficientnet")


def each_value(case: tuple[Any, ...]) -> set[Hashable]:
    """Every value of every parameter has its turn."""
    return {(position, str(value)) for position, value in enumerate(case)}


def each_place(case: tuple[Any, ...]) -> set[Hashable]:
    """One method of each place, and every value of the other parameters."""
    return {registry.method(case[0]).place, *enumerate(map(str, case[1:]))}


def places_and_families(case: tuple[Any, ...]) -> set[Hashable]:
    """Each family with one method of each place, and each method with the main architectures."""
    method, family = case[:2]
    needs: set[Hashable] = {(registry.method(method).place, family), method, *case[2:]}
    if family in DAILY_FAMILIES:
        architecture = (
            "decoder" if family in ("llama", "gpt2") else "image" if family in ("swin", "efficientnet") else family
        )
        needs.add((method, architecture))
    return needs


def cover(
    cases: Iterable[Any], needs: Callable[[tuple[Any, ...]], set[Hashable]] = each_value, daily: int | None = None
) -> list[Any]:
    """Mark as `full` the cases that a cover of all needs can do without.

    Args:
        cases: values of one parameter, or tuples of several.
        needs: case -> what is tested once it has run; the daily cases together have tested all that the cases can.
        daily: instead of a cover, that many of the first cases.
    """
    cases = list(cases)
    chosen = set(range(len(cases))[:daily]) if daily is not None else _chosen([_tuple(case) for case in cases], needs)
    return [
        case if i in chosen else pytest.param(*_tuple(case), marks=pytest.mark.full) for i, case in enumerate(cases)
    ]


def _tuple(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case, tuple) else (case,)


def _chosen(cases: list[tuple[Any, ...]], needs: Callable[[tuple[Any, ...]], set[Hashable]]) -> set[int]:
    """Indices of a cover, found greedily; among equals a case whose values were chosen least."""
    wanted = [needs(case) for case in cases]
    left = set[Hashable]().union(*wanted)
    used: Counter[str] = Counter()
    chosen: set[int] = set()
    while left:
        best = max(range(len(cases)), key=lambda i: (len(wanted[i] & left), -sum(used[str(v)] for v in cases[i])))
        chosen.add(best)
        left -= wanted[best]
        used.update(str(value) for value in cases[best])
    return chosen
