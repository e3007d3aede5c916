"""Which modules of a model play which part: default targets, task heads, block indices and names of other versions.

A model is read as one or more *towers*: the parts whose `model_type` the role table knows (CLIP has two, a vision
language model a vision and a language tower). A part that the table does not know gets a family made up on the spot:
all linear layers of its repeated blocks.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from peft_lab.backbones.family import FALLBACKS, LINEAR, ROLES, Family, path_regex
from peft_lab.backbones.family_table import FAMILIES, family
from peft_lab.backbones.name_aliases import Renames
from peft_lab.backbones.unknown_families import made_up_family
from peft_lab.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "ROLES",
    "Family",
    "family",
    "head_modules",
    "layer_index",
    "modules_by_role",
    "places",
    "rename_old",
    "rename_targets",
    "renamer",
    "target_regex",
]

_LOG = logging.getLogger("peft_lab")
#: Roles of single modules, narrow ones first: cross-attention has the roles of all attention too.
_NARROW = sorted(set(ROLES) - {"linear", "op", "head"}, key=lambda role: not role.startswith("cross."))
_PEFT = "base_model.model."
#: Heads that peft itself adds to `modules_to_save`, in full, for these task types.
_PEFT_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def target_regex(model: nn.Module, roles: Iterable[str], *, layers: Collection[int] | int | None = None) -> str:
    """One regex for peft's `target_modules` that finds the modules playing the given roles.

    It matches whole paths (peft uses `re.fullmatch`), the same on the bare backbone, on the model with a head and below
    peft's own prefix, in the module names of transformers 4 and 5; never a head or a pooler.

    Args:
        model: a transformers model, or any module that holds some.
        roles: names from `ROLES`. A role that the family lacks is replaced as `families.FALLBACKS` says, e.g. `attn.q`
            by the fused `attn.qkv`, or by the pointwise convolutions of a convolutional net.
        layers: adapt these blocks only; what lies outside the blocks is then left out.

    Raises:
        ConfigError: an unknown role, a block index out of range, or nothing in the model plays these roles.
    """
    model, wanted = _unwrap(model), _check_roles(roles)
    chosen = None if layers is None else {layers} if isinstance(layers, int) else set(layers)
    towers = _towers(model)
    if chosen is not None:
        _check_layers(model, towers, chosen)
    parts: dict[str, None] = {}
    for tower in towers:
        paths = [p for role in wanted for name in _stand_ins(tower, role) for p in tower.family.paths(name)]
        part = _regex(model, tower, dict.fromkeys(paths), chosen)
        if part:
            parts[part] = None
            if not tower.known:
                _warn_unknown(tower, [n for n, _ in model.named_modules() if re.fullmatch(part, n)])
    pattern = _any_of(parts) if parts else ""
    if not any(re.fullmatch(pattern, name) for name, _ in model.named_modules() if name):
        raise ConfigError(_nothing_found(model, wanted, towers))
    return pattern


def modules_by_role(model: nn.Module, role: str) -> list[str]:
    """Paths of the modules that play exactly this role, in the model's order; no fallback, `[]` if there is none.

    Raises:
        ConfigError: the role is not in `ROLES`.
    """
    model = _unwrap(model)
    if role == "head":
        return head_modules(model)
    _check_roles([role])
    patterns = [
        re.compile(part) for t in _towers(model) if (part := _regex(model, t, list(t.family.paths(role)), None))
    ]
    return [name for name, _ in model.named_modules() if any(p.fullmatch(name) for p in patterns)]


def places(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Where each module with a role stands, whatever it is called: what finds it again under other names.

    Returns:
        path -> `role` (its narrowest one), `layer` (index of its block, None outside) and `nth` (its number among the
        modules of that role and block, in the model's order).
    """
    model = _unwrap(model)
    names = [name for name, _ in model.named_modules()]
    found: dict[str, dict[str, Any]] = {}
    for tower in _towers(model):
        numbers = {block: tower.numbers(model, block) for block in tower.family.blocks}
        for role in _NARROW if tower.known else ("linear",):
            part = _regex(model, tower, list(tower.family.paths(role)), None)
            matches = re.compile(part).fullmatch if part else lambda name: None
            for name in names:
                if name not in found and matches(name):
                    own = [(n, every) for b, every in numbers.items() if (n := tower.block_numbers(b, name))]
                    layer = (own[0][0][0] if len(own[0][0]) == 1 else own[0][1].index(own[0][0])) if own else None
                    found[name] = {"role": role, "layer": layer}
    seen: Counter[tuple[str, int | None]] = Counter()
    for name in [name for name in names if name in found]:
        place = (found[name]["role"], found[name]["layer"])
        found[name]["nth"] = seen[place]
        seen[place] += 1
    return found


def head_modules(model: nn.Module, task_type: str | None = None) -> list[str]:
    """Paths of the freshly initialised task head, for `modules_to_save`; `[]` for bare and generative models.

    The paths are those of the head's innermost modules with parameters (`classifier.dense` and `classifier.out_proj`,
    not RoBERTa's `classifier`): apart from LoRA, peft's tuners cannot merge a module made of several.

    Args:
        model: a transformers model, or a module that holds one beside its head.
        task_type: peft's task type of the adapter, if it has one. peft then saves `classifier` or `score` in full by
            itself, and what lies in there must not be named a second time.

    Raises:
        ConfigError: peft, which compares the ends of names only, would also take a backbone module for the head.
    """
    model = _unwrap(model)
    if _has_no_head(model):
        return []
    heads = _heads(model)
    if not heads and _model_type(model):
        _LOG.warning("No task head found in %s: pass modules_to_save if it has one to train.", type(model).__name__)
    taken = _PEFT_HEADS.get(str(getattr(task_type, "value", task_type)), ())
    if taken:
        heads = [h for h in heads if not any(part.endswith(taken) for part in _ancestors(h))]
    return [head for head in heads if not _clashes(model, head, heads)]


def class_heads(model: nn.Module) -> list[str]:
    """Paths of the linear maps of the task head that give the class logits; `[]` for a model without classes."""
    classes = getattr(getattr(model, "config", None), "num_labels", None)
    heads = head_modules(model) if classes else []
    return [path for path in heads if getattr(model.get_submodule(path), "out_features", None) == classes]


def layer_index(model_or_family: nn.Module | Family | str, path: str) -> int | None:
    """Index of the block that a module path lies in; None outside the blocks.

    In families with stages (Swin, ConvNeXt, ResNet) the blocks of all stages are counted through, which needs the
    model: given a family alone, the answer is None there. Encoder and decoder blocks are counted separately.
    """
    model = None
    if isinstance(model_or_family, Family | str):
        only = _family(model_or_family)
        towers = [] if only is None else [_Tower("", only, r"(?:.*\.)?")]
    else:
        model = _unwrap(model_or_family)
        towers = _towers(model)
    for tower in towers:
        for block in tower.family.blocks:
            numbers = tower.block_numbers(block, path)
            if numbers and len(numbers) == 1:
                return numbers[0]
            if numbers and model is not None and numbers in (all_numbers := tower.numbers(model, block)):
                return all_numbers.index(numbers)
    return None


def rename_old(model_or_family: nn.Module | Family | str, path: str) -> str:
    """The installed version's name for a module path, state-dict key or leaf name that another version wrote.

    `encoder.layer.0.attention.attention.query` becomes `layers.0.attention.q_proj`, `value` becomes `v_proj`; identity
    if nothing fits, or if a leaf name (`dense`) stands for several new ones: `rename_targets` resolves those.
    """
    if isinstance(model_or_family, Family | str):
        only = _family(model_or_family)
        if only is None:
            return path
        return only.renames.new(only.renames.short(path))
    return renamer(model_or_family)(path)


def renamer(model: nn.Module) -> Callable[[str], str]:
    """`rename_old` bound to one model, for many paths. The direction follows the names that the model really has."""
    model = _unwrap(model)
    if model not in _RENAMERS:
        leaves = frozenset(name.rpartition(".")[2] for name, _ in model.named_modules())
        _RENAMERS[model] = _Renamer([_TowerNames.of(model, tower) for tower in _towers(model)], leaves)
    return _RENAMERS[model]


def rename_targets(model: nn.Module, targets: Collection[str] | str) -> list[str] | str:
    """`target_modules` (names or one regex) as another version wrote them, in names that find the same modules here.

    A name that stood for several modules is replaced by all of them: `dense` of an old ViT by the output projection and
    both MLP layers. What already fits the model is kept.
    """
    model = _unwrap(model)
    names = [name for name, _ in model.named_modules() if name]
    other = _other_names(model, names)
    if isinstance(targets, str):
        missed = [n for n in names if n in other and re.fullmatch(targets, other[n]) and not re.fullmatch(targets, n)]
        return f"(?:{targets}|{'|'.join(map(re.escape, missed))})" if missed else targets
    renamed: list[str] = []
    for target in targets:
        here = {n for n in names if _ends_with(n, target)}
        there = {n for n in names if n in other and _ends_with(other[n], target)} - here
        short = rename_old(model, target)
        if not there or here:
            renamed.append(target)
        if there:
            simple = not here and {n for n in names if _ends_with(n, short)} == there
            renamed += [short] if simple else sorted(there)
    return list(dict.fromkeys(renamed))


# Towers -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tower:
    """A part of a model with one naming; `prefix` is a regex of what may stand before the family's paths."""

    path: str
    family: Family
    prefix: str
    known: bool = True

    @classmethod
    def of(cls, module: nn.Module, path: str, family: Family, known: bool = True) -> _Tower:
        names = sorted({path, getattr(module, "base_model_prefix", ""), *family.prefixes} - {""})
        under = rf"(?:(?:.*\.)?{_any_of(map(re.escape, names))}\.)?" if names else ""
        return cls(path, family, rf"(?:{re.escape(_PEFT)})?{under}", known)

    def block_numbers(self, block: str, path: str) -> tuple[int, ...] | None:
        """The indices in the path of the block that `path` is or lies in."""
        pattern = self.prefix + re.escape(block).replace(r"\*", r"(\d+)") + r"(?:\..+)?"
        found = re.fullmatch(pattern, self.family.renames.new(path))
        return tuple(map(int, found.groups())) if found else None

    def numbers(self, model: nn.Module, block: str) -> list[tuple[int, ...]]:
        """The indices of all blocks of one stack, in order."""
        return sorted({n for name, _ in model.named_modules() if (n := self.block_numbers(block, name)) is not None})


def _unwrap(model: Any) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _family(given: Family | str) -> Family | None:
    return family(given) if isinstance(given, str) else given


def _under(path: str, parent: str) -> bool:
    return path == parent or path.startswith(f"{parent}.")


def _ends_with(path: str, name: str) -> bool:
    """peft's rule for a name in a list of target modules."""
    return path == name or path.endswith(f".{name}")


def _any_of(patterns: Iterable[str]) -> str:
    patterns = list(patterns)
    return patterns[0] if len(patterns) == 1 else f"(?:{'|'.join(patterns)})"


def _model_type(module: Any) -> str | None:
    """The `model_type` of a transformers model; None for other modules."""
    return (
        getattr(getattr(module, "config", None), "model_type", None) if hasattr(module, "base_model_prefix") else None
    )


def _name_of(model: nn.Module) -> str:
    return _model_type(model) or type(model).__name__


def _towers(model: nn.Module) -> list[_Tower]:
    known = list(_known_towers(model, ""))
    if not known:
        made_up = _made_up(model)
        return [_Tower.of(model, "", made_up, known=False)] if made_up else []
    return known + list(_unknown_towers(model, "", [tower.path for tower in known]))


def _known_towers(module: nn.Module, path: str) -> Iterator[_Tower]:
    found = FAMILIES.get(_model_type(module) or "")
    if found:
        tower = _Tower.of(module, path, found)
        names = [_join(path, name) for name, _ in module.named_modules()]
        # A custom model may claim a known type and be built otherwise: then it is read as an unknown one.
        if any(tower.block_numbers(block, name) for name in names for block in found.blocks):
            yield tower
        return
    for name, child in module.named_children():
        yield from _known_towers(child, _join(path, name))


def _unknown_towers(module: nn.Module, path: str, known: list[str]) -> Iterator[_Tower]:
    """The outermost transformers models in which no known tower lies."""
    if path in known:
        return
    if path and _model_type(module) and not any(_under(tower, path) for tower in known):
        made_up = _made_up(module)
        if made_up:
            yield _Tower.of(module, path, made_up, known=False)
        return
    for name, child in module.named_children():
        yield from _unknown_towers(child, _join(path, name), known)


def _made_up(model: nn.Module) -> Family | None:
    return made_up_family(model, _name_of(model), [] if _has_no_head(model) else _heads(model))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


# Regexes ------------------------------------------------------------------------------------------------------------


def _check_roles(roles: Iterable[str]) -> list[str]:
    roles = [roles] if isinstance(roles, str) else list(roles)
    for role in roles:
        if role not in ROLES:
            raise ConfigError(f'Unknown role "{role}".{did_you_mean(role, ROLES)} Known: {", ".join(ROLES)}.')
        if role == "head":
            raise ConfigError('Role "head" is no target: a head is trained in full; pass it as modules_to_save.')
    return roles


def _stand_ins(tower: _Tower, role: str) -> tuple[str, ...]:
    """The role itself if the family has it, else what stands in for it."""
    if tower.family.has(role):
        return (role,)
    if not tower.known:
        return ("linear",) if role in LINEAR else ()
    for group in FALLBACKS.get(role, ()):
        present = tuple(r for r in group if tower.family.has(r))
        if present:
            return present
    return ()


def _regex(model: nn.Module, tower: _Tower, paths: Collection[tuple[str, str]], chosen: set[int] | None) -> str:
    """One regex for some of a tower's paths, in the names of either version; "" if there are none."""
    back = tower.family.renames.old
    below: dict[str, list[str]] = {}
    numbers_of: dict[str, list[tuple[int, ...]] | None] = dict.fromkeys(["", *tower.family.blocks])
    if chosen is not None:
        numbers_of = {b: _chosen_numbers(tower.numbers(model, b), chosen) if b else [] for b in numbers_of}
    for block, tail in paths:
        numbers = numbers_of[block]
        if numbers == []:
            continue
        for name, rest in dict.fromkeys(((block, tail), (back(block), back(tail)))):
            below.setdefault(_indexed(name, numbers), []).append(_indexed(rest, None))
    parts = []
    for block, tails in below.items():
        joined = _any_of(dict.fromkeys(tails))
        parts.append(rf"{block}\.{joined}" if block and joined else block or joined)
    if not parts:
        return ""
    # An Identity in the place of a norm (ModernBERT's first block) has nothing to adapt.
    found = re.compile(f"{tower.prefix}({_any_of(parts)})")
    named = [(m[1], module) for name, module in model.named_modules() if (m := found.fullmatch(name))]
    empty = sorted({re.escape(name) for name, module in named if next(module.parameters(), None) is None})
    unless = rf"(?!{tower.prefix}{_any_of(empty)}$)" if empty else ""
    return f"{unless}{tower.prefix}{_any_of(parts)}"


def _chosen_numbers(numbers: list[tuple[int, ...]], chosen: set[int]) -> list[tuple[int, ...]]:
    return [n for i, n in enumerate(numbers) if (n[0] if len(n) == 1 else i) in chosen]


def _indexed(path: str, numbers: list[tuple[int, ...]] | None) -> str:
    """The path as a regex: every `*` is any index, or the given ones."""
    if numbers is None:
        return path_regex(path)
    parts = re.escape(path).split(r"\*")
    if len(parts) == 2:
        return parts[0] + _any_of(str(n[0]) for n in numbers) + parts[1]
    filled = ("".join(f"{part}{i}" for part, i in zip(parts, (*n, ""), strict=True)) for n in numbers)
    return _any_of(filled)


def _check_layers(model: nn.Module, towers: Iterable[_Tower], chosen: set[int]) -> None:
    stacks = [tower.numbers(model, block) for tower in towers for block in tower.family.blocks]
    for index in sorted(chosen):
        if not any(_chosen_numbers(numbers, {index}) for numbers in stacks):
            last = max(map(len, stacks), default=0) - 1
            raise ConfigError(f"Block index {index} does not exist: the blocks of this model are 0 to {last}.")


def _nothing_found(model: nn.Module, roles: list[str], towers: list[_Tower]) -> str:
    if not towers:
        return (
            f'Model type "{_name_of(model)}" has no known family and no repeated blocks with linear layers; '
            "pass target_modules with the names of the modules to adapt."
        )
    known = ", ".join(role for role in ROLES if any(tower.family.has(role) for tower in towers))
    return (
        f'No module of model type "{_name_of(model)}" plays the role {" or ".join(roles) or "(none given)"}; '
        f"it has: {known}. Choose one of these or pass target_modules."
    )


def _warn_unknown(tower: _Tower, found: list[str]) -> None:
    _LOG.warning(
        'Model type "%s" is not in the role table: adapting %d modules (%s) of the repeated blocks in "%s". '
        "Pass target_modules to choose others.",
        tower.family.name,
        len(found),
        ", ".join(sorted({name.rpartition(".")[2] for name in found})),
        ", ".join(block.removesuffix(".*") for block in tower.family.blocks),
    )


# Heads --------------------------------------------------------------------------------------------------------------


def _has_no_head(model: nn.Module) -> bool:
    """Bare backbones, generative models, and models whose layers outside the backbone are pretrained too."""
    if not _model_type(model):
        return False
    from transformers.models.auto import modeling_auto as auto

    if getattr(model, "get_output_embeddings", lambda: None)() is not None:
        return True
    name = type(model).__name__
    if name.endswith(("WithProjection", "ForPreTraining")):
        return True
    tables = ("MODEL_MAPPING_NAMES", "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES", "MODEL_FOR_BACKBONE_MAPPING_NAMES")
    bare = (value for table in tables for value in getattr(auto, table, {}).values())
    return any(name == value or (isinstance(value, tuple | list) and name in value) for value in bare)


def _heads(model: nn.Module) -> list[str]:
    """The outermost modules with parameters of their own that lie in no pretrained part."""
    inside = list(_pretrained_parts(model, ""))
    found: list[str] = []
    for path, module in model.named_modules():
        own = any(p is not None for p in module._parameters.values())
        if inside and path and own and not any(_under(path, part) for part in [*inside, *found]):
            found.append(path)
    return found


def _pretrained_parts(model: nn.Module, path: str) -> Iterator[str]:
    for name, child in model.named_children():
        here = _join(path, name)
        if _model_type(child) or (not path and name == getattr(model, "base_model_prefix", None)):
            yield here
        else:
            yield from _pretrained_parts(child, here)


def _clashes(model: nn.Module, head: str, heads: list[str]) -> bool:
    """Whether peft would take a backbone module for this head; then a norm stays frozen, anything else is an error."""
    clash = [n for n, _ in model.named_modules() if n.endswith(head) and not any(_under(n, h) for h in heads)]
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


# Names of other versions ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _TowerNames:
    """What renaming needs of a tower, without a reference to the model."""

    path: str
    renames: Renames
    back: bool
    root: str
    inside: re.Pattern[str]

    @classmethod
    def of(cls, model: nn.Module, tower: _Tower) -> _TowerNames:
        renames = tower.family.renames
        names = [name for name, _ in model.named_modules() if not tower.path or _under(name, tower.path)]
        own = [p for role in tower.family.roles for p in tower.family.paths(role) if not p[0]]
        tops = [_indexed(tail, None) for _, tail in own] + [_indexed(block, None) for block in tower.family.blocks]
        inside = re.compile(rf"{tower.prefix}({_any_of(tops)}(?:\..+)?)")
        found = next(m for name in names if (m := inside.fullmatch(renames.new(name))))
        return cls(tower.path, renames, any(renames.new(n) != n for n in names), found.string[: found.start(1)], inside)

    def convert(self, path: str) -> str:
        """The path, or the end of one, in the names that the model has."""
        short = self.renames.short(path, self.back)
        if short != path:
            return short
        return self.renames.old(path) if self.back else self.renames.new(path)


class _Renamer:
    def __init__(self, towers: list[_TowerNames], leaves: frozenset[str]) -> None:
        self._towers = towers
        self._leaves = leaves

    def __call__(self, path: str) -> str:
        if path in self._leaves:
            return path
        wrapper = _PEFT if path.startswith(_PEFT) else ""
        rest = path.removeprefix(wrapper)
        for tower in self._towers:
            if not tower.path or "." not in rest or _under(rest, tower.path):
                renamed = tower.convert(rest)
                if len(self._towers) == 1 and (found := tower.inside.fullmatch(tower.renames.new(renamed))):
                    # Versions also moved the backbone itself: CLIPVisionModel lost its `vision_model`.
                    start = found.start(1)
                    renamed = _join(tower.root.removesuffix("."), renamed[start:])
                if renamed != rest:
                    return wrapper + renamed
        return path


_RENAMERS: WeakKeyDictionary[Any, _Renamer] = WeakKeyDictionary()


def _other_names(model: nn.Module, names: list[str]) -> dict[str, str]:
    """What the other version calls a module, for those that it calls otherwise."""
    other: dict[str, str] = {}
    for tower in _towers(model):
        renames = tower.family.renames
        for name in names:
            if not tower.path or _under(name, tower.path):
                back = renames.old(name) if renames.new(name) == name else renames.new(name)
                if back != name:
                    other[name] = back
    return other
