"""Module roles of a model: targets, heads, block indices, old names.

All functions take a transformers model, any module that holds some, or a `PeftModel`, and read its `BackboneMap`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any

from peft_lab.backbones.backbone_map import backbone_map
from peft_lab.backbones.family import ROLES, Family
from peft_lab.backbones.family_table import family
from peft_lab.backbones.heads import PEFT_HEADS
from peft_lab.backbones.names import ends_with, model_type, unwrap
from peft_lab.backbones.target_modules import check_roles, target_modules, target_regex
from peft_lab.backbones.towers import Tower
from peft_lab.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "ROLES",
    "Family",
    "class_heads",
    "family",
    "head_modules",
    "layer_index",
    "module_locations",
    "modules_by_role",
    "rename_old",
    "rename_targets",
    "renamer",
    "target_modules",
    "target_regex",
]

_LOG = logging.getLogger("peft_lab")


def modules_by_role(model: nn.Module, role: str) -> list[str]:
    """Return the paths of the modules with exactly this role.

    They are in the model's order; there is no fallback.

    Raises:
        ConfigError: the role is not in `ROLES`.
    """
    if role == "head":
        return head_modules(model)
    check_roles([role])
    return backbone_map(model).modules(role)


def module_locations(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return role, block and number of each module with a role.

    By these a module is found again under other names.

    Returns:
        path -> `role` (its narrowest one), `layer` (index of its block, None outside) and `nth` (its number among the
        modules of that role and block, in the model's order).
    """
    return {path: dict(location) for path, location in backbone_map(model).locations.items()}


# Heads --------------------------------------------------------------------------------------------------------------


def head_modules(model: nn.Module, task_type: str | None = None) -> list[str]:
    """Return the paths of the task head, for `modules_to_save`.

    [] for bare and generative models.

    The paths are those of the head's innermost modules with parameters (`classifier.dense` and `classifier.out_proj`,
    not RoBERTa's `classifier`): apart from LoRA, peft's tuners cannot merge a module made of several.

    Args:
        model: a transformers model, or a module that holds one beside its head.
        task_type: peft's task type of the adapter, if it has one. peft then saves `classifier` or `score` in full by
            itself, and modules in there must not be named a second time.

    Raises:
        ConfigError: peft, which compares the ends of names only, would also take a backbone module for the head.
    """
    model, known = unwrap(model), backbone_map(model)
    if known.has_no_head:
        return []
    heads = list(known.heads)
    if not heads and model_type(model):
        _LOG.warning("No task head found in %s: pass modules_to_save if it has one to train.", type(model).__name__)
    # The task type may be a member of peft's enum or its text.
    taken = PEFT_HEADS.get(str(getattr(task_type, "value", task_type)), ())
    if taken:
        # peft puts these in by name, with all that lies inside.
        heads = [head for head in heads if not _is_below(head, taken)]
    return [head for head in heads if not _clashes(model, head, heads)]


def class_heads(model: nn.Module) -> list[str]:
    """Return the paths of the linear maps that give class logits.

    [] for a model without classes.
    """
    classes = getattr(getattr(model, "config", None), "num_labels", None)
    heads = head_modules(model) if classes else []
    return [path for path in heads if getattr(model.get_submodule(path), "out_features", None) == classes]


def _clashes(model: nn.Module, head: str, heads: list[str]) -> bool:
    """Test whether peft would take a backbone module for this head.

    Then a norm stays frozen.

    Raises:
        ConfigError: the head is no norm.
    """
    # peft looks for names that end with the head, without regard to dots.
    below = tuple(f"{path}." for path in heads)
    names = dict(model.named_modules())
    clash = [name for name in names if name.endswith(head) and not f"{name}.".startswith(below)]
    if not clash:
        return False
    if "norm" not in type(model.get_submodule(head)).__name__.lower():
        raise ConfigError(
            f'The task head "{head}" cannot be told from "{clash[0]}": peft compares the ends of module names. '
            "Rename the head, or pass modules_to_save."
        )
    _LOG.warning('"%s" stays frozen: peft, which compares the ends of names, would take "%s" too.', head, clash[0])
    return True


def _ancestors(path: str) -> Iterator[str]:
    parts = path.split(".")
    return (".".join(parts[: i + 1]) for i in range(len(parts)))


def _is_below(head: str, names: tuple[str, ...]) -> bool:
    """Test whether a head, or a module around it, has a name with one of the endings."""
    return any(part.endswith(names) for part in _ancestors(head))


# Blocks -------------------------------------------------------------------------------------------------------------


def layer_index(model_or_family: nn.Module | Family | str, path: str) -> int | None:
    """Return the index of the block that a path lies in.

    None outside the blocks.

    In families with stages (Swin, ConvNeXt, ResNet) the blocks of all stages are counted through, which needs the
    model: given a family alone, the answer is None there. Encoder and decoder blocks are counted separately.
    """
    if not isinstance(model_or_family, Family | str):
        return backbone_map(model_or_family).layer_index(path)
    alone = _family(model_or_family)
    if alone is None:
        return None
    # Without a model, the path may be one of the bare backbone or of any model around it.
    tower = Tower("", alone, r"(?:.*\.)?")
    for block in alone.blocks:
        numbers = tower.block_numbers(block, path)
        # Several numbers are stage and block, and the sizes of earlier stages are unknown here.
        if numbers and len(numbers) == 1:
            return numbers[0]
    return None


def _family(given: Family | str) -> Family | None:
    return family(given) if isinstance(given, str) else given


# Names of other versions --------------------------------------------------------------------------------------------


def rename_old(model_or_family: nn.Module | Family | str, path: str) -> str:
    """Return the installed version's name for one of another version.

    `encoder.layer.0.attention.attention.query` becomes `layers.0.attention.q_proj`, `value` becomes `v_proj`; identity
    if nothing fits, or if a leaf name (`dense`) stands for several new ones: `rename_targets` resolves those.
    """
    if not isinstance(model_or_family, Family | str):
        return renamer(model_or_family)(path)
    alone = _family(model_or_family)
    if alone is None:
        return path
    # The end of a path, such as a leaf name, holds no whole fragment that `new` could replace.
    return alone.renames.new(alone.renames.short(path))


def renamer(model: nn.Module) -> Callable[[str], str]:
    """Return `rename_old` bound to one model, for many paths.

    Its direction follows the names that the model has.
    """
    return backbone_map(model).renamer


def rename_targets(model: nn.Module, targets: Collection[str] | str) -> list[str] | str:
    """Return `target_modules` of another version in names of this model.

    They are names or one regex, and find the same modules here.

    A name that stood for several modules is replaced by all of them: `dense` of an old ViT by the output projection and
    both MLP layers. Names that already fit the model are kept.
    """
    other = backbone_map(model).other_names
    if isinstance(targets, str):
        # A regex cannot be renamed safely, so the modules that it misses are added to it by name.
        missed = [name for name, old in other.items() if re.fullmatch(targets, old) and not re.fullmatch(targets, name)]
        return f"(?:{targets}|{'|'.join(map(re.escape, missed))})" if missed else targets
    # The model has the names of every version: all targets fit as they are.
    if not other:
        return list(dict.fromkeys(targets))
    names = [name for name, _ in unwrap(model).named_modules() if name]
    rename = renamer(model)
    renamed: list[str] = []
    for target in targets:
        here = {name for name in names if ends_with(name, target)}
        there = {name for name, old in other.items() if ends_with(old, target)} - here
        if not there or here:
            renamed.append(target)
        if there:
            short = rename(target)
            # peft compares ends of names, so a short name is safe only if it finds no other module.
            simple = not here and {name for name in names if ends_with(name, short)} == there
            renamed += [short] if simple else sorted(there)
    return list(dict.fromkeys(renamed))
