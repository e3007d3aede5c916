"""Adapter file, read without putting the adapter on a model."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from peft_lab import registry
from peft_lab.adapter_files.completeness import check_complete
from peft_lab.backbones.names import PEFT_PREFIX
from peft_lab.errors import ConfigError
from peft_lab.loading.adapter_folder import AdapterFolder
from peft_lab.loading.pruned_base import SavedPruning
from peft_lab.registry import MethodInfo
from peft_lab.tuners.mixed_batch import RowLayer

#: Fields of a config that tell the origin of an adapter, and have no part in its shapes.
_ORIGIN = ("fingerprints", "base_model_name_or_path", "revision", "peft_version", "inference_mode", "auto_mapping")


@dataclass(frozen=True)
class AdapterFile:
    """Content of an adapter folder.

    Attributes:
        info: card of the method.
        config: its peft config.
        values: module path -> parameter -> tensor, by the names in the file.
        pruning: how the base is pruned; None for a dense one.
        others: entries that are no parameters of the method: `modules_to_save`, and copies of embeddings.
    """

    info: MethodInfo
    config: Any
    values: dict[str, dict[str, Tensor]]
    others: dict[str, Tensor]
    pruning: SavedPruning | None = None

    def shape_key(self) -> str:
        """Key that is equal for adapters with equal shapes at equal modules."""
        fields = {key: value for key, value in self.config.to_dict().items() if key not in _ORIGIN}
        return json.dumps(fields, sort_keys=True, default=str)

    def heads(self) -> dict[str, dict[str, Tensor]]:
        """Entries of `modules_to_save`: module path -> parameter -> tensor."""
        found: dict[str, dict[str, Tensor]] = {}
        saved = tuple(f".{name}." for name in self.config.modules_to_save or ())
        for key, value in self.others.items():
            if any(mark in f".{key}" for mark in saved):
                path, _, name = key.rpartition(".")
                found.setdefault(path, {})[name] = value
        return found


def read_adapter(adapter: str | Path, most: int = 2**36) -> AdapterFile:
    """Read an adapter from a folder or the Hub.

    Its file may have at most `most` bytes.

    Raises:
        ConfigError: there is no such adapter, its method serves no rows, or its files cannot be read or hold values
            that are not finite numbers.
    """
    folder = AdapterFolder.find(adapter)
    if not folder.has_adapter:
        raise ConfigError(f'"{adapter}" is a whole model, not an adapter; load it by itself.')
    # an untrusted file is checked by its header before anything large is read
    folder.check_weights(most)
    config: Any = folder.config
    info = registry.method(str(config.peft_type.value).lower())
    # Frozen values, such as places of entries, may be integers; the layer refuses those that rows cannot share.
    frozen = tuple(getattr(row_layer_class(info.name), "other_param_names", ()))
    if getattr(config, "trainable_token_indices", None) is not None:
        raise ConfigError(
            f'The adapter "{adapter}" trains rows of the token embeddings (trainable_token_indices), which load_many '
            "does not serve; load it with PeftModel.load_adapter and pass adapter_names."
        )
    if getattr(config, "target_parameters", None):
        raise ConfigError(
            f'The adapter "{adapter}" changes stacked weights of experts, which all rows of a batch share; load it '
            "with PeftModel."
        )
    try:
        state = load_file(folder.weights)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f'The adapter "{adapter}" cannot be read: {" ".join(str(error).split())}') from error
    prefix = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type].prefix
    values: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, value in state.items():
        integers = not value.is_floating_point() and not key.endswith(frozen)
        if integers or not bool(value.isfinite().all()):
            raise ConfigError(f'Entry "{key}" of the adapter "{adapter}" holds values that are not finite numbers.')
        path, mark, parameter = key.removeprefix(PEFT_PREFIX).rpartition(f".{prefix}")
        if mark:
            values.setdefault(path, {})[prefix + parameter] = value
        else:
            others[key.removeprefix(PEFT_PREFIX)] = value
    if not values:
        raise ConfigError(f'The adapter "{adapter}" holds no parameters of its method.')
    return AdapterFile(info, config, values, others, folder.pruning)


def row_layer_class(method: str) -> type[RowLayer]:
    """Class that serves a method by row.

    Raises:
        ConfigError: the method has none.
    """
    # our own layers serve rows themselves; for a tuner of peft the method's file may name a class
    tuners: dict[Any, Any] = PEFT_TYPE_TO_TUNER_MAPPING
    layer: Any = getattr(tuners[method.upper()], "tuner_layer_cls", None)
    if getattr(layer, "row_fields", None):
        return layer
    described = registry.method(method).card_module
    rows = getattr(importlib.import_module(described), "ROWS", None) if described else None
    if rows is None:
        raise ConfigError(
            f'Method "{method}" cannot serve many adapters in one batch without a loop over them; load its adapters '
            "with PeftModel.load_adapter and pass adapter_names."
        )
    return rows


def check_shapes(path: str, found: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `ConfigError` if a module's tensors differ from those expected.

    Args:
        path: the module's path, for the message.
        found: parameter -> tensor of the file.
        expected: parameter -> shape by the config.
    """
    check_complete([f"{path}.{name}" for name in expected], [f"{path}.{name}" for name in found])
    for name in expected:
        if tuple(found[name].shape) != expected[name]:
            raise ConfigError(
                f'Adapter entry "{path}.{name}" has shape {list(found[name].shape)}, expected {list(expected[name])}.'
            )
