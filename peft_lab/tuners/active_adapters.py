"""Active and trainable adapters of a layer or of a saved module.

peft sets `requires_grad` anew whenever adapters are enabled or deleted; here it comes back as it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


class KeepsTrainability:
    """Mixin for peft's layers and wrappers that restores `requires_grad` after disabling.

    Attributes:
        trained_before: `requires_grad` of each adapter parameter by name, as it was before the adapters were disabled.
    """

    adapter_layer_names: tuple[str, ...]
    _disable_adapters: bool
    trained_before: dict[str, bool] | None = None

    def _named_values(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters of all adapters as "<container>.<adapter>[.<parameter>]"."""
        for container in self.adapter_layer_names:
            for name, parameter in getattr(self, container).named_parameters():
                yield f"{container}.{name}", parameter

    def enable_adapters(self, enabled: bool) -> None:
        """Enable or disable all adapters.

        While they are disabled nothing of them is trained; afterwards what was frozen before is frozen again.
        """
        if not enabled and not self._disable_adapters:
            self.trained_before = {name: parameter.requires_grad for name, parameter in self._named_values()}
            for _, parameter in self._named_values():
                _set_trained(parameter, False)
        elif enabled and self._disable_adapters:
            before = self.trained_before or {}
            for name, parameter in self._named_values():
                _set_trained(parameter, before.get(name, parameter.requires_grad))
            self.trained_before = None
        self._disable_adapters = not enabled

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters, which become trainable unless in `inference_mode`."""
        super().set_adapter(adapter_names, inference_mode)  # type: ignore[misc]
        # What is set while the adapters are disabled counts afterwards.
        if self.trained_before is not None:
            self.trained_before = {}

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train or freeze adapters by name."""
        super().set_requires_grad(adapter_names, requires_grad)  # type: ignore[misc]
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for key in list(self.trained_before or ()):
            if key.split(".")[1] in names:
                assert self.trained_before is not None
                del self.trained_before[key]


class LayerAdapters(KeepsTrainability, BaseTunerLayer):
    """Bookkeeping of a layer's adapters: which are active, trainable, on which device.

    Attributes:
        configs: config of each adapter that has a part in this layer, by name.
    """

    configs: dict[str, Any]

    def _all_available_adapter_names(self) -> list[str]:
        # peft's own goes by parameters, which a layer that only hands prompts on does not have.
        return sorted(self.configs)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from this layer.

        The others stay active and trainable as they are; if none is active any more, the first by name becomes so.
        """
        self.configs.pop(adapter_name, None)
        for container in (*self.adapter_layer_names, *self.other_param_names):
            if adapter_name in getattr(self, container):
                del getattr(self, container)[adapter_name]
        if adapter_name in self.frozen_peft_weight_names:
            kept = {name: value for name, value in self.frozen_peft_weight_names.items() if name != adapter_name}
            self.frozen_peft_weight_names = kept
        if adapter_name not in self.active_adapters:
            return
        left = [name for name in self.active_adapters if name != adapter_name]
        if left or not self.configs:
            self._active_adapter = left
            return
        successor = self._all_available_adapter_names()[0]
        warnings.warn(
            f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {successor}.",
            stacklevel=2,
        )
        self.set_adapter([successor], inference_mode=self.configs[successor].inference_mode)

    def cast_adapter(self, adapter_name: str, dtype: torch.dtype | None = None) -> None:
        """Cast the parameters of an adapter to a dtype; None for float32 or wider."""
        for values in self._containers_of(adapter_name):
            value = values[adapter_name]
            wanted = torch.promote_types(value.dtype, torch.float32) if dtype is None else dtype
            _replace(values, adapter_name, value.detach().to(wanted))

    def move_adapter(self, adapter_name: str, device: torch.device) -> None:
        """Move the parameters of an adapter to a device, in their dtype."""
        for values in self._containers_of(adapter_name):
            # Values on the meta device are still to be loaded.
            if not values[adapter_name].is_meta:
                _replace(values, adapter_name, values[adapter_name].detach().to(device))

    def _containers_of(self, adapter_name: str) -> Iterator[nn.ParameterDict]:
        for container in self.adapter_layer_names:
            if adapter_name in getattr(self, container):
                yield getattr(self, container)


def _replace(values: nn.ParameterDict, adapter_name: str, value: Tensor) -> None:
    """Store other values of an adapter, trained or frozen as before."""
    before = values[adapter_name]
    # A mapping that is given a plain tensor would make a trainable parameter of it.
    if value.dtype != before.dtype or value.device != before.device:
        values[adapter_name] = nn.Parameter(value, requires_grad=before.requires_grad)


def _set_trained(parameter: nn.Parameter, trained: bool) -> None:
    # Under FSDP a parameter may be a view, whose flag cannot be set.
    if parameter.is_leaf and parameter.requires_grad != trained:
        parameter.requires_grad_(trained)
