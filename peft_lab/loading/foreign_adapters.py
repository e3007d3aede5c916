"""Adapters of peft's own tuners: base record and renamed folders.

An adapter of ours holds that record in its config, and its tuner finds the modules by itself.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_lab.adapter_files import base_fingerprint
from peft_lab.adapter_files.module_matching import (
    ModuleMatch,
    check_fusable,
    convert_state,
    find_module,
    is_saved_module,
    match_modules,
    missing_modules,
    module_finder,
    record_modules,
)
from peft_lab.adapter_files.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE_RECORD, is_head_alone, write_json
from peft_lab.backbones import module_roles
from peft_lab.backbones.experts import expert_parameter, expert_parameters
from peft_lab.backbones.family import LINEAR
from peft_lab.backbones.names import PEFT_PREFIX, ends_with, unwrap
from peft_lab.backbones.quantized_weight import stored_weight
from peft_lab.backbones.sharded_weights import holds_shards
from peft_lab.loading.adapter_folder import AdapterFolder
from peft_lab.loading.config_files import parameter_prefix
from peft_lab.tuners.expert_layer import adapted_parameters

_LOG = logging.getLogger("peft_lab")
#: Roles whose weights tell which backbone it is.
_WEIGHT_ROLES = frozenset((*LINEAR, "linear"))
#: Parameters of peft's tuners with one value per output channel, and the value that changes nothing.
_PER_CHANNEL = {"ia3_l": 1.0}


# The record of the base ---------------------------------------------------------------------------------------------


def write_record(model: Any, folder: Path, writes: bool = True) -> None:
    """Write the record of the base of a peft adapter.

    An adapter of ours holds it in its config. All processes that share a sharded model call this together, and one of
    them `writes`.
    """
    if not hasattr(model, "peft_config") or any(hasattr(c, "fingerprints") for c in model.peft_config.values()):
        return
    if not writes and not holds_shards(model):
        return
    base = unwrap(model)
    layers = {name: module for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)}
    weights = {name: stored_weight(layer.get_base_layer()) for name, layer in layers.items()}
    stacked = expert_parameters(base)
    weights |= {path: weight for path, weight in adapted_parameters(base).items() if path in stacked}
    if any(is_head_alone(config.to_dict()) for config in model.peft_config.values()):
        # A head saved alone belongs to every weight that its features come from.
        for name, location in module_roles.module_locations(base).items():
            if location["role"] in _WEIGHT_ROLES:
                weights[name] = stored_weight(base.get_submodule(name))
    recorded = record_modules(base, weights)
    if writes:
        write_json(folder / BASE_RECORD, {"modules": recorded})


def check_record(model: nn.Module, recorded: Mapping[str, Mapping[str, Any]]) -> None:
    """Compare a recorded base with the weights of `model`.

    Raises:
        AdapterMismatchError: they differ, and `base_fingerprint.any_base` does not allow it.
    """
    found = {}
    for name in recorded:
        module = find_module(model, name)
        place = expert_parameter(model, name) if module is None else (module, stored_weight(module))
        holder, weight = place or (None, None)
        if holder is not None and weight is not None:
            found[name] = base_fingerprint.module_fingerprint(holder, weight)
    base_fingerprint.check(recorded, found, dtype_bound=False)


# Folders under other module names -----------------------------------------------------------------------------------


def adapt_folder(folder: AdapterFolder, model: nn.Module, out: Path) -> AdapterFolder:
    """Rewrite a peft adapter for the module names of `model`.

    The new config has no regexes of modules.

    Args:
        folder: a folder that peft wrote, with or without the record of its base.
        model: the base without an adapter.
        out: folder for the rewritten adapter; it is left alone if every name fits already.

    Returns:
        `out`, or `folder` if it stays as it is. `PeftModel.from_pretrained(model, ...)` loads either.

    Raises:
        ConfigError: a file is not what it should be.
        AdapterMismatchError: the adapter cannot be expressed on this model's modules.
    """
    values, header = folder.plain_values, folder.header
    match = match_modules(model, folder.record)
    locate = _EntryNames(model, match, parameter_prefix(values))
    # Modules that the record does not name are found by the names of the entries.
    located = {key: locate(key) for key in header}
    saved = values.get("modules_to_save") or []
    absent = missing_modules(model, saved)
    lost = {key for key in header if is_saved_module(key, absent)}
    if not match.changed and not lost and values == folder.values:
        return folder
    if lost:
        name = type(model).__name__
        _LOG.warning('The head of "%s" (%d entries) has no place in %s.', folder.path, len(lost), name)
    is_lora = values.get("peft_type") == "LORA"
    parameters = {found[1] for key, found in located.items() if found and not is_saved_module(key, saved)}
    # Only plain LoRA can be cut and joined: the magnitudes of DoRA are missing here, so it is refused.
    per_channel = dict.fromkeys(("lora_A.weight", "lora_B.weight"), 0.0) if is_lora else _PER_CHANNEL
    check_fusable(match, str(values.get("peft_type")).lower(), parameters, per_channel)
    scaling = _LoraScaling(values)
    kept = {key: value for key, value in load_file(folder.weights).items() if key not in lost}
    state = convert_state(kept, match, locate, _PER_CHANNEL, scaling if is_lora else None)
    out.mkdir(parents=True, exist_ok=True)
    # peft marks its own files with the same metadata.
    save_file(state, out / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    write_json(out / ADAPTER_CONFIG, _adapt_config(values, match, state, scaling, model))
    if folder.record:
        write_json(out / BASE_RECORD, {"modules": match.records(model, folder.record)})
    return AdapterFolder(out)


class _EntryNames:
    """Splitter of entry names into module and parameter.

    Modules that the record does not name are looked for in the model, and added to the match.
    """

    def __init__(self, model: nn.Module, match: ModuleMatch, prefix: str) -> None:
        self._match, self._find, self._prefix = match, module_finder(model), prefix
        self._known = {*match.same, *match.split, *match.joined_modules} - {""}

    def __call__(self, key: str) -> tuple[str, str] | None:
        name = key.removeprefix(PEFT_PREFIX)
        module, mark, parameter = name.rpartition(f".{self._prefix}") if self._prefix else ("", "", "")
        if mark:
            # LoRA's layers of several parameters of one module lie inside of each other.
            place = module.removesuffix(".base_layer")
            while place.endswith(".base_layer"):
                place = place.removesuffix(".base_layer")
            inner = f"{module}.".removeprefix(f"{place}.")
            return (place, inner + self._prefix + parameter) if self._is_known(place) else None
        # An entry of a module that was saved in full.
        steps = name.split(".")
        # The longest path that is a module owns the entry.
        for end in range(len(steps) - 1, 0, -1):
            module = ".".join(steps[:end])
            if self._is_known(module):
                return module, ".".join(steps[end:])
        return None

    def _is_known(self, module: str) -> bool:
        """Test whether the match has a module.

        If not, the model is searched for it.
        """
        if module not in self._known:
            path = self._find(module)
            if path is None:
                return False
            self._match.same[module] = path
            self._known.add(module)
        return True


class _LoraScaling:
    """Scaling of a module's LoRA in peft: alpha / r.

    A config makes exceptions by pattern.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def __call__(self, module: str) -> float:
        rank, alpha = self.rank_and_alpha(module)
        return alpha / (math.sqrt(rank) if self._values.get("use_rslora") else rank)

    def rank_and_alpha(self, module: str) -> tuple[int, float]:
        """Return rank and alpha of a module."""
        # A file may leave out values, and peft then takes 8 for both.
        rank = _by_pattern(self._values.get("rank_pattern"), module, self._values.get("r", 8))
        alpha = _by_pattern(self._values.get("alpha_pattern"), module, self._values.get("lora_alpha", 8))
        return rank, alpha


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        # peft matches its keys in exactly this way, and takes the first that fits.
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _adapt_config(
    values: dict[str, Any], match: ModuleMatch, state: Mapping[str, Tensor], scaling: _LoraScaling, model: nn.Module
) -> dict[str, Any]:
    """Return the values of the config for the modules of the match."""
    heads = values.get("modules_to_save") or []
    absent = missing_modules(model, heads)
    kept = [head for head in heads if head not in absent]
    # peft must still find its mark in `target_modules`.
    if is_head_alone(values):
        return {**values, "modules_to_save": kept or None}
    # Stacked weights of experts are parameters, and the modules around them no targets.
    stacked = expert_parameters(model)
    holders = {path.rpartition(".")[0] for path in stacked}
    chosen = {path for path in match.modules if not _is_one_of(path, kept)}
    modules = sorted(chosen - {*stacked} - holders)
    old = {new: name for name, new in match.same.items()}
    adapted = {**values, "target_modules": modules, "modules_to_save": kept or None}
    if chosen & {*stacked}:
        adapted["target_parameters"] = sorted(chosen & {*stacked})
    # With the exact names of all modules, these have nothing left to choose.
    for name in ("layers_to_transform", "layers_pattern", "exclude_modules"):
        if name in adapted:
            adapted[name] = None
    if adapted.get("feedforward_modules"):
        adapted["feedforward_modules"] = [
            m for m in modules if m in old and _is_one_of(old[m], values["feedforward_modules"])
        ]
    # The patterns were written for the old names, which the new ones need not match.
    for name in ("rank_pattern", "alpha_pattern"):
        if values.get(name):
            found = {module: _by_pattern(values[name], old[module], None) for module in modules if module in old}
            adapted[name] = {module: value for module, value in found.items() if value is not None}
    if values.get("peft_type") == "LORA":
        _keep_scalings(adapted, match, state, scaling)
    return adapted


def _keep_scalings(
    adapted: dict[str, Any], match: ModuleMatch, state: Mapping[str, Tensor], scaling: _LoraScaling
) -> None:
    """Set rank and alpha of the modules that were cut or joined."""
    ranks, alphas = dict(adapted.get("rank_pattern") or {}), dict(adapted.get("alpha_pattern") or {})
    for name, parts in match.split.items():
        for part in parts:
            ranks[part.module], alphas[part.module] = scaling.rank_and_alpha(name)
    for path in match.joined:
        # The scaling of each part is in its block of B already.
        ranks[path] = rank = state[f"{PEFT_PREFIX}{path}.lora_A.weight"].shape[0]
        alphas[path] = math.sqrt(rank) if adapted.get("use_rslora") else rank
    if match.split or match.joined:
        adapted["rank_pattern"], adapted["alpha_pattern"] = ranks, alphas


def _is_one_of(module: str, names: list[str]) -> bool:
    return any(ends_with(module, name) for name in names)
