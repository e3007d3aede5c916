"""Matching of an adapter's modules with those of a model.

Transformers renames modules between versions, a model with a head has its backbone below a prefix, and query, key and
value are sometimes one layer and sometimes three. An adapter therefore records the role and block of each module
beside the fingerprint of its base weight. A module that is not found by name, nor by the names of other versions, is
found by role and block; the fingerprint then tells if it is the right one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peft_lab.adapter_files import base_fingerprint
from peft_lab.backbones import module_roles
from peft_lab.backbones.experts import expert_parameters
from peft_lab.backbones.names import PEFT_PREFIX, ends_with, unwrap
from peft_lab.backbones.quantized_weight import dense_weight, stored_weight
from peft_lab.errors import AdapterMismatchError

_QKV = ("attn.q", "attn.k", "attn.v")
_FUSED = "attn.qkv"


@dataclass(frozen=True)
class QKVSlice:
    """Rows of a fused projection, from `start` to `stop`.

    They belong to `module`, which is "" if it has no adapter.
    """

    module: str
    start: int
    stop: int


@dataclass
class ModuleMatch:
    """Modules of an adapter and their modules in a model.

    Attributes:
        same: module of the adapter -> module here.
        joined: module here -> the modules of the adapter that it holds one behind the other.
        split: module of the adapter -> the modules here that it held.
        missing: modules of the adapter that are nowhere here.
    """

    same: dict[str, str] = field(default_factory=dict)
    joined: dict[str, list[QKVSlice]] = field(default_factory=dict)
    split: dict[str, list[QKVSlice]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @property
    def modules(self) -> list[str]:
        """The modules here that will carry the adapter."""
        apart = [part.module for parts in self.split.values() for part in parts]
        return [*self.same.values(), *self.joined, *apart]

    @property
    def joined_modules(self) -> set[str]:
        """The modules of the adapter that are now in one layer.

        "" stands for rows without an adapter.
        """
        return {part.module for parts in self.joined.values() for part in parts}

    @property
    def changed(self) -> bool:
        """True if a module has another name here than in the adapter."""
        return bool(self.joined or self.split) or any(old != new for old, new in self.same.items())

    def records(self, model: nn.Module, recorded: Mapping[str, Any]) -> dict[str, Any]:
        """Return the record under the names here.

        Layers that were cut or joined, and so compared already, get a new one.
        """
        renamed = {self.same.get(name, name): entry for name, entry in recorded.items() if name not in self.split}
        kept = {name: entry for name, entry in renamed.items() if name not in self.joined_modules}
        same = set(self.same.values())
        fresh = [path for path in self.modules if path not in kept and path not in same]
        return {**kept, **record_modules(model, {path: stored_weight(base_layer(model, path)) for path in fresh})}

    def regex(self) -> str:
        """Return a regex for peft that finds exactly these modules."""
        return regex(self.modules)


def regex(modules: Iterable[str]) -> str:
    """Return a regex for peft that finds exactly some modules, by their paths."""
    return f"(?:{'|'.join(map(re.escape, modules))})"


def record_modules(model: nn.Module, weights: Mapping[str, Tensor | None]) -> dict[str, dict[str, Any]]:
    """Return fingerprint and location of adapted modules.

    They are saved with an adapter.
    """
    locations = module_roles.module_locations(model)
    found: dict[str, dict[str, Any]] = {}
    for name, weight in weights.items():
        # A weight on the meta device has no values to take a fingerprint of.
        if weight is not None and not weight.is_meta:
            owner = find_module(model, name) or model
            found[name] = {**base_fingerprint.module_fingerprint(owner, weight), **locations.get(name, {})}
    return found


def match_modules(model: nn.Module, recorded: Mapping[str, Mapping[str, Any]]) -> ModuleMatch:
    """Find the modules of an adapter in a model.

    By name, by the names of other versions, then by role and block.

    Args:
        model: the base, or a peft model on it.
        recorded: the result of `record_modules` when the adapter was saved.

    Raises:
        AdapterMismatchError: a fused projection does not hold the weights that the adapter was trained on.
    """
    model = unwrap(model)
    find, match = module_finder(model), ModuleMatch()
    left: dict[str, Mapping[str, Any]] = {}
    for name, entry in recorded.items():
        path = find(name)
        if path is None:
            left[name] = entry
        else:
            match.same[name] = path
    # Roles and blocks are read only where names do not tell.
    if left:
        _match_by_location(model, left, match)
    return match


def _match_by_location(model: nn.Module, left: Mapping[str, Mapping[str, Any]], match: ModuleMatch) -> None:
    """Find modules by role, block and number.

    Query, key and value may be one layer here or there.
    """
    locations = module_roles.module_locations(model)
    here = {(place["role"], place["layer"], place["nth"]): path for path, place in locations.items()}
    fused: dict[str, dict[str, tuple[str, Mapping[str, Any]]]] = {}
    for name, entry in left.items():
        role, layer, nth = (entry.get(key) for key in ("role", "layer", "nth"))
        apart = [here.get((part, layer, nth)) for part in _QKV]
        if (role, layer, nth) in here:
            match.same[name] = here[role, layer, nth]
        elif role in _QKV and (_FUSED, layer, nth) in here:
            fused.setdefault(here[_FUSED, layer, nth], {})[role] = (name, entry)
        elif role == _FUSED and None not in apart:
            match.split[name] = _slices_apart(model, name, entry, [str(path) for path in apart])
        else:
            match.missing.append(name)
    # The rows of each part depend on the others, so all parts are collected first.
    match.joined = {path: _slices_within(model, path, given) for path, given in fused.items()}


def module_finder(model: nn.Module) -> Callable[[str], str | None]:
    """Return a function from a module's recorded name to its own.

    It returns None if the model has no such module.
    """
    names = {name for name, _ in model.named_modules() if name} | {*expert_parameters(model)}
    rename, prefix = module_roles.renamer(model), getattr(model, "base_model_prefix", "")

    def find(name: str) -> str | None:
        # The last two: the model has a head around its backbone, or the adapter was trained on one that had.
        for path in (name, rename(name), f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
            if path in names:
                return path
        return None

    return find


def find_module(model: nn.Module, name: str) -> Any:
    """Return a module by its path; None if there is none."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def base_layer(model: nn.Module, path: str) -> Any:
    """Return a module without the adapter that it may carry already."""
    module: Any = model.get_submodule(path)
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def missing_modules(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return those module names, or ends of names, without a module."""
    missing = list(names)
    for path, _ in model.named_modules():
        missing = [name for name in missing if not path or not ends_with(path, name)]
    return missing


def is_saved_module(key: str, names: Iterable[str]) -> bool:
    """Test whether an entry belongs to a module saved in full."""
    path = key.removeprefix(PEFT_PREFIX)
    # peft names a saved module by the end of its path, so it may lie anywhere.
    return any(path.startswith(f"{name}.") or f".{name}." in path for name in names)


# Query, key and value in one layer or in three ----------------------------------------------------------------------


def _linear_weight(model: nn.Module, path: str) -> Tensor:
    """Return the base weight of a linear layer as (out, in)."""
    module = base_layer(model, path)
    weight = dense_weight(module)
    # GPT-2's Conv1D holds its weight as (in, out).
    return weight.T.contiguous() if type(module).__name__ == "Conv1D" else weight


def _slices_within(model: nn.Module, path: str, given: Mapping[str, tuple[str, Mapping[str, Any]]]) -> list[QKVSlice]:
    """Return the adapter's query, key and value rows in `path`."""
    weight = _linear_weight(model, path)
    rows = {role: int(entry["shape"][0]) for role, (_, entry) in given.items()}
    total = weight.shape[0]
    # Where only some have an adapter, the others share the remaining rows: query first, value last.
    rest = [role for role in _QKV if role not in rows]
    rows |= dict.fromkeys(rest, (total - sum(rows.values())) // max(len(rest), 1))
    parts, start = [], 0
    for role in _QKV:
        stop = start + rows[role]
        name, entry = given.get(role, ("", {}))
        if name and not _is_same(entry, weight[start:stop]):
            raise AdapterMismatchError(
                f'"{path}" holds query, key and value in one weight, and its rows {start} to {stop} are not those of '
                f'"{name}" that the adapter was trained on; load it with the transformers version it was trained with.'
            )
        parts.append(QKVSlice(name, start, stop))
        start = stop
    return parts


def _slices_apart(model: nn.Module, name: str, entry: Mapping[str, Any], paths: list[str]) -> list[QKVSlice]:
    """Return the rows of fused layer `name` in the layers `paths`."""
    weights = [_linear_weight(model, path) for path in paths]
    if not _is_same(entry, torch.cat([weight.detach() for weight in weights])):
        raise AdapterMismatchError(
            f'The adapter was trained on "{name}", which held query, key and value in one weight, but "{paths[0]}" and '
            "its neighbours do not hold the same rows; load it with the transformers version it was trained with."
        )
    parts, start = [], 0
    for path, weight in zip(paths, weights, strict=True):
        parts.append(QKVSlice(path, start, start + weight.shape[0]))
        start += weight.shape[0]
    return parts


def _is_same(entry: Mapping[str, Any], weight: Tensor) -> bool:
    """Test whether a record is of this weight, in any dtype."""
    shape = list(entry.get("shape", ()))
    # Recorded on a Conv1D, whose weight is transposed.
    if shape == list(weight.shape[::-1]) and shape != list(weight.shape):
        weight = weight.T.contiguous()
    return base_fingerprint.compare(entry, base_fingerprint.fingerprint(weight)) not in ("shape", "weights")


# The adapter's own weights ------------------------------------------------------------------------------------------


def check_fusable(match: ModuleMatch, method: str, parameters: Iterable[str], per_channel: Mapping[str, float]) -> None:
    """Refuse to cut or join parameters without an output channel.

    Raises:
        AdapterMismatchError: saying why.
    """
    if (match.joined or match.split) and not set(parameters) <= set(per_channel):
        here = next(iter(match.joined or match.split))
        raise AdapterMismatchError(
            f'An adapter of method "{method}" cannot move between "{here}", which holds query, key and value in one '
            "weight, and separate layers: its parameters belong to each weight as a whole. Load it with the "
            "transformers version it was trained with, and merge it or export it as LoRA there."
        )


def convert_state(
    state: Mapping[str, Tensor],
    match: ModuleMatch,
    locate: Callable[[str], tuple[str, str] | None],
    per_channel: Mapping[str, float],
    lora_scaling: Callable[[str], float] | None = None,
) -> dict[str, Tensor]:
    """Return an adapter's entries for the modules that were matched.

    Args:
        state: entries by name.
        match: the modules.
        locate: splits an entry's name into the adapter's module and the name of its parameter; None if it is of none.
        per_channel: parameters with one value per output channel, and the value that changes nothing.
        lora_scaling: module of the adapter -> scaling of its LoRA; None for other methods.
    """
    converted: dict[str, Tensor] = {}
    pieces: dict[str, dict[tuple[str, str], Tensor]] = {}
    joined = match.joined_modules
    for key, value in state.items():
        module, parameter = locate(key) or ("", "")
        wrapper = PEFT_PREFIX if key.startswith(PEFT_PREFIX) else ""
        if module in match.same:
            converted[f"{wrapper}{match.same[module]}.{parameter}"] = value
        elif module in match.split:
            for part in match.split[module]:
                # LoRA's A reads the input, which the three layers share.
                rows = value if parameter.startswith("lora_A") else value[part.start : part.stop]
                # safetensors refuses tensors that share memory, as slices of one tensor do.
                converted[f"{wrapper}{part.module}.{parameter}"] = rows.clone()
        elif module in joined:
            pieces.setdefault(module, {})[wrapper, parameter] = value
        else:
            converted[key] = value
    for path, parts in match.joined.items():
        given = [pieces.get(part.module, {}) for part in parts]
        for wrapper, parameter in dict.fromkeys(name for piece in given for name in piece):
            values = [piece.get((wrapper, parameter)) for piece in given]
            if lora_scaling is None:
                joined_value = _join_rows(values, parts, per_channel[parameter])
            else:
                ranks = [_lora_rank(piece, wrapper) for piece in given]
                joined_value = _join_lora(parameter, values, ranks, parts, lora_scaling)
            converted[f"{wrapper}{path}.{parameter}"] = joined_value
    return converted


def _join_rows(values: list[Tensor | None], parts: list[QKVSlice], neutral: float) -> Tensor:
    """Return the values of all rows of a fused layer.

    They are neutral where a part has no adapter.
    """
    like = next(value for value in values if value is not None)
    filled = []
    for value, part in zip(values, parts, strict=True):
        rows = part.stop - part.start
        filled.append(like.new_full((rows, *like.shape[1:]), neutral) if value is None else value)
    return torch.cat(filled)


def _lora_rank(piece: Mapping[tuple[str, str], Tensor], wrapper: str) -> int:
    """Rank of one part of a joined layer; 0 if the part has no adapter."""
    return len(piece[wrapper, "lora_A.weight"]) if piece else 0


def _join_lora(
    parameter: str,
    values: list[Tensor | None],
    ranks: list[int],
    parts: list[QKVSlice],
    scaling: Callable[[str], float],
) -> Tensor:
    """Return A of all parts stacked, or B as blocks.

    The updates are those of one LoRA of the summed rank.
    """
    if parameter == "lora_A.weight":
        return torch.cat([value for value in values if value is not None])
    like = next(value for value in values if value is not None)
    blocks = like.new_zeros((parts[-1].stop, sum(ranks)))
    start = 0
    for value, part, rank in zip(values, parts, ranks, strict=True):
        if value is not None:
            # The parts may differ in scaling, and the joined LoRA has only one.
            blocks[part.start : part.stop, start : start + rank] = value * scaling(part.module)
        start += rank
    return blocks
