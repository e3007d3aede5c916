"""Adapters on models whose modules have other names than where they were trained.

Transformers renames modules between versions, a model with a head has its backbone below a prefix, and query, key and
value are sometimes one layer and sometimes three. An adapter therefore records the role and block of each module
beside the fingerprint of its base weight. A module that is not found by name, nor by the names of other versions, is
found by its place; the fingerprint then says whether it is the right one.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_lab.adapter_files import base_fingerprint, safe_files
from peft_lab.adapter_files.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE_RECORD, is_head_alone, write_json
from peft_lab.backbones import module_roles
from peft_lab.backbones.family import LINEAR
from peft_lab.errors import AdapterMismatchError

_LOG = logging.getLogger("peft_lab")
_WRAPPER = "base_model.model."
_PARTS = ("attn.q", "attn.k", "attn.v")
_FUSED = "attn.qkv"
#: Roles whose weights say which backbone it is.
_WEIGHTS = frozenset((*LINEAR, "linear"))
#: Parameters of peft's tuners with one value per output channel, and the value that changes nothing.
_PER_CHANNEL = {"ia3_l": 1.0}


@dataclass(frozen=True)
class Part:
    """Rows of a fused projection: those from `start` to `stop` belong to `module` ("" if it has no adapter)."""

    module: str
    start: int
    stop: int


@dataclass
class Fit:
    """Where the modules of an adapter are in a model.

    Attributes:
        same: module of the adapter -> module here.
        joined: module here -> the modules of the adapter that it holds one behind the other.
        split: module of the adapter -> the modules here that it held.
        missing: modules of the adapter that are nowhere here.
    """

    same: dict[str, str] = field(default_factory=dict)
    joined: dict[str, list[Part]] = field(default_factory=dict)
    split: dict[str, list[Part]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @property
    def modules(self) -> list[str]:
        """The modules here that will carry the adapter."""
        return [*self.same.values(), *self.joined, *(p.module for parts in self.split.values() for p in parts)]

    @property
    def changed(self) -> bool:
        """Whether anything is called otherwise than in the adapter."""
        return bool(self.joined or self.split) or any(old != new for old, new in self.same.items())

    def records(self, model: nn.Module, recorded: Mapping[str, Any]) -> dict[str, Any]:
        """The record under the names here; of layers that were cut or joined, and so compared already, a new one."""
        renamed = {self.same.get(name, name): entry for name, entry in recorded.items() if name not in self.split}
        gone = {part.module for parts in self.joined.values() for part in parts}
        kept = {name: entry for name, entry in renamed.items() if name not in gone}
        fresh = [path for path in self.modules if path not in kept and path not in self.same.values()]
        return {**kept, **record(model, {path: _weight_of(model, path) for path in fresh})}

    def regex(self) -> str:
        """A regex for peft that finds exactly these modules."""
        return f"(?:{'|'.join(map(re.escape, self.modules))})"


def record(model: nn.Module, modules: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Fingerprint and place of adapted modules (name -> base weight), as they are saved with an adapter."""
    places = module_roles.module_locations(model)
    return {
        name: {**base_fingerprint.module_fingerprint(_module(model, name) or model, weight), **places.get(name, {})}
        for name, weight in modules.items()
        if not weight.is_meta
    }


def fit(model: nn.Module, recorded: Mapping[str, Mapping[str, Any]]) -> Fit:
    """Find the modules of an adapter in a model: by name, by the names of other versions, then by role and block.

    Args:
        model: the base, or a peft model on it.
        recorded: what `record` said when the adapter was saved.

    Raises:
        AdapterMismatchError: a fused projection does not hold the weights that the adapter was trained on.
    """
    outer: Any = model
    model = outer.get_base_model() if hasattr(outer, "get_base_model") else model
    by_name, found = finder(model), Fit()
    left = []
    for name, entry in recorded.items():
        path = by_name(name)
        if path is None:
            left.append((name, entry))
        else:
            found.same[name] = path
    if left:
        here = {(p["role"], p["layer"], p["nth"]): path for path, p in module_roles.module_locations(model).items()}
        thirds: dict[str, dict[str, tuple[str, Mapping[str, Any]]]] = {}
        for name, entry in left:
            role, layer, nth = (entry.get(key) for key in ("role", "layer", "nth"))
            parts = [here.get((part, layer, nth)) for part in _PARTS]
            if (role, layer, nth) in here:
                found.same[name] = here[role, layer, nth]
            elif role in _PARTS and (_FUSED, layer, nth) in here:
                thirds.setdefault(here[_FUSED, layer, nth], {})[role] = (name, entry)
            elif role == _FUSED and None not in parts:
                found.split[name] = _split(model, name, entry, [str(part) for part in parts])
            else:
                found.missing.append(name)
        found.joined = {path: _join(model, path, given) for path, given in thirds.items()}
    return found


def finder(model: nn.Module) -> Callable[[str], str | None]:
    """A function that gives the model's own name of a module that may have another one in the adapter, else None."""
    names = {name for name, _ in model.named_modules() if name}
    rename, prefix = module_roles.renamer(model), getattr(model, "base_model_prefix", "")

    def find(name: str) -> str | None:
        for path in (name, rename(name), f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
            if path in names:
                return path
        return None

    return find


def _module(model: nn.Module, name: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


# Query, key and value in one layer or in three ----------------------------------------------------------------------


def _weight_of(model: nn.Module, path: str) -> Tensor:
    """Base weight of a module, whether or not it carries an adapter already."""
    module: Any = model.get_submodule(path)
    return (module.get_base_layer() if hasattr(module, "get_base_layer") else module).weight


def _weight(model: nn.Module, path: str) -> Tensor:
    """Base weight of a linear layer as (out, in)."""
    module: Any = model.get_submodule(path)
    module = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    return module.weight.T.contiguous() if type(module).__name__ == "Conv1D" else module.weight


def _join(model: nn.Module, path: str, given: Mapping[str, tuple[str, Mapping[str, Any]]]) -> list[Part]:
    """Which rows of the fused layer `path` are those of the adapter's own query, key and value."""
    weight = _weight(model, path)
    rows = {role: int(entry["shape"][0]) for role, (_, entry) in given.items()}
    total = weight.shape[0]
    # Where only some have an adapter, the others share what is left: query first, value last.
    rest = [role for role in _PARTS if role not in rows]
    rows |= dict.fromkeys(rest, (total - sum(rows.values())) // max(len(rest), 1))
    parts, start = [], 0
    for role in _PARTS:
        stop = start + rows[role]
        name, entry = given.get(role, ("", {}))
        if name and not _is_same(entry, weight[start:stop]):
            raise AdapterMismatchError(
                f'"{path}" holds query, key and value in one weight, and its rows {start} to {stop} are not those of '
                f'"{name}" that the adapter was trained on; load it with the transformers version it was trained with.'
            )
        parts.append(Part(name, start, stop))
        start = stop
    return parts


def _split(model: nn.Module, name: str, entry: Mapping[str, Any], paths: list[str]) -> list[Part]:
    """Which rows of the adapter's fused layer `name` are now the layers `paths`."""
    weights = [_weight(model, path) for path in paths]
    if not _is_same(entry, torch.cat([weight.detach() for weight in weights])):
        raise AdapterMismatchError(
            f'The adapter was trained on "{name}", which held query, key and value in one weight, but "{paths[0]}" and '
            "its neighbours do not hold the same rows; load it with the transformers version it was trained with."
        )
    ends = [sum(w.shape[0] for w in weights[: i + 1]) for i in range(len(weights))]
    return [Part(p, end - w.shape[0], end) for p, w, end in zip(paths, weights, ends, strict=True)]


def _is_same(entry: Mapping[str, Any], weight: Tensor) -> bool:
    shape = list(entry.get("shape", ()))
    if shape == list(weight.shape[::-1]) and shape != list(weight.shape):  # recorded on a transposed Conv1D
        weight = weight.T.contiguous()
    return base_fingerprint.compare(entry, base_fingerprint.fingerprint(weight)) in ("same", "dtype")


# The adapter's own weights ------------------------------------------------------------------------------------------


def check_fusable(found: Fit, method: str, parameters: Any, per_channel: Mapping[str, float]) -> None:
    """Refuse to cut or join adapters of a method whose parameters do not go by output channel.

    Raises:
        AdapterMismatchError: saying why.
    """
    if (found.joined or found.split) and not set(parameters) <= set(per_channel):
        here = next(iter(found.joined or found.split))
        raise AdapterMismatchError(
            f'An adapter of method "{method}" cannot move between "{here}", which holds query, key and value in one '
            "weight, and separate layers: its parameters belong to each weight as a whole. Load it with the "
            "transformers version it was trained with, and merge it or export it as LoRA there."
        )


def adapt_state(
    state: Mapping[str, Tensor],
    found: Fit,
    locate: Callable[[str], tuple[str, str] | None],
    per_channel: Mapping[str, float],
    lora: Callable[[str], float] | None = None,
) -> dict[str, Tensor]:
    """The entries of an adapter file for the modules that `fit` found.

    Args:
        state: entries by name.
        found: the modules.
        locate: splits an entry's name into the adapter's module and what follows it; None if it is no module's.
        per_channel: parameters with one value per output channel, and the value that changes nothing.
        lora: module of the adapter -> scaling of its LoRA; None for other methods.
    """
    adapted: dict[str, Tensor] = {}
    pieces: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        module, tail = locate(key) or ("", "")
        wrapper = _WRAPPER if key.startswith(_WRAPPER) else ""
        if module in found.same:
            adapted[f"{wrapper}{found.same[module]}.{tail}"] = value
        elif module in found.split:
            for part in found.split[module]:
                whole = tail.startswith("lora_A")
                rows = value if whole else value[part.start : part.stop]
                adapted[f"{wrapper}{part.module}.{tail}"] = rows.clone()
        elif any(module == part.module for parts in found.joined.values() for part in parts):
            pieces.setdefault(module, {})[f"{wrapper}|{tail}"] = value
        else:
            adapted[key] = value
    for path, parts in found.joined.items():
        given = [pieces.get(part.module, {}) for part in parts]
        for name in dict.fromkeys(name for piece in given for name in piece):
            wrapper, _, tail = name.partition("|")
            values = [piece.get(name) for piece in given]
            if lora is not None:
                joined = _join_lora(tail, values, given, parts, lora, wrapper)
            else:
                joined = _join_rows(values, parts, per_channel[tail])
            adapted[f"{wrapper}{path}.{tail}"] = joined
    return adapted


def _join_rows(values: list[Tensor | None], parts: list[Part], neutral: float) -> Tensor:
    like = next(v for v in values if v is not None)
    filled = [
        like.new_full((p.stop - p.start, *like.shape[1:]), neutral) if v is None else v
        for v, p in zip(values, parts, strict=True)
    ]
    return torch.cat(filled)


def _join_lora(
    tail: str,
    values: list[Tensor | None],
    given: list[dict[str, Tensor]],
    parts: list[Part],
    scaling: Callable[[str], float],
    wrapper: str,
) -> Tensor:
    """A of all parts one below the other, B as blocks: the same three updates as one of the summed rank."""
    if tail == "lora_A.weight":
        return torch.cat([value for value in values if value is not None])
    ranks = [piece[f"{wrapper}|lora_A.weight"].shape[0] if piece else 0 for piece in given]
    like = next(v for v in values if v is not None)
    blocks = like.new_zeros((parts[-1].stop, sum(ranks)))
    start = 0
    for value, part, rank in zip(values, parts, ranks, strict=True):
        if value is not None:
            blocks[part.start : part.stop, start : start + rank] = value * scaling(part.module)
        start += rank
    return blocks


# Folders of peft's own tuners ---------------------------------------------------------------------------------------


def write_record(model: Any, folder: Path) -> None:
    """Write which base weights an adapter of peft's own tuners belongs to; ours hold that in their config."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not hasattr(model, "peft_config") or any(hasattr(c, "fingerprints") for c in model.peft_config.values()):
        return
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = {name: module for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)}
    weights = {name: getattr(layer.get_base_layer(), "weight", None) for name, layer in layers.items()}
    if any(is_head_alone(config.to_dict()) for config in model.peft_config.values()):
        # A head saved alone belongs to every weight that its features come from.
        places = [n for n, place in module_roles.module_locations(base).items() if place["role"] in _WEIGHTS]
        weights |= {name: getattr(base.get_submodule(name), "weight", None) for name in places}
    kept = {name: weight for name, weight in weights.items() if isinstance(weight, Tensor)}
    write_json(folder / BASE_RECORD, {"modules": record(base, kept)})


def read_record(folder: Path) -> dict[str, dict[str, Any]]:
    """What `write_record` wrote into an adapter's folder; {} if there is nothing.

    Raises:
        ConfigError: the file is not one of these.
    """
    values = safe_files.read_json(folder / BASE_RECORD).get("modules", {})
    safe_files.check_fingerprints(values, f'"{folder / BASE_RECORD}"')
    return values


def check_record(model: nn.Module, folder: Path) -> None:
    """Compare the base that a folder of peft's own tuners records with the weights of `model`.

    Raises:
        AdapterMismatchError: they differ, and `fingerprint.any_base` does not allow it.
    """
    recorded = read_record(folder)
    here = {name: base_fingerprint.module_fingerprint(m, m.weight) for name in recorded if (m := _module(model, name))}
    base_fingerprint.check(recorded, here, dtype_bound=False)


def adapt_folder(folder: str | Path, model: nn.Module, out: str | Path) -> Path:
    """Rewrite an adapter of peft's own tuners for the module names of `model`.

    Args:
        folder: a folder that peft wrote, with or without the record of its base.
        model: the base without an adapter.
        out: folder for the rewritten adapter; it is left alone if every name fits already.

    Returns:
        `out`, or `folder` if there was nothing to rewrite. `PeftModel.from_pretrained(model, ...)` loads either.

    Raises:
        ConfigError: a file is not what it should be.
        AdapterMismatchError: the adapter cannot be expressed on this model's modules.
    """
    from safetensors.torch import load_file, save_file

    folder, out = Path(folder), Path(out)
    safe_files.check_folder(folder)
    safe_files.read_header(folder / ADAPTER_WEIGHTS)
    values, recorded = safe_files.read_json(folder / ADAPTER_CONFIG), read_record(folder)
    found = fit(model, recorded)
    state = load_file(folder / ADAPTER_WEIGHTS)
    places = _Keys(model, found)
    for key in state:
        places(key)
    saved = values.get("modules_to_save") or []
    absent = missing_modules(model, saved)
    lost = {key for key in state if is_head(key, absent)}
    if not found.changed and not lost:
        return folder
    if lost:
        _LOG.warning('The head of "%s" (%d entries) has no place in %s.', folder, len(lost), type(model).__name__)
    lora = values.get("peft_type") == "LORA"
    tails = {split[1] for key in state if (split := places(key)) and not is_head(key, saved)}
    per_channel = dict.fromkeys(("lora_A.weight", "lora_B.weight"), 0.0) if lora else _PER_CHANNEL
    check_fusable(found, str(values.get("peft_type")).lower(), tails, per_channel)
    scaling = _LoraScaling(values)
    kept = {key: value for key, value in state.items() if key not in lost}
    adapted = adapt_state(kept, found, places, _PER_CHANNEL, scaling if lora else None)
    out.mkdir(parents=True, exist_ok=True)
    save_file(adapted, out / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    write_json(out / ADAPTER_CONFIG, _adapt_config(values, found, adapted, scaling, model))
    if recorded:
        write_json(out / BASE_RECORD, {"modules": found.records(model, recorded)})
    return out


class _Keys:
    """Splits the names of an adapter file's entries; what the record does not name is looked for in the model."""

    def __init__(self, model: nn.Module, found: Fit) -> None:
        self.found, self.find = found, finder(model)
        self.known = {*found.same, *found.split, *(p.module for parts in found.joined.values() for p in parts)} - {""}

    def __call__(self, key: str) -> tuple[str, str] | None:
        steps = key.removeprefix(_WRAPPER).split(".")
        for end in range(len(steps) - 1, 0, -1):
            module, tail = ".".join(steps[:end]), ".".join(steps[end:])
            if module not in self.known:
                path = self.find(module)
                if path is None:
                    continue
                self.found.same[module] = path
                self.known.add(module)
            return module, tail
        return None


def missing_modules(model: nn.Module, names: list[str]) -> list[str]:
    """Those names of modules, or ends of names, that the model has no module of."""
    there = [name for name, _ in model.named_modules() if name]
    return [end for end in names if not any(name == end or name.endswith(f".{end}") for name in there)]


def is_head(key: str, saved: list[str]) -> bool:
    """Whether an entry of an adapter file belongs to one of these modules saved in full."""
    path = key.removeprefix(_WRAPPER)
    return any(path.startswith(f"{name}.") or f".{name}." in path for name in saved)


class _LoraScaling:
    """What peft multiplies a module's LoRA by: alpha / r, with the exceptions that a config makes by pattern."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def __call__(self, module: str) -> float:
        rank, alpha = self.of(module)
        return alpha / (math.sqrt(rank) if self.values.get("use_rslora") else rank)

    def of(self, module: str) -> tuple[int, float]:
        """Rank and alpha of a module."""
        rank, alpha = self.values.get("r", 8), self.values.get("lora_alpha", 8)
        return _by_pattern(self.values.get("rank_pattern"), module, rank), _by_pattern(
            self.values.get("alpha_pattern"), module, alpha
        )


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _adapt_config(
    values: dict[str, Any], found: Fit, state: Mapping[str, Tensor], scaling: _LoraScaling, model: nn.Module
) -> dict[str, Any]:
    heads = values.get("modules_to_save") or []
    absent = missing_modules(model, heads)
    kept = [head for head in heads if head not in absent]
    if is_head_alone(values):
        return {**values, "modules_to_save": kept or None}
    modules = {path for path in found.modules if not any(path == h or path.endswith(f".{h}") for h in kept)}
    old = {new: name for name, new in found.same.items()}
    adapted = {**values, "target_modules": f"(?:{'|'.join(map(re.escape, sorted(modules)))})"}
    adapted["modules_to_save"] = kept or None
    for name in ("layers_to_transform", "layers_pattern", "exclude_modules"):
        if name in adapted:
            adapted[name] = None
    if adapted.get("feedforward_modules"):
        ahead = [m for m in modules if m in old and _targets(values["feedforward_modules"], old[m])]
        adapted["feedforward_modules"] = f"(?:{'|'.join(map(re.escape, sorted(ahead)))})" if ahead else []
    for name in ("rank_pattern", "alpha_pattern"):
        if values.get(name):
            default = object()
            pairs = {m: _by_pattern(values[name], old[m], default) for m in modules if m in old}
            adapted[name] = {m: value for m, value in pairs.items() if value is not default}
    if values.get("peft_type") == "LORA":
        for name, parts in found.split.items():
            rank, alpha = scaling.of(name)
            for part in parts:
                adapted.setdefault("rank_pattern", {})[part.module] = rank
                adapted.setdefault("alpha_pattern", {})[part.module] = alpha
        for path in found.joined:
            rank = state[f"{_WRAPPER}{path}.lora_A.weight"].shape[0]
            # The scaling of each part is in its block already.
            adapted.setdefault("rank_pattern", {})[path] = rank
            adapted.setdefault("alpha_pattern", {})[path] = math.sqrt(rank) if values.get("use_rslora") else rank
    return adapted


def _targets(wanted: Any, module: str) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in wanted)
