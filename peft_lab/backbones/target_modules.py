"""Default target modules of a model, from roles.

A list of names as peft's own configs have it where these are enough, else one regex.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from peft_lab.backbones.backbone_map import BackboneMap, backbone_map
from peft_lab.backbones.family import FALLBACKS, LINEAR, ROLES
from peft_lab.backbones.names import any_of, path_regex, unwrap
from peft_lab.backbones.towers import Tower, name_of
from peft_lab.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

_LOG = logging.getLogger("peft_lab")
#: Leaf names that task heads share with backbones: alone they would find the head of another model too.
_NAMES_IN_HEADS = frozenset(("dense", "out_proj", "norm", "layernorm", "LayerNorm"))


def check_roles(roles: Iterable[str]) -> list[str]:
    """Return the roles as a list.

    Raises:
        ConfigError: a role is unknown, or "head", which is no target.
    """
    # A lone string would otherwise be read letter by letter.
    roles = [roles] if isinstance(roles, str) else list(roles)
    for role in roles:
        if role not in ROLES:
            raise ConfigError(f'Unknown role "{role}".{did_you_mean(role, ROLES)} Known: {", ".join(ROLES)}.')
        if role == "head":
            raise ConfigError('Role "head" is no target: a head is trained in full; pass it as modules_to_save.')
    return roles


def target_modules(
    model: nn.Module, roles: Iterable[str], *, layers: Collection[int] | int | None = None
) -> list[str] | str:
    """Return peft's `target_modules` for the modules with the given roles.

    It is a sorted list of names (`["query", "value"]`) where peft, which compares the ends of paths, finds exactly the
    modules of `target_regex` by it; else that regex. Arguments and errors are those of `target_regex`.
    """
    pattern = target_regex(model, roles, layers=layers)
    # Ends of names are the same in every block, so they cannot choose some of them.
    if layers is not None:
        return pattern
    paths = [path for path in dict(unwrap(model).named_modules()) if path]
    matches = re.compile(pattern).fullmatch
    wanted = {path for path in paths if matches(path)}
    # A bare backbone lacks the modules of a head, so its own are told apart from usual names there.
    names = _common_ends(wanted, set(paths) - wanted)
    return names or pattern


def _common_ends(wanted: Collection[str], others: Collection[str]) -> list[str]:
    """Return the shortest ends of the wanted paths alone.

    [] if another path ends like one of them, or if an end has an index.
    """
    taken = set(_NAMES_IN_HEADS)
    for path in others:
        while path:
            taken.add(path)
            path = path.partition(".")[2]
    ends: set[str] = set()
    for path in wanted:
        # The first part may be missing on a bare backbone, so a whole path is no end.
        parts, end = path.split("."), ""
        for part in reversed(parts[1:]):
            end = f"{part}.{end}" if end else part
            # An end that begins with an index would fit one block alone.
            if part.isdigit() or end not in taken:
                break
        if not end or end in taken or end.split(".")[0].isdigit():
            return []
        ends.add(end)
    return sorted(ends)


def target_regex(model: nn.Module, roles: Iterable[str], *, layers: Collection[int] | int | None = None) -> str:
    """Return one regex for peft's `target_modules` from roles.

    It matches whole paths (peft uses `re.fullmatch`), the same on the bare backbone, on the model with a head and below
    peft's own prefix, in the module names of transformers 4 and 5; never a head or a pooler.

    Args:
        model: a transformers model, or any module that holds some.
        roles: names from `ROLES`. A role that the family lacks is replaced as `FALLBACKS` says, e.g. `attn.q` by the
            fused `attn.qkv`, or by the pointwise convolutions of a convolutional net.
        layers: adapt these blocks only; modules outside the blocks are then left out.

    Raises:
        ConfigError: an unknown role, a block index out of range, or nothing in the model plays these roles.
    """
    wanted, known = check_roles(roles), backbone_map(model)
    paths = [path for path in dict(unwrap(model).named_modules()) if path]
    chosen = None if layers is None else {layers} if isinstance(layers, int) else set(layers)
    if chosen is not None:
        _check_layers(known, chosen)
    parts: dict[str, None] = {}
    for index, tower in enumerate(known.towers):
        part = _tower_regex(known, index, _role_paths(tower, wanted), chosen)
        if part:
            parts[part] = None
            if not tower.known:
                _warn_unknown(tower, list(filter(re.compile(part).fullmatch, paths)))
    pattern = any_of(parts) if parts else ""
    if next(filter(re.compile(pattern).fullmatch, paths), None) is None:
        raise ConfigError(_nothing_found(model, wanted, known.towers))
    return pattern


def _role_paths(tower: Tower, roles: Iterable[str]) -> list[tuple[str, str]]:
    """Return the paths of the roles or of their substitutes, each once."""
    paths: dict[tuple[str, str], None] = {}
    for role in roles:
        for name in _stand_ins(tower, role):
            paths.update(dict.fromkeys(tower.family.paths(name)))
    return list(paths)


def _stand_ins(tower: Tower, role: str) -> tuple[str, ...]:
    """Return the role itself if the family has it, else its substitutes."""
    if tower.family.has(role):
        return (role,)
    # A made-up family has all linear layers in one role, which stands for each of them.
    if not tower.known:
        return ("linear",) if role in LINEAR else ()
    for group in FALLBACKS.get(role, ()):
        present = tuple(name for name in group if tower.family.has(name))
        if present:
            return present
    return ()


def _tower_regex(known: BackboneMap, index: int, paths: Collection[tuple[str, str]], chosen: set[int] | None) -> str:
    """Return one regex for some of a tower's paths.

    It fits the names of either version; "" if there are none.
    """
    tower = known.towers[index]
    numbers_of: dict[str, list[tuple[int, ...]] | None] = dict.fromkeys(["", *tower.family.blocks])
    if chosen is not None:
        for block in numbers_of:
            numbers_of[block] = _chosen_numbers(known.block_numbers(index, block), chosen) if block else []
    # Alternatives below each block, so that the block is spelt once.
    below: dict[str, dict[str, None]] = {}
    back = tower.family.renames.old
    for block, tail in paths:
        numbers = numbers_of[block]
        if numbers == []:
            continue
        spellings = [(block, tail), (back(block), back(tail))] if tower.family.aliases else [(block, tail)]
        for name, rest in spellings:
            below.setdefault(_indexed(name, numbers), {})[path_regex(rest)] = None
    parts = []
    for block, tails in below.items():
        joined = any_of(tails)
        parts.append(rf"{block}\.{joined}" if block and joined else block or joined)
    if not parts:
        return ""
    pattern = f"{tower.prefix}({any_of(parts)})"
    # An Identity in the place of a norm (ModernBERT's first block) has nothing to adapt.
    empty = sorted({re.escape(m[1]) for name in known.without_parameters if (m := re.fullmatch(pattern, name))})
    unless = rf"(?!{tower.prefix}{any_of(empty)}$)" if empty else ""
    return f"{unless}{tower.prefix}{any_of(parts)}"


def _chosen_numbers(numbers: list[tuple[int, ...]], chosen: set[int]) -> list[tuple[int, ...]]:
    found = []
    for position, number in enumerate(numbers):
        # Blocks of one list are chosen by their index in it, those of several lists by their place in the whole.
        index = number[0] if len(number) == 1 else position
        if index in chosen:
            found.append(number)
    return found


def _indexed(path: str, numbers: list[tuple[int, ...]] | None) -> str:
    """Return a path as a regex.

    Every `*` is any index, or one of the given ones.
    """
    if numbers is None:
        return path_regex(path)
    parts = re.escape(path).split(r"\*")
    if len(parts) == 2:
        return parts[0] + any_of(str(n[0]) for n in numbers) + parts[1]
    # Stage and block index belong together, so each combination is spelt out.
    filled = []
    for indices in numbers:
        pairs = zip(parts, (*indices, ""), strict=True)
        filled.append("".join(f"{part}{index}" for part, index in pairs))
    return any_of(filled)


def _check_layers(known: BackboneMap, chosen: set[int]) -> None:
    stacks = []
    for index, tower in enumerate(known.towers):
        stacks += [known.block_numbers(index, block) for block in tower.family.blocks]
    for layer in sorted(chosen):
        # Encoder and decoder may differ in depth, so one stack that has the block is enough.
        if not any(_chosen_numbers(numbers, {layer}) for numbers in stacks):
            last = max(map(len, stacks), default=0) - 1
            raise ConfigError(f"Block index {layer} does not exist: the blocks of this model are 0 to {last}.")


def _nothing_found(model: nn.Module, roles: list[str], towers: Collection[Tower]) -> str:
    name = name_of(unwrap(model))
    if not towers:
        return (
            f'Model type "{name}" has no known family and no repeated blocks with linear layers; '
            "pass target_modules with the names of the modules to adapt."
        )
    present: set[str] = set()
    for tower in towers:
        present |= {role for role in ROLES if tower.family.has(role)}
    known = ", ".join(role for role in ROLES if role in present)
    return (
        f'No module of model type "{name}" plays the role {" or ".join(roles) or "(none given)"}; '
        f"it has: {known}. Choose one of these or pass target_modules."
    )


def _warn_unknown(tower: Tower, found: list[str]) -> None:
    _LOG.warning(
        'Model type "%s" is not in the role table: adapting %d modules (%s) of the repeated blocks in "%s". '
        "Pass target_modules to choose others.",
        tower.family.name,
        len(found),
        ", ".join(sorted({name.rpartition(".")[2] for name in found})),
        ", ".join(block.removesuffix(".*") for block in tower.family.blocks),
    )
