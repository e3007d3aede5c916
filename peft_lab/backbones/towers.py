"""Towers of a model: parts of one naming, such as CLIP's two.

A part whose `model_type` the family table does not know gets a family made up from its repeated blocks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft_lab.backbones.family import Family
from peft_lab.backbones.family_table import FAMILIES
from peft_lab.backbones.heads import has_no_head, head_paths
from peft_lab.backbones.names import PEFT_PREFIX, WRAPPED, any_of, is_under, join, model_type, path_regex
from peft_lab.backbones.unknown_families import made_up_family

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Tower:
    """Part of a model with one naming.

    Attributes:
        path: path of the part in the model; "" for the whole model.
        family: its family, from the table or made up.
        prefix: regex of all that may stand before the family's paths.
        known: True if the family is from the table.
    """

    path: str
    family: Family
    prefix: str
    known: bool = True

    @classmethod
    def of(cls, module: nn.Module, path: str, family: Family, known: bool = True) -> Tower:
        """Return the tower of a module at `path`."""
        # One regex must fit the bare backbone as well as the models around it.
        names = sorted({path, getattr(module, "base_model_prefix", ""), *family.prefixes} - {""})
        under = rf"(?:(?:.*\.)?{any_of(map(re.escape, names))}\.)?" if names else ""
        return cls(path, family, rf"(?:{re.escape(PEFT_PREFIX)})?{under}", known)

    def matcher(self, paths: Iterable[tuple[str, str]]) -> re.Pattern[str] | None:
        """Return a regex of whole module names at the given paths.

        The paths are (block, path below it), in the table's names; None if none is given.
        """
        # One of the two may be empty.
        joined = [path_regex(".".join(filter(None, path))) for path in paths]
        return re.compile(f"{self.prefix}{any_of(joined)}") if joined else None

    def block_matcher(self, block: str) -> re.Pattern[str]:
        """Return a regex of a block and all modules in it.

        Its groups are the indices of the block.
        """
        return re.compile(self.prefix + re.escape(block).replace(r"\*", r"(\d+)") + r"(?:\..+)?")

    def block_numbers(self, block: str, path: str) -> tuple[int, ...] | None:
        """Return the indices of the block that a path lies in.

        The path may be in the names of any version; None outside the blocks.
        """
        found = self.block_matcher(block).fullmatch(self.family.renames.new(path))
        return tuple(map(int, found.groups())) if found else None


def find_towers(model: nn.Module) -> list[Tower]:
    """Return the towers of a model, known ones first.

    [] if it has no repeated blocks.
    """
    # Unknown parts are looked for beside known ones only; alone, the model as a whole is read.
    known = list(_known_towers(model, ""))
    if not known:
        made_up = _made_up(model)
        return [Tower.of(model, "", made_up, known=False)] if made_up else []
    return known + list(_unknown_towers(model, "", [tower.path for tower in known]))


def name_of(model: nn.Module) -> str:
    """Return the `model_type` of a model, else the name of its class."""
    return model_type(model) or type(model).__name__


def _known_towers(module: Any, path: str) -> Iterator[Tower]:
    family = FAMILIES.get(model_type(module) or "")
    if family:
        tower = Tower.of(module, path, family)
        # A custom model may claim a known type and be built otherwise: then it is read as an unknown one.
        if _has_blocks(module, tower):
            yield tower
        return
    for name, child in module.named_children():
        yield from _known_towers(child, join(path, name))


def _has_blocks(module: nn.Module, tower: Tower) -> bool:
    """Test whether a module has one of the family's blocks."""
    matchers = [tower.block_matcher(block) for block in tower.family.blocks]
    # One type stands for all architectures of another library, whose blocks may have the same name.
    weights = tower.matcher(tower.family.paths("linear")) if tower.family.library else None
    matchers = [weights] if weights else matchers
    renames = tower.family.renames
    for name, _ in module.named_modules():
        name = WRAPPED.sub("", name)
        path = join(tower.path, name) if tower.path else name
        path = renames.new(path) if tower.family.aliases else path
        for matcher in matchers:
            if matcher.fullmatch(path):
                return True
    return False


def _unknown_towers(module: nn.Module, path: str, known: list[str]) -> Iterator[Tower]:
    """Yield the outermost transformers models in which no known tower lies."""
    if path in known:
        return
    # The whole model has known towers inside, so only its parts can be unknown ones.
    if path and model_type(module) and not any(is_under(tower, path) for tower in known):
        made_up = _made_up(module)
        if made_up:
            yield Tower.of(module, path, made_up, known=False)
        return
    for name, child in module.named_children():
        yield from _unknown_towers(child, join(path, name), known)


def _made_up(model: nn.Module) -> Family | None:
    return made_up_family(model, name_of(model), [] if has_no_head(model) else head_paths(model))
