"""Adapter configs read from files: ours by their own schema, those of peft's tuners closed here in the same way."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from peft_lab.adapter_files import safe_files
from peft_lab.adapter_files.names import ADAPTER_CONFIG
from peft_lab.backbones import module_roles
from peft_lab.errors import ConfigError, did_you_mean
from peft_lab.tuners.config import AdapterConfig, check_patterns, fits, shorten, type_hints

#: Settings that name other files, modules to import or arguments of other functions.
_REFUSED = ("megatron_config", "tokenizer_kwargs", "adapters", "corda_config", "eva_config", "runtime_config")
#: Sizes whose limit follows from the base; other numbers (alpha, seeds, steps) allocate nothing.
_SIZE = re.compile(r"(?:^|_)(?:r|rank|ranks|tokens|layers|dim|size|num|n|length|width|depth|factor)(?:_|$)")
_SMALL = 4096


def read_config(folder: Path) -> PeftConfig:
    """The config of an adapter's folder, checked.

    Raises:
        ConfigError: an unknown type or key, a value of the wrong type or size, a setting that files may not make.
    """
    path = folder / ADAPTER_CONFIG
    values = safe_files.read_json(path)
    known: dict[Any, Any] = PEFT_TYPE_TO_CONFIG_MAPPING
    kind = values.get("peft_type")
    if not isinstance(kind, str) or kind not in known:
        names = [str(getattr(name, "value", name)) for name in known]
        hint = did_you_mean(kind, names) if isinstance(kind, str) else ""
        raise ConfigError(f'"{path}" has peft_type {shorten(kind)}, which is not known.{hint}')
    cls = known[kind]
    if not issubclass(cls, AdapterConfig):
        values = _checked(values, cls, str(path))
    try:
        return cls(**values)
    except (TypeError, ValueError, AttributeError, KeyError, ImportError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f'"{path}" is refused: {" ".join(str(error).split())}') from error


def of_head(model: nn.Module, task_type: str | None = None) -> LoraConfig:
    """An adapter that is the task head and nothing else: LoRA without a LoRA layer.

    Its file holds the head alone, and peft loads it without this package.
    """
    saved = module_roles.head_modules(model, task_type) or None  # peft adds by itself what the task type stands for
    return LoraConfig(task_type=task_type, target_modules=DUMMY_TARGET_MODULES, modules_to_save=saved)


def check_sizes(config: PeftConfig, largest: int) -> None:
    """Refuse sizes that no adapter on this base can have, before anything is allocated; see `AdapterConfig`.

    Raises:
        ConfigError: naming the field.
    """
    if isinstance(config, AdapterConfig):
        config.check_sizes(largest)
        return
    most = max(largest, _SMALL)
    for f in fields(config):
        value = getattr(config, f.name)
        nested = list(value.values()) if isinstance(value, dict) else [value]
        if _SIZE.search(f.name) and any(isinstance(v, int) and abs(v) > most for v in nested):
            raise ConfigError(f"{f.name}={shorten(value)} is larger than anything in this base: at most {most}.")
    copies: Any = getattr(config, "layer_replication", None) or ()
    for start, stop in copies:
        if not 0 <= start < stop <= most:
            raise ConfigError(f"layer_replication={shorten(copies)} names blocks that cannot be.")


def _checked(values: dict[str, Any], cls: Any, path: str) -> dict[str, Any]:
    hints = type_hints(cls)
    own = {f.name: f for f in fields(cls)}
    kept: dict[str, Any] = {}
    for name, value in values.items():
        if name in _REFUSED:
            if value:
                raise ConfigError(f'"{path}" sets {name}, which is not taken from a file; remove it.')
        elif name not in own:
            if value:  # a newer peft writes new fields too; what is empty has no effect
                raise ConfigError(f'Unknown key "{name[:100]}" in "{path}".{did_you_mean(name[:100], own)}')
        elif value == _default(own[name]) or fits(value, hints[name]):
            kept[name] = value
        else:
            raise ConfigError(f'{name}={shorten(value)} in "{path}" does not fit {cls.__name__}.')
    if kept.get("megatron_core") not in (None, "megatron.core"):
        raise ConfigError(f'"{path}" names a module to import by megatron_core, which is not taken from a file.')
    check_patterns(kept)
    return kept


def _default(field: Any) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default
