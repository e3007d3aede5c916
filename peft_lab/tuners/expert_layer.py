"""Adapters on the stacked weights of experts, which no module of their own holds.

Transformers 5 keeps the weights of all experts of a block as one parameter (experts, out, in), and reads it inside of
the experts' forward. So an adapter changes the weight that one call reads: it is the merged weight, made anew for each
call and differentiable. Every method with `folded` (a weight method by its `delta_weight`) can therefore adapt experts.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from peft_lab.backbones import module_roles
from peft_lab.backbones.experts import find_expert_parameters, left_out
from peft_lab.errors import ConfigError
from peft_lab.registry import MethodInfo
from peft_lab.tuners.mixed_batch import BASE, current_row_adapters
from peft_lab.tuners.operations import ExpertWeight, StandIn

_LOG = logging.getLogger("peft_lab")
_NESTED = re.compile(r"(\.base_layer)+$")


class ExpertsLayer(StandIn):
    """Experts module with adapter layers on some of its stacked weights.

    Each layer is a child under the name of its parameter, so its path is that of the parameter.
    """

    def __init__(self, base_layer: nn.Module, path: str) -> None:
        super().__init__()
        # What accelerate puts around a forward is taken over in each call; anything else would run without adapters.
        if "forward" in vars(base_layer) and "_old_forward" not in vars(base_layer):
            raise ConfigError(
                f'The forward of the experts "{path}" was replaced on the module itself, so an adapter would have no '
                "effect; put the adapter on before that."
            )
        self.base_layer: Any = base_layer

    def adapter_layers(self) -> dict[str, Any]:
        """Return the layers by the name of their parameter."""
        return {name: child for name, child in self._modules.items() if name != "base_layer"}

    def add_adapter_layer(self, parameter: str, layer: Any) -> None:
        """Put a layer on a parameter."""
        # Not by `add_module`, which refuses the name because the base has a parameter of that name.
        self._modules[parameter] = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Output of the experts with the active adapters in their weights."""
        if "base_layer" in self.base_layer._modules:
            raise ConfigError(
                f"{type(self.base_layer.base_layer).__name__} carries adapters of two methods; remove one of them."
            )
        # The weights belong to this call alone, so a copy of the module reads them: threads share the module itself.
        cls: Any = type(self.base_layer)
        call: Any = cls.__new__(cls)
        vars(call).update(vars(self.base_layer))
        for name, layer in self.adapter_layers().items():
            vars(call)[name] = current_weight(layer)
        hooked = vars(call).get("_old_forward")
        if hooked is not None:
            # accelerate binds the forward that it wraps to the module.
            vars(call)["_old_forward"] = MethodType(type(call).forward, call)
            vars(call)["forward"] = partial(vars(call)["forward"].func, call)
        return call(*args, **kwargs)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the experts module, with the adapters in its weights if `merge`; peft calls this."""
        for layer in self.adapter_layers().values():
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        experts: nn.Module = self.base_layer
        return experts


def current_weight(layer: Any) -> Tensor:
    """Weight of the running call, (experts, ., .) in the dtype of the base.

    It is rounded to that dtype once, as a merged weight is.

    Raises:
        ConfigError: the rows of the batch have different adapters.
    """
    base = layer.base_layer
    if layer.disable_adapters and layer.merged:
        layer.unmerge()
    names = [] if layer.disable_adapters else _acting(layer)
    weight: Tensor = base.weight
    if not names:
        return weight
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    for name in names:
        wide, _ = layer.folded(name, wide, None)
    return wide.to(weight.dtype)


def _acting(layer: Any) -> Sequence[str]:
    """Names of the adapters that act on all rows of the running call."""
    rows = current_row_adapters()
    if rows is None:
        return [name for name in layer.active_adapters if name in layer.configs and name not in layer.merged_adapters]
    if len(rows.names) > 1 and any(name in layer.configs for name in rows.names):
        raise ConfigError(
            f"The rows of this batch have different adapters ({', '.join(rows.names)}), but all rows share the weights "
            "of the experts; run each adapter's rows by themselves."
        )
    if layer.merged:
        raise ValueError("Rows cannot have adapters of their own while adapters are merged; call unmerge_adapter.")
    return [name for name in rows.names if name != BASE and name in layer.configs]


def add_to_experts(tuner: Any, config: Any, model: nn.Module, adapter_name: str) -> list[str]:
    """Put an adapter on the stacked weights that its config names.

    Returns:
        Their paths.

    Raises:
        ConfigError: there is no such weight, or it carries an adapter of another method.
    """
    paths = find_expert_parameters(model, config.target_parameters)
    blocks = config.layers_to_transform
    if blocks is not None and not config.fingerprints:
        chosen = {blocks} if isinstance(blocks, int) else {*blocks}
        paths = [path for path in paths if module_roles.layer_index(model, path) in chosen]
    for path in paths:
        around, _, parameter = path.rpartition(".")
        layer = _layer_on(tuner, model, around, parameter)
        layer.update_layer(adapter_name, config)
        # A second adapter is added inactive, as peft does, and must not be trained meanwhile.
        if adapter_name not in tuner.active_adapters:
            layer.requires_grad_(False)
    return paths


def _layer_on(tuner: Any, model: nn.Module, around: str, parameter: str) -> Any:
    """Return the layer of a stacked weight, which is made if there is none."""
    experts: Any = model.get_submodule(around)
    if isinstance(experts, BaseTunerLayer):
        raise ConfigError(f'Module "{around}" already carries {type(experts).__name__}; remove that one first.')
    if not isinstance(experts, ExpertsLayer):
        parent, _, name = around.rpartition(".")
        experts = ExpertsLayer(experts, around)
        setattr(model.get_submodule(parent), name, experts)
    layer = experts.adapter_layers().get(parameter)
    if layer is None:
        layer = tuner.new_layer(ExpertWeight(experts.base_layer, parameter), f"{around}.{parameter}")
        experts.add_adapter_layer(parameter, layer)
    elif not isinstance(layer, tuner.tuner_layer_cls):
        raise ConfigError(f'"{around}.{parameter}" already carries {type(layer).__name__}; remove that one first.')
    return layer


def adapted_parameters(model: nn.Module, adapter: str | None = None) -> dict[str, Tensor]:
    """Return the weights named in `target_parameters` that carry an adapter, by path.

    Those of peft's LoRA are among them. None for `adapter` means any.
    """
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        layers = module.adapter_layers() if isinstance(module, ExpertsLayer) else {}
        for name, layer in layers.items():
            if adapter is None or adapter in layer.configs:
                found[f"{path}.{name}"] = layer.base_weight
        # LoRA's layers of several weights of one module lie inside of each other.
        own: Any = module if isinstance(module, BaseTunerLayer) and hasattr(module, "parameter_name") else None
        if own is not None and (adapter is None or adapter in own._all_available_adapter_names()):
            found[f"{_NESTED.sub('', path)}.{own.parameter_name}"] = own.get_param()
    return found


def tell_left_out(model: nn.Module, info: MethodInfo, adapter: str) -> None:
    """Warn of the share of the model that is experts without an adapter."""
    sentence = left_out(model, adapted_parameters(model, adapter))
    if sentence and info.can("experts"):
        _LOG.warning("%s; name them in target_parameters to adapt them too.", sentence)
    elif sentence:
        _LOG.warning('%s; method "%s" cannot adapt them.', sentence, info.name)
