"""Towers, blocks, roles, heads and aliases of a model, computed once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from peft_lab.backbones.family import ROLES
from peft_lab.backbones.heads import has_no_head, head_paths
from peft_lab.backbones.names import WRAPPED, model_type, unwrap
from peft_lab.backbones.renaming import Renamer, TowerNames
from peft_lab.backbones.towers import Tower, find_towers

if TYPE_CHECKING:
    from torch import nn

#: Roles of single modules, narrow ones first: cross-attention has the roles of all attention too.
_NARROW = sorted(set(ROLES) - {"linear", "op", "head"}, key=lambda role: not role.startswith("cross."))


class BackboneMap:
    """Towers, blocks, module roles and heads of one model, as strings.

    It keeps no module alive.

    An adapter around a module changes no role: the path of the wrapper takes the place of the path of the module.

    Attributes:
        names: paths of all modules in the model's order, without the `base_layer` of adapters.
        towers: parts of one naming each.
        without_parameters: the names among them of modules without parameters, which have no role.
        has_no_head: True for bare and generative models.
        heads: paths of the modules of the task head; [] if there is none.
    """

    def __init__(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
        self.names: list[str] = []
        self._paths: dict[str, str] = {}
        self.without_parameters: set[str] = set()
        for path, module in modules.items():
            name = WRAPPED.sub("", path)
            # The wrapper comes before the module in it.
            if name not in self._paths:
                self.names.append(name)
                self._paths[name] = path
                if next(module.parameters(), None) is None:
                    self.without_parameters.add(name)
        self.towers: tuple[Tower, ...] = tuple(find_towers(model))
        self.has_no_head = has_no_head(model)
        self.heads: tuple[str, ...] = () if self.has_no_head else tuple(head_paths(model))
        self._by_role: dict[str, list[str]] = {}
        self._blocks: dict[tuple[int, str], dict[str, tuple[int, ...]]] = {}

    # Roles ------------------------------------------------------------------------------------------------------

    def modules(self, role: str) -> list[str]:
        """Return the paths of the modules that play a role.

        The role is any but "head"; the paths are in the model's order.
        """
        if role not in self._by_role:
            found: set[str] = set()
            for index, tower in enumerate(self.towers):
                found.update(self._matches(index, tower.family.paths(role)))
            # Known towers are found before unknown ones, so the order of the model has to be restored.
            self._by_role[role] = [self._paths[name] for name in self.names if name in found]
        return list(self._by_role[role])

    @cached_property
    def locations(self) -> dict[str, dict[str, Any]]:
        """Role, block and number of each module with a role, by path.

        They are in the order of the towers and roles.
        """
        found: dict[str, dict[str, Any]] = {}
        for index, tower in enumerate(self.towers):
            layers = self._layers(index)
            # Every family has blocks, but none of them declares the role itself.
            declared = {*tower.family.roles, "block"}
            for role in _NARROW if tower.known else ("linear",):
                if role not in declared:
                    continue
                for name in self._matches(index, tower.family.paths(role)):
                    found.setdefault(self._paths[name], {"role": role, "layer": layers.get(name)})
        # Numbers must not depend on the order in which towers and roles are read above.
        seen: Counter[tuple[str, int | None]] = Counter()
        for path in self._paths.values():
            if path in found:
                place = (found[path]["role"], found[path]["layer"])
                found[path]["nth"] = seen[place]
                seen[place] += 1
        return found

    def _matches(self, index: int, paths: Iterable[tuple[str, str]]) -> list[str]:
        """Return the names of the modules at paths of a tower.

        A module without parameters has no role.
        """
        matcher = self.towers[index].matcher(paths)
        if matcher is None:
            return []
        # The table knows one naming only; the names that are returned are those of the model.
        pairs = zip(self.names, self._table_names[index], strict=True)
        return [n for n, table in pairs if matcher.fullmatch(table) and n not in self.without_parameters]

    @cached_property
    def _table_names(self) -> list[list[str]]:
        """Names of all modules in the family table's naming, by tower."""
        found = []
        for tower in self.towers:
            rename = tower.family.renames.new
            found.append(list(map(rename, self.names)) if tower.family.aliases else self.names)
        return found

    # Blocks -----------------------------------------------------------------------------------------------------

    def block_numbers(self, index: int, block: str) -> list[tuple[int, ...]]:
        """Return the indices of all blocks of one stack, in order."""
        return sorted(set(self._inside(index, block).values()))

    def layer_index(self, path: str) -> int | None:
        """Return the index of the block that a path lies in.

        The blocks of all stages are counted through; None outside the blocks.
        """
        for index, tower in enumerate(self.towers):
            for block in tower.family.blocks:
                numbers = tower.block_numbers(block, path)
                if numbers and len(numbers) == 1:
                    return numbers[0]
                if numbers and numbers in (known := self.block_numbers(index, block)):
                    return known.index(numbers)
        return None

    def depth(self, path: str) -> tuple[int, int] | None:
        """Return the depth of a path in its stack, and the number of blocks of the stack.

        Blocks count from 1 in the order of all stages; the modules in front of the first block have the depth 0. None
        behind the blocks, in the head, and for modules that hold the stack.
        """
        path = WRAPPED.sub("", path)
        for index, tower in enumerate(self.towers):
            for block in tower.family.blocks:
                known, numbers = self.block_numbers(index, block), tower.block_numbers(block, path)
                if numbers in known:
                    return known.index(numbers) + 1, len(known)
        owners = [name for name in self._before_blocks if path.startswith(f"{name}.")]
        return (0, self._before_blocks[owners[-1]]) if owners else None

    @cached_property
    def _before_blocks(self) -> dict[str, int]:
        """Modules in front of the first block of a tower -> number of blocks of its stack."""
        found: dict[str, int] = {}
        for index, tower in enumerate(self.towers):
            for block in tower.family.blocks:
                inside = self._inside(index, block)
                first = next((name for name in self.names if name in inside), None)
                if first is None:
                    continue
                root = f"{tower.path}." if tower.path else ""
                count = len(self.block_numbers(index, block))
                for name in self.names[: self.names.index(first)]:
                    if name.startswith(root) and not first.startswith(f"{name}.") and name not in self._headed:
                        found.setdefault(name, count)
        return found

    @cached_property
    def _headed(self) -> set[str]:
        """Names of the modules in a block or in the task head."""
        found = {name for name in self.names if name.startswith(tuple(f"{head}." for head in self.heads))}
        for index, tower in enumerate(self.towers):
            for block in tower.family.blocks:
                found.update(self._inside(index, block))
        return found | set(self.heads)

    def _inside(self, index: int, block: str) -> dict[str, tuple[int, ...]]:
        """Return the indices of its block for each name in one."""
        if (index, block) not in self._blocks:
            matcher = self.towers[index].block_matcher(block)
            found: dict[str, tuple[int, ...]] = {}
            for name, table in zip(self.names, self._table_names[index], strict=True):
                match = matcher.fullmatch(table)
                if match:
                    found[name] = tuple(map(int, match.groups()))
            self._blocks[index, block] = found
        return self._blocks[index, block]

    def _layers(self, index: int) -> dict[str, int]:
        """Return the index of its block for each name in one.

        All stacks of the tower are read, and the blocks of several stages counted through.
        """
        layers: dict[str, int] = {}
        for block in self.towers[index].family.blocks:
            numbers = self.block_numbers(index, block)
            for name, own in self._inside(index, block).items():
                # Blocks of several stages are counted through.
                layers.setdefault(name, own[0] if len(own) == 1 else numbers.index(own))
        return layers

    # Names of other versions ------------------------------------------------------------------------------------

    @cached_property
    def renamer(self) -> Renamer:
        """Translator of names that another version of transformers wrote."""
        leaves = frozenset(name.rpartition(".")[2] for name in self.names)
        return Renamer([TowerNames.of(tower, self.names) for tower in self.towers], leaves)

    @cached_property
    def other_names(self) -> dict[str, str]:
        """Names of modules in the other version, by path, where they differ."""
        other: dict[str, str] = {}
        for tower in self.towers:
            renames = tower.family.renames
            inside = f"{tower.path}." if tower.path else ""
            for name in self.names if tower.family.aliases else ():
                if f"{name}.".startswith(inside):
                    # The model may have the older or the newer names, so the others lie in either direction.
                    back = renames.old(name) if renames.new(name) == name else renames.new(name)
                    if back != name:
                        other[self._paths[name]] = back
        return other


# Keys are weak because a cached map must not keep its model alive.
_MAPS: WeakKeyDictionary[Any, tuple[Any, BackboneMap]] = WeakKeyDictionary()


def backbone_map(model: nn.Module) -> BackboneMap:
    """Return the map of a model, or of a `PeftModel`'s base.

    It is made anew when the names or types of the modules have changed: an adapter was injected or unloaded, a head was
    replaced.
    """
    model = unwrap(model)
    modules = dict(model.named_modules())
    # Names alone would miss a norm that became an Identity.
    state = (tuple(modules), tuple(map(type, modules.values())), model_type(model))
    known = _MAPS.get(model)
    if known is None or known[0] != state:
        known = (state, BackboneMap(model, modules))
        _MAPS[model] = known
    return known[1]
