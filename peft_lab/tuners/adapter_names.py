"""Names that an adapter may have on a model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from peft_lab.errors import ConfigError
from peft_lab.tuners.mixed_batch import BASE

#: Longest name in bytes: the folder that an adapter is saved in bears it.
_MAX_BYTES = 200
#: Parts of module paths that peft, torch and their wrappers put in.
_WRAPPERS = (
    *("base_model", "model", "base_layer", "modules_to_save", "original_module", "token_adapter"),
    *("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"),
)


def check_adapter_name(name: object, model: nn.Module, prefix: str, layer: Any = BaseTunerLayer) -> None:
    """Check that an adapter of this name can be added, saved, loaded and deleted.

    Adapters are kept in mappings by their name, which becomes a part of each parameter's path and the name of a
    folder. peft finds the parameters of one adapter by this part, so it must mean nothing else in the model.

    Args:
        name: name of the adapter.
        model: the base, with or without adapters.
        prefix: prefix of the parameters of the adapter's method, such as "lora_".
        layer: class of the method's layers, which names its parameters.

    Raises:
        ConfigError: the name is no such name, or stands for something else in this model.
    """
    reason = _reason_against(name, prefix)
    if not reason and name in {*_WRAPPERS, *layer.adapter_layer_names, *layer.other_param_names, *_parts(model)}:
        reason = "it is part of the path of a module, whose weights would be taken for the adapter's"
    if reason:
        shown = f"{name!r:.100}".strip("'\"") if isinstance(name, str) else repr(name)
        raise ConfigError(f'Adapter name "{shown}" cannot be used: {reason}; choose another name.')


def check_base_names(model: nn.Module, prefix: str) -> None:
    """Check that nothing in the base is named like the parameters of a method.

    Raises:
        ConfigError: naming the first such module or parameter.
    """
    parts = {*_parts(model)}
    alike = next((part for part in sorted(parts) if prefix in part), None)
    if alike:
        raise ConfigError(
            f'The model has a module or parameter "{alike}", and by "{prefix}" peft knows the parameters of this '
            "method; rename it to use the method on this model."
        )


def _reason_against(name: object, prefix: str) -> str:
    """Reason why no model can have an adapter of this name; "" if there is none."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name) or len(name.encode()) > _MAX_BYTES:
        return f'it must consist of letters, digits, "_" and "-", {_MAX_BYTES} bytes at most'
    if name == BASE:
        return "it means no adapter"
    if name in prefix:
        return f'it is part of the parameter prefix "{prefix}", and its weights would be lost at load'
    if any(hasattr(mapping, name) for mapping in (nn.ParameterDict(), nn.ModuleDict(), BufferDict())):
        return "it is an attribute of the mapping in which torch keeps adapters"
    return ""


def _parts(module: nn.Module) -> Iterator[str]:
    """Yield every name in the paths of the base's modules, parameters and buffers."""
    for values in (module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
        for name, _ in values:
            yield name
    adapted = isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    for name, child in module.named_children():
        # Beside the base, a wrapper holds the adapters under their own names.
        if not adapted:
            yield name
        if not adapted or name in ("base_layer", "original_module"):
            yield from _parts(child)
