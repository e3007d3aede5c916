"""Translation of names from another version of transformers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from peft_lab.backbones.name_aliases import Renames
from peft_lab.backbones.names import PEFT_PREFIX, any_of, is_under, join, path_regex
from peft_lab.backbones.towers import Tower


@dataclass(frozen=True)
class TowerNames:
    """Facts of one tower that renaming needs.

    Attributes:
        path: path of the tower in the model.
        renames: aliases of its family.
        back: True if the model has the older names.
        root: all that stands before the family's paths in this model.
        inside: regex of the tower's names, with the part that belongs to the family as its group.
    """

    path: str
    renames: Renames
    back: bool
    root: str
    inside: re.Pattern[str]

    @classmethod
    def of(cls, tower: Tower, names: Iterable[str]) -> TowerNames:
        """Return the facts of a tower, from the names of all modules."""
        family, renames = tower.family, tower.family.renames
        tops = [tail for role in family.roles for block, tail in family.paths(role) if not block]
        patterns = any_of(path_regex(path) for path in (*tops, *family.blocks))
        inside = re.compile(rf"{tower.prefix}({patterns}(?:\..+)?)")
        own = [name for name in names if not tower.path or is_under(name, tower.path)]
        # A tower has blocks, so at least one of its names matches.
        found = next(m for name in own if (m := inside.fullmatch(renames.new(name))))
        # One older name is enough because a model has the names of one version throughout.
        back = any(renames.new(name) != name for name in own)
        return cls(tower.path, renames, back, found.string[: found.start(1)], inside)

    def convert(self, path: str) -> str:
        """Return a path, or its end, in the model's own names."""
        short = self.renames.short(path, self.back)
        if short != path:
            return short
        return self.renames.old(path) if self.back else self.renames.new(path)


class Renamer:
    """Translator of names of other versions into those of one model.

    It takes module paths, state-dict keys and leaf names.
    """

    def __init__(self, towers: list[TowerNames], leaves: frozenset[str]) -> None:
        self._towers = towers
        self._leaves = leaves

    def __call__(self, path: str) -> str:
        # A leaf name of this model, such as "query" of BERT, is never an old one.
        if path in self._leaves:
            return path
        wrapper = PEFT_PREFIX if path.startswith(PEFT_PREFIX) else ""
        rest = path.removeprefix(wrapper)
        for tower in self._towers:
            # A leaf name has no path to compare, so every tower may be meant.
            if not tower.path or "." not in rest or is_under(rest, tower.path):
                renamed = tower.convert(rest)
                if len(self._towers) == 1 and (found := tower.inside.fullmatch(tower.renames.new(renamed))):
                    # Versions also moved the backbone itself: CLIPVisionModel lost its `vision_model`.
                    renamed = join(tower.root.removesuffix("."), renamed[found.start(1) :])
                if renamed != rest:
                    return wrapper + renamed
        return path
