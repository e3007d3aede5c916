"""Registration of methods with peft, and configs built from plain values."""

from __future__ import annotations

import importlib
import logging
import re
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import peft
import transformers
from packaging.version import Version
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method

from peft_lab.backbones import module_roles
from peft_lab.backbones.experts import names_of_experts
from peft_lab.backbones.names import ends_with
from peft_lab.errors import ConfigError
from peft_lab.registry import MethodInfo, builtin_methods, check_method_args, method, third_party_methods, with_preset
from peft_lab.tuners.layer import AdapterLayer
from peft_lab.tuners.tuner import AdapterTuner

logger = logging.getLogger("peft_lab")

#: Roles for peft's own tuners on families that peft has no targets for; query and value for all others.
_PEFT_ROLES = {"ia3": ("attn.k", "attn.v", "mlp.down"), "ln_tuning": ("norm", "norm.final")}


def config_class(name: str) -> type:
    """Config class of a method.

    Imports peft and the module that defines the method.

    Raises:
        ConfigError: an unknown method, or a baseline, which has no config class.
    """
    info = method(name)
    if not info.config:
        raise ConfigError(f'Method "{name}" is a baseline: it trains the model\'s own weights and has no config class.')
    return getattr(importlib.import_module(info.module), info.config)


def has_trait(info: MethodInfo, trait: str) -> bool:
    """Test a property of a method's config class, such as `uses_source_head`.

    False for baselines and peft's methods.
    """
    return bool(info.config) and bool(getattr(config_class(info.name), trait, False))


def make_config(name: str, args: Mapping[str, Any] | None = None, model: Any = None, **common: Any) -> Any:
    """Build a method's config from plain values.

    Args:
        name: method name.
        args: config fields; text values such as `"full"`, `"8"` or `"[q_proj, v_proj]"` are read as YAML.
        model: the backbone. With it, a tuner of peft itself that has no default targets for this model family gets
            them by role, and the task head goes into `modules_to_save`.
        common: fields set by the caller (`task_type`, ...), kept if the config has them.

    Raises:
        ConfigError: unknown field or a value that the config refuses.
    """
    cls = config_class(name)
    check_method_args(name, args or {})
    values = {key: _plain(value) for key, value in with_preset(name, args or {}).items()}
    known = set(getattr(cls, "__dataclass_fields__", {}))
    # What the user gave comes before what the caller sets for every method.
    for key, value in common.items():
        if key in known:
            values.setdefault(key, value)
    # Own methods find their targets by role in their tuner; peft's need names.
    if model is not None and method(name).module.startswith("peft."):
        if "target_parameters" in known and values.get("target_parameters"):
            values["target_parameters"] = _parameter_names(model, values["target_parameters"])
        values = {**_role_defaults(name, model, known, values.get("task_type")), **values}
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f'Method "{name}" refuses {values}: {error}') from error


def register(info: MethodInfo, config_cls: Any, layer_cls: Any, model_cls: Any = None) -> None:
    """Make a method a native peft tuner under `info.name`.

    The tuner class is derived from `peft_lab.tuners.tuner.AdapterTuner` unless `model_cls` is given. After this
    `get_peft_model`, `PeftModel.from_pretrained` and the rest of peft know the method.

    Raises:
        ConfigError: peft, or another package, already has a method of that name.
    """
    known: dict[Any, Any] = PEFT_TYPE_TO_CONFIG_MAPPING
    # A module that is imported again, under another name or after a reload, registers its method once.
    present = known.get(info.name.upper())
    if present is not None:
        if present.__module__ == config_cls.__module__:
            return
        raise ConfigError(f'peft already has a method "{info.name}" ({present.__module__}); choose another name.')
    peft_type = _extend_peft_type(info.name.upper())
    config_cls.peft_method_type = peft_type
    config_cls.info = info
    layer_cls.info = info
    layer_cls.config_cls = config_cls
    _check_capabilities(info, layer_cls)
    # peft finds a method's parameters by the prefix of their names.
    members = {
        "prefix": f"{info.name}_",
        "tuner_layer_cls": layer_cls,
        "info": info,
        "__module__": layer_cls.__module__,
    }
    tuner = type(config_cls.__name__.removesuffix("Config") + "Model", (model_cls or AdapterTuner,), members)
    vars(sys.modules[tuner.__module__]).setdefault(tuner.__name__, tuner)  # pickle looks for it there
    register_peft_method(name=info.name, config_cls=config_cls, model_cls=tuner)


#: Capability -> function of the layer that it needs.
_CODE_OF = {"merge": "folded", "mixed_batch": "mixed", "experts": "folded"}


def _check_capabilities(info: MethodInfo, layer_cls: type[AdapterLayer]) -> None:
    """Refuse a method that declares a capability without the code for it.

    Raises:
        ConfigError: naming the capability and the function of the layer that is missing.
    """
    needed = {capability: function for capability, function in _CODE_OF.items() if info.can(capability)}
    if layer_cls.config_cls.exports_lora:
        needed["exports_lora"] = "delta_weight"
    for capability, function in needed.items():
        missing = layer_cls.missing_code(function)
        if missing:
            raise ConfigError(
                f'Method "{info.name}" declares the capability {capability}, but {layer_cls.__name__} has no '
                f"{missing}; write it, or take the capability out of the card."
            )
    if layer_cls.linear and not {*layer_cls.adapter_layer_names} <= {*layer_cls.row_fields}:
        raise ConfigError(
            f'{layer_cls.__name__} of method "{info.name}" is declared linear, but row_fields does not name all of '
            f"{', '.join(layer_cls.adapter_layer_names)} with the number that changes nothing."
        )


def load_all() -> None:
    """Import every built-in and third-party method, which registers them with peft."""
    for info in builtin_methods():
        importlib.import_module(info.module)
    for info in third_party_methods():
        try:
            importlib.import_module(info.module)
        except Exception as error:  # a broken plug-in must not take peft down with it
            warnings.warn(f'Method "{info.name}" of {info.module} cannot be loaded: {error}', stacklevel=2)


def newer_peft_needed() -> str:
    """Version of peft that transformers' own `add_adapter` asks for, if it is newer than the installed one; else ""."""
    # modeling_utils, which peft imports, has imported it already
    needed: str = getattr(importlib.import_module("transformers.integrations.peft"), "MIN_PEFT_VERSION", "0")
    return needed if Version(peft.__version__) < Version(needed) else ""


def warn_of_old_peft() -> None:
    """Warn in one line if transformers asks for a newer peft than the installed one.

    Only its own `add_adapter` and `load_adapter` do; they then fail for the methods of peft too.
    """
    needed = newer_peft_needed()
    if needed:
        theirs = transformers.__version__
        logger.warning(
            "transformers %s asks for peft %s in model.add_adapter and model.load_adapter, and peft %s is installed: "
            'both fail for every method; use get_peft_model and PeftModel.from_pretrained, or "transformers<%s".',
            *(theirs, needed, peft.__version__, theirs),
        )


def _extend_peft_type(name: str) -> Any:
    """Add a member to peft's closed `PeftType`.

    A plain string would leave peft's status reports empty.
    """
    from peft import PeftType

    if name in PeftType.__members__:
        return PeftType[name]
    # What Enum itself does for a member in its class body; checked below, because these names are private.
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    if PeftType(name) is not member or name not in PeftType.__members__:
        raise RuntimeError(f"This Python's enum cannot be extended by {name}; please report its version.")
    return member


def _plain(value: Any) -> Any:
    """Value of a text by YAML; others as they are."""
    if not isinstance(value, str):
        return value
    import yaml

    from peft_lab.utils import plain_yaml

    try:
        read = plain_yaml.read(value)
    except yaml.YAMLError:
        return value
    if isinstance(read, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", read):
        return float(read)  # YAML 1.1 takes 1e-3 for text
    return read


def _parameter_names(model: Any, names: Any) -> Any:
    """Names of `target_parameters` that a tuner of peft knows.

    It knows "all-experts" not, and passes over a name that fits nothing.
    """
    known = {name for name, _ in model.named_parameters()}
    others: list[str] = []
    rest: list[str] = []
    for name in [names] if isinstance(names, str) else names:
        # A tuner of peft may be put on any other parameter too.
        fits = any(ends_with(path, str(name)) for path in known)
        (others if fits else rest).append(name)
    return [*others, *names_of_experts(model, rest)]


def _role_defaults(name: str, model: Any, known: set[str], task_type: str | None) -> dict[str, Any]:
    """Default targets of peft's tuners by role, and the task head."""
    defaults: dict[str, Any] = {}
    tuners: dict[Any, Any] = PEFT_TYPE_TO_TUNER_MAPPING
    mapped = getattr(tuners.get(name.upper()), "target_module_mapping", None) or {}
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    info = method(name)
    # peft's own targets stand where it has some for this family and the card names no roles.
    if "target_modules" in known and (info.roles or model_type not in mapped):
        wanted = info.roles or _PEFT_ROLES.get(name, ("attn.q", "attn.v"))
        defaults["target_modules"] = module_roles.target_modules(model, wanted)
        # IA3 scales the input of these modules instead of the output; peft wants them among the targets too.
        if "feedforward_modules" in known:
            defaults["feedforward_modules"] = module_roles.target_modules(model, ("mlp.down",))
    if "modules_to_save" in known:
        defaults["modules_to_save"] = module_roles.head_modules(model, task_type) or None
    return defaults
