"""Configs of adapters from files.

Ours check themselves, those of peft's tuners are checked here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from peft_lab.adapter_files.name_patterns import without_patterns
from peft_lab.adapter_files.names import PRUNED_BASE
from peft_lab.backbones import module_roles
from peft_lab.errors import ConfigError, did_you_mean
from peft_lab.tuners.config import AdapterConfig, check_patterns, fits, known_values, shorten, type_hints

#: Settings that name other files, modules to import or arguments of other functions.
_REFUSED = ("megatron_config", "tokenizer_kwargs", "adapters", "corda_config", "eva_config", "runtime_config")
#: Sizes whose limit follows from the base; other numbers (alpha, seeds, steps) allocate nothing.
_SIZE = re.compile(r"(?:^|_)(?:r|rank|ranks|tokens|layers|dim|size|num|n|length|width|depth|factor)(?:_|$)")
_SMALL = 4096


def plain_values(values: dict[str, Any], header: Mapping[str, tuple[str, list[int]]], path: str) -> dict[str, Any]:
    """Return config values without regexes of modules.

    Args:
        header: dtype and shape of each entry of the weights; it names the modules.

    Raises:
        ConfigError: the modules behind a regex cannot be read off the weights.
    """
    prefix = parameter_prefix(values)
    return values if not prefix else without_patterns(values, header, prefix, f'"{path}"')


def parameter_prefix(values: dict[str, Any]) -> str:
    """Return the prefix of a tuner's parameters, such as "lora_".

    "" without a tuner.
    """
    tuners: dict[Any, Any] = PEFT_TYPE_TO_TUNER_MAPPING
    peft_type = values.get("peft_type")
    return getattr(tuners.get(peft_type), "prefix", "") if isinstance(peft_type, str) else ""


def parse_config(values: dict[str, Any], path: str) -> PeftConfig:
    """Return the checked config from an adapter_config.json.

    `values` is its content, and `path` names it in errors.

    Raises:
        ConfigError: an unknown type or key, a value of the wrong type or size, a setting that files may not make.
    """
    known: dict[Any, Any] = PEFT_TYPE_TO_CONFIG_MAPPING
    peft_type = values.get("peft_type")
    if not isinstance(peft_type, str) or peft_type not in known:
        names = [str(getattr(name, "value", name)) for name in known]
        hint = did_you_mean(peft_type, names) if isinstance(peft_type, str) else ""
        raise ConfigError(f'"{path}" has peft_type {shorten(peft_type)}, which is not known.{hint}')
    cls = known[peft_type]
    values = known_values(cls, values) if issubclass(cls, AdapterConfig) else _checked(values, cls, path)
    try:
        return cls(**values)
    # Configs check their own values, those of peft with errors of many types.
    except (TypeError, ValueError, AttributeError, KeyError, ImportError) as error:
        # A ConfigError is a ValueError too, but its message is complete already.
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f'"{path}" is refused: {" ".join(str(error).split())}') from error


def head_config(model: nn.Module, task_type: str | None = None) -> LoraConfig:
    """Return the config of a task head trained alone.

    It is LoRA without a LoRA layer.

    Its file holds the head alone, and peft loads it without this package.
    """
    # peft adds by itself the heads that the task type stands for.
    saved = module_roles.head_modules(model, task_type) or None
    return LoraConfig(task_type=task_type, target_modules=DUMMY_TARGET_MODULES, modules_to_save=saved)


def check_sizes(config: PeftConfig, largest: int) -> None:
    """Refuse sizes that no adapter on this base can have.

    Nothing is allocated before; see `AdapterConfig`.

    Raises:
        ConfigError: naming the field.
    """
    if isinstance(config, AdapterConfig):
        config.check_sizes(largest)
        return
    # The lower limit keeps a tiny base from refusing usual sizes.
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
    """Return the values that a config class of peft takes.

    Raises:
        ConfigError: an unknown key, or a value of another type than the field has.
    """
    hints = type_hints(cls)
    own = {f.name: f for f in fields(cls)}
    kept: dict[str, Any] = {}
    for name, value in values.items():
        # peft writes some of these keys, empty, into each LoRA file, so the key alone is no offence.
        if name == PRUNED_BASE:  # said in full in a file of its own
            continue
        if name in _REFUSED:
            if value:
                raise ConfigError(f'"{path}" sets {name}, which is not taken from a file; remove it.')
        elif name not in own:
            # A newer peft writes new fields too; an empty one has no effect.
            if value:
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
