"""Cases of the daily and of the full run: covers of a matrix of methods and families.

The daily run has the smallest cover. The full run has each method with each architecture (one family in slow tests)
and one method of each place with each family; the rest of the matrix is marked `matrix` and runs with `--matrix`.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import pytest

from peft_lab import registry
from support.backbones import MODELS

#: One family of each shape of model: encoder, decoder, fused attention, encoder-decoder, vision transformer, windows,
#: two conv nets.
MAIN = ("bert", "llama", "gpt2", "t5", "vit", "swin", "resnet", "efficientnet")
#: Those that every method runs on daily where it goes, by what they stand for.
_STANDS_FOR = {"bert": "encoder", "llama": "decoder", "gpt2": "decoder", "vit": "vision transformer"}
_STANDS_FOR |= dict.fromkeys(("swin", "resnet", "efficientnet"), "hierarchy")
#: Architecture of a tiny family by the end of its class's name; that of a bare model is its own.
_ARCHITECTURES = ("SequenceClassification", "CausalLM", "ConditionalGeneration", "ImageClassification")
_ARCHITECTURES += ("SemanticSegmentation", "AudioClassification")
#: Families whose blocks are convolutions, and those of windows, which classify images as vision transformers do.
_OF_THEIR_OWN = {"convnext": "conv net", "swin": "windows"}
_OF_THEIR_OWN |= dict.fromkeys(("resnet", "efficientnet", "mobilenet_v2"), "conv net")
#: Methods in a matrix from which the full run leaves cases out, and values of another parameter from which it does.
_MANY_METHODS, _MANY_VALUES = 8, 8
#: Of many values that are no family, each method meets at least so many.
_MET = 4
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


def each_method(case: tuple[Any, ...]) -> set[Hashable]:
    """Every method, and every value of another parameter with one method of each place: for slow tests."""
    methods = registry.list_methods()
    (method,) = [value for value in case if value in methods]
    others = [(position, value) for position, value in enumerate(case) if value != method]
    return {method, *((methods[method].place, *other) for other in others)}


def cover(cases: Iterable[Any], needs: Needs = each_value, full: Needs | None = None) -> list[Any]:
    """Mark as `full` or `matrix` the cases that a cover can do without.

    Args:
        cases: values of one parameter, or tuples of several.
        needs: case -> what is tested once it has run. The daily cases together test all that all cases test.
        full: the same for the full run. None: each method meets each architecture, or several of the values of
            another parameter.
    """
    tuples = [case if isinstance(case, tuple) else (case,) for case in cases]
    daily = _chosen(tuples, needs)
    in_full = _full(tuples) if full is None else daily | _chosen(tuples, full)
    marked = []
    for index, case in enumerate(tuples):
        rest = pytest.mark.full if index in in_full else pytest.mark.matrix
        marked.append(pytest.param(*case, marks=() if index in daily else rest))
    return marked


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


def _full(cases: list[tuple[Any, ...]]) -> set[int]:
    """Indices of the cases of the full run: all of them, unless there are many methods."""
    methods = registry.list_methods()
    columns = [list(dict.fromkeys(str(value) for value in column)) for column in zip(*cases, strict=True)]
    of_methods = [position for position, column in enumerate(columns) if all(value in methods for value in column)]
    if len(of_methods) != 1 or len(columns) == 1 or len(columns[of_methods[0]]) < _MANY_METHODS:
        return set(range(len(cases)))
    position = of_methods[0]
    groups = [_groups(column) for column in columns]
    seen: set[Hashable] = set()
    chosen = set()
    # the first of equals would always be the same family, so each method begins at another place; by name, because the
    # text of an object may hold its address, and all processes must collect the same cases
    names = [repr([getattr(value, "name", value) for value in case]) for case in cases]
    order = sorted(range(len(cases)), key=lambda index: zlib.crc32(names[index].encode()))
    for index in order:
        method = str(cases[index][position])
        needs: set[Hashable] = set()
        for other, value in enumerate(map(str, cases[index])):
            if other != position:
                needs |= {(other, method, groups[other][value]), (other, methods[method].place, value)}
        if not needs <= seen:
            chosen.add(index)
            seen |= needs
    return chosen


def _groups(values: list[str]) -> dict[str, Hashable]:
    """Group of each value of a parameter: an architecture, the value itself, or one of a few of any values."""
    if len(values) < _MANY_VALUES:
        return {value: value for value in values}
    return {value: _architecture(value) or index % _MET for index, value in enumerate(values)}


def _architecture(family: str) -> str | None:
    """Architecture of a family of `backbones.MODELS`; None for a value that is none."""
    if family not in MODELS:
        return None
    builder: Any = MODELS[family]
    name = builder.args[0].__name__
    return _OF_THEIR_OWN.get(family) or next((end for end in _ARCHITECTURES if name.endswith(end)), name)
