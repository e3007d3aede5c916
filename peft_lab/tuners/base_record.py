"""Fingerprints of a model's modules, with or without adapters on them."""

from __future__ import annotations

from typing import Any

from torch import nn

from peft_lab.adapter_files import base_fingerprint
from peft_lab.backbones.experts import expert_parameter
from peft_lab.backbones.module_roles import module_locations
from peft_lab.tuners.layer import AdapterLayer
from peft_lab.tuners.operations import ExpertWeight


def layer_fingerprints(model: nn.Module, adapter_name: str) -> dict[str, dict[str, Any]]:
    """Fingerprint and location of each module that carries an adapter, by path.

    Weights on the meta device have none.
    """
    locations = module_locations(model)
    recorded = {}
    for name, layer in model.named_modules():
        adapted = isinstance(layer, AdapterLayer) and adapter_name in layer.configs
        if adapted and not layer.base_weight.is_meta:
            recorded[name] = {**layer.fingerprint(), **locations.get(name, {})}
    return recorded


def find_fingerprint(model: nn.Module, name: str) -> dict[str, Any] | None:
    """Fingerprint of a module's base weight, or of a stacked weight of experts, by its name.

    None if there is no such module or it has no weight, {} if the weight is on the meta device.
    """
    try:
        module = model.get_submodule(name)
    except AttributeError:
        found = expert_parameter(model, name)
        if found is None:
            return None
        module = ExpertWeight(found[0], name.rpartition(".")[2])
    if isinstance(module, AdapterLayer):
        return module.fingerprint()
    weight = base_fingerprint.reference_weight(module)
    if weight is None:
        return None
    return {} if weight.is_meta else base_fingerprint.module_fingerprint(module, weight)
