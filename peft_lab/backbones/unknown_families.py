"""Family of a model that the role table does not know.

It is made up from the repeated blocks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING

from peft_lab.backbones.family import Family
from peft_lab.backbones.names import path_regex, without_adapters

if TYPE_CHECKING:
    from torch import nn

#: A stack of blocks counts beside the largest one if it has at least this share of its parameters.
_STACK_SHARE = 0.1


def made_up_family(model: nn.Module, name: str, heads: Collection[str]) -> Family | None:
    """Return a family with the roles `linear` and `norm`.

    These are all linear layers and norms of the repeated blocks; None if there are none.

    Blocks are the members of the largest list of like modules, and of lists at least a tenth as large (such as the
    other half of an encoder-decoder). Where they hold no linear layer, `linear` is their ungrouped 2-D convolutions.

    Args:
        model: the unknown model.
        name: its `model_type`.
        heads: paths of task heads, which are left out.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    stacks = list(_stacks(model, "", heads))
    largest = max((_size(stack) for _, stack in stacks), default=0)
    stacks = [(path, stack) for path, stack in stacks if _size(stack) >= _STACK_SHARE * largest]
    # The tower accepts the prefix by itself, so without it the paths fit a bare backbone too.
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    blocks = {f"{path.removeprefix(prefix)}.*": dict(without_adapters(stack)) for path, stack in stacks}
    linear = _paths_in(blocks, lambda m: isinstance(m, nn.Linear | Conv1D))
    if not linear:
        linear = _paths_in(blocks, lambda m: isinstance(m, nn.Conv2d) and m.groups == 1)
    if not linear:
        return None
    norms = _paths_in(blocks, lambda m: "norm" in type(m).__name__.lower() and not any(m.children()))
    return Family(name, tuple(blocks), {"linear": linear, "norm": norms}, op=("linear",))


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _stacks(module: nn.Module, path: str, heads: Collection[str]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the stacks of blocks: the outermost lists of like modules.

    The modules are themselves made of several.
    """
    from torch import nn

    for name, child in module.named_children():
        here = f"{path}.{name}" if path else name
        _, child = next(without_adapters(child))
        members = [next(without_adapters(member))[1] for member in child.children()]
        alike = len({type(m) for m in members}) == 1 and any(members[0].children()) and _size(child) > 0
        if alike and (isinstance(child, nn.ModuleList) or (isinstance(child, nn.Sequential) and len(members) > 1)):
            if not any(head.startswith(f"{here}.") for head in heads):
                yield here, child
        else:
            yield from _stacks(child, here, heads)


def _paths_in(blocks: dict[str, dict[str, nn.Module]], wanted: Callable[[nn.Module], bool]) -> tuple[str, ...]:
    """Return the paths of the wanted modules in the blocks.

    The blocks are {path of the block: modules of the stack}; inner indices become `*` where safe.
    """
    from torch import nn

    paths: dict[str, None] = {}
    for block, modules in blocks.items():
        # nn.MultiheadAttention reads its projection's weight without calling it.
        read = {n for n in modules if isinstance(modules.get(n.rpartition(".")[0]), nn.MultiheadAttention)}
        chosen = {n: None for n, m in modules.items() if "." in n and n not in read and wanted(m)}
        for name in chosen:
            tail = name.partition(".")[2]
            general = re.sub(r"(?<![^.])\d+(?![^.])", "*", tail)
            fits = {n for n in modules if re.fullmatch(path_regex(f"*.{general}"), n)}
            # A `*` that found an unwanted module as well would adapt it.
            paths[f"{block}.{general if fits <= chosen.keys() else tail}"] = None
    return tuple(paths)
