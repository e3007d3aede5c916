"""Weighted sums of adapters, exact in the change of each module."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from peft_lab.errors import ConfigError, check_keys
from peft_lab.tuners.config import AdapterConfig
from peft_lab.tuners.dtypes import sum_dtype
from peft_lab.tuners.layer import AdapterLayer
from peft_lab.tuners.operations import operation
from peft_lab.tuners.saved_module import SavedModule

#: Arguments of peft's LoRA that are for its approximations, with the values that ask for none.
_UNUSED: dict[str, Any] = {
    **{"svd_rank": None, "svd_clamp": None, "svd_full_matrices": True, "svd_driver": None},
    **{"density": None, "majority_sign_method": "total"},
}


def add_weighted_adapter(
    tuner: Any,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
    options: Mapping[str, Any],
) -> None:
    """Add the weighted sum of adapters to a tuner's model; see `AdapterTuner.add_weighted_adapter`."""
    _check_arguments(tuner, adapters, weights, adapter_name, combination_type, options)
    modules = dict(tuner.model.named_modules())
    layers = {path: m for path, m in modules.items() if isinstance(m, AdapterLayer) and {*adapters} & {*m.configs}}
    heads = {
        path: m for path, m in modules.items() if isinstance(m, SavedModule) and {*adapters} & {*m.modules_to_save}
    }
    configs = [tuner.peft_config[name] for name in adapters]
    _check_alike(adapters, configs, layers)
    # All sums are known before anything is added, so that a refusal changes nothing.
    sums = {path: _layer_sum(layer, adapters, weights) for path, layer in layers.items()}
    head_sums = {path: _head_sum(path, head, adapters, weights) for path, head in heads.items()}
    config = copy.deepcopy(configs[0])
    saved: set[str] = set()
    for other in configs:
        saved.update(other.modules_to_save or ())
    config.modules_to_save = sorted(saved)
    tuner.peft_config[adapter_name] = config
    tuner.inject_adapter(tuner.model, adapter_name)
    for path, layer in layers.items():
        for name, value in sums[path].items():
            getattr(layer, name)[adapter_name] = nn.Parameter(value, requires_grad=False)
        for name in layer.other_param_names:
            if adapters[0] in getattr(layer, name):
                getattr(layer, name)[adapter_name] = getattr(layer, name)[adapters[0]]
    for path, head in heads.items():
        head.modules_to_save[adapter_name].load_state_dict(head_sums[path])


def _check_arguments(
    tuner: Any,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
    options: Mapping[str, Any],
) -> None:
    method = tuner.info.name
    if not tuner.tuner_layer_cls.linear:
        raise ConfigError(
            f'Method "{method}" has no weighted sum of adapters: the sum of their changes is no change that one '
            "adapter of it makes; keep the adapters apart and choose one by set_adapter."
        )
    if combination_type != "linear":
        raise ConfigError(
            f'Method "{method}" combines adapters by combination_type="linear", which is exact, and has no '
            f'"{combination_type}".'
        )
    for name in adapters:
        if name in tuner.peft_config and tuner.peft_config[name].trainable_token_indices is not None:
            raise ConfigError(
                f'Adapter "{name}" trains rows of the token embeddings, which replace the base\'s and have no weighted '
                "sum; keep the adapters apart and choose one by set_adapter."
            )
    check_keys(options, _UNUSED, "add_weighted_adapter")
    for name, value in options.items():
        if value != _UNUSED[name]:
            raise ConfigError(f'{name}={value!r} has no effect on the exact sum of method "{method}"; leave it out.')
    if isinstance(adapters, str) or not adapters or len(adapters) != len(weights):
        count = 1 if isinstance(adapters, str) else len(adapters)
        raise ConfigError(f"add_weighted_adapter got {count} adapters and {len(weights)} weights; give lists alike.")
    if not all(isinstance(weight, Real) and math.isfinite(weight) for weight in weights):
        raise ConfigError(f"weights={list(weights)} must be finite numbers.")
    tuner._check_known(adapters)
    if adapter_name in tuner.peft_config:
        raise ConfigError(f'Adapter with name "{adapter_name}" already exists; choose another name for the sum.')


def _check_alike(adapters: Sequence[str], configs: Sequence[Any], layers: Mapping[str, AdapterLayer]) -> None:
    """Check that adapters differ in their values alone.

    Raises:
        ConfigError: naming the setting or the module in which they differ.
    """
    common = {f.name for f in fields(AdapterConfig)}
    for name, config in zip(adapters, configs, strict=True):
        for f in fields(config):
            # How values started is of no matter for their sum.
            if f.name in common or f.name.startswith("init") or "seed" in f.name:
                continue
            first, other = getattr(configs[0], f.name), getattr(config, f.name)
            if first != other:
                raise ConfigError(
                    f'Adapters "{adapters[0]}" and "{name}" differ in {f.name} ({first!r} and {other!r}), so their '
                    "weighted sum is no adapter of either kind."
                )
        for path, layer in layers.items():
            if name not in layer.configs:
                raise ConfigError(
                    f'Adapter "{name}" does not adapt "{path}", as another one of {", ".join(adapters)} does; a '
                    "weighted sum needs adapters of the same modules."
                )
            _check_values(path, layer, adapters[0], name)


def _check_values(path: str, layer: AdapterLayer, first: str, name: str) -> None:
    """Check that two adapters have the same shapes and the same frozen values in a layer."""
    for part in (*layer.adapter_layer_names, *layer.other_param_names):
        values = getattr(layer, part)
        present = [values[adapter] for adapter in (first, name) if adapter in values]
        alike = not present or (len(present) == 2 and present[0].shape == present[1].shape)
        # Trained values may differ, frozen ones give them their meaning.
        if alike and present and part in layer.other_param_names:
            alike = torch.equal(*present)
        if not alike:
            raise ConfigError(
                f'Adapters "{first}" and "{name}" differ in the shape or the frozen values of {part} in "{path}"; a '
                "weighted sum needs adapters alike."
            )


def _layer_sum(layer: AdapterLayer, adapters: Sequence[str], weights: Sequence[float]) -> dict[str, Tensor]:
    """Values of the weighted sum in a layer, by parameter."""
    found = {}
    for name, start in layer.row_fields.items():
        values = getattr(layer, name)
        if adapters[0] in values:
            own = [values[adapter].detach() for adapter in adapters]
            found[name] = _weighted(torch.full_like(own[0], start), own, weights)
    return found


def _head_sum(path: str, head: SavedModule, adapters: Sequence[str], weights: Sequence[float]) -> dict[str, Tensor]:
    """Parameters of the weighted sum of a saved module.

    Raises:
        ConfigError: its output is not linear in its parameters.
    """
    base: Any = head.original_module
    try:
        operation(base, path)
        linear = next(base.buffers(), None) is None
    except ConfigError:
        linear = False
    if not linear:
        raise ConfigError(
            f'Module "{path}", which the adapters save, is a {type(base).__name__}: its output is not linear in its '
            "parameters, so it has no weighted sum."
        )
    # Adapters that do not save this module leave it as the base has it.
    saved = dict(head.modules_to_save.items())
    own = [saved.get(name, base) for name in adapters]
    states = [module.state_dict() for module in own]
    found = {}
    for key, start in base.state_dict().items():
        found[key] = _weighted(start, [state[key] for state in states], weights)
    return found


def _weighted(start: Tensor, values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Weighted sum of the distances from a start, added to it; in the start's dtype."""
    total = start.to(sum_dtype(start))
    for value, weight in zip(values, weights, strict=True):
        total = total + weight * (value.to(total.dtype) - start.to(total.dtype))
    return total.to(start.dtype)
