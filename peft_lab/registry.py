"""What methods there are, and how each becomes a native peft tuner.

A method is one Python file with a literal `METHOD = MethodInfo(...)`, a config dataclass, a layer class and one line
`register(METHOD, Config, Layer)`. Files in `peft_lab.adapters` are found by scanning that folder, third parties by the
entry-point group `peft_lab.methods`, peft's own tuners by scanning peft. Looking up reads source text only: torch and
peft are imported when a config class is asked for.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from peft_lab import source
from peft_lab.errors import ConfigError, check_keys, did_you_mean

ENTRY_POINTS = "peft_lab.methods"

#: What a method may declare that it can do; each one is tested both ways.
CAPABILITIES = {
    "linear": "adapts nn.Linear",
    "conv1d": "adapts the transposed Conv1D of GPT-2",
    "conv2d": "adapts nn.Conv2d",
    "embedding": "adapts nn.Embedding",
    "norm": "adapts LayerNorm, BatchNorm and RMSNorm",
    "merge": "merges exactly into the base weights",
    "lora_export": "converts exactly to LoRA",
    "mixed_batch": "serves rows of one batch with different adapters",
    "identity_start": "starts bit-exactly at the base model with its default configuration",
    "images": "is made for images alone",
    "image_logits": "gives the logits of an image classifier in place of its head",
    "untrained": "takes its own values from the training data, and trains the task head alone",
    "keeps_head": "keeps the head that an image classifier was trained with",
    "learned_activation": "learns an activation, which may be trained in turn on held-out rows",
    "dtype_bound": "is only valid on base weights of the dtype it was trained on",
}

KINDS = ("weight", "feature", "sequence", "input", "head", "baseline", "peft")

#: Learning rates for peft's own tuners whose good range is far from LoRA's (peft's method_comparison, MetaMathQA).
_PEFT_LEARNING_RATES = {"ia3": 5e-3, "c3a": 1e-1, "vera": 1e-2, "ln_tuning": 1e-2, "prompt_tuning": 1e-2, "oft": 1e-3}
_DEFAULT_LEARNING_RATE = 1e-3
#: Roles for peft's own tuners on families that peft has no targets for; query and value for all others.
_PEFT_ROLES = {"ia3": ("attn.k", "attn.v", "mlp.down"), "ln_tuning": ("norm", "norm.final")}


@dataclass(frozen=True)
class MethodInfo:
    """A method's card. Every value is a literal in the method's file, so that it can be read without importing it.

    Attributes:
        name: lower-case name, used on the command line, as peft type (upper case) and as parameter prefix (`name_`).
        title: the method's name as its paper writes it.
        paper: arXiv id or address of the source.
        kind: the place where it acts, one of `KINDS`.
        config: name of the config class in the method's file ("" for baselines, which take no arguments).
        roles: the module roles it adapts by default (`peft_lab.roles`).
        capabilities: names from `CAPABILITIES` that hold for it.
        learning_rate: default learning rate with AdamW.
        budget: most that a training step with the default config may cost, as (FLOPs, saved activations) relative to
            the frozen floor of a 384 wide ViT at 520 tokens; tested for every method.
        presets: values of config fields by the name of a relative of the method: `preset=NAME` among its arguments
            stands for them. A field whose value is `...` must be given beside it.
        module: dotted module that defines it, filled in by the registry.
        path: its source file, filled in by the registry.
    """

    name: str
    title: str
    paper: str
    kind: str
    config: str = ""
    roles: tuple[str, ...] = ()
    capabilities: tuple[str, ...] = ()
    learning_rate: float = _DEFAULT_LEARNING_RATE
    budget: tuple[float, float] = (1.1, 1.2)
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)
    module: str = ""
    path: Path | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*[a-z0-9]", self.name):
            raise ConfigError(f'Method name "{self.name}" must be lower case letters, digits and inner underscores.')
        if self.kind not in KINDS:
            raise ConfigError(f'Kind "{self.kind}" of method "{self.name}" must be one of {", ".join(KINDS)}.')
        for capability in self.capabilities:
            if capability not in CAPABILITIES:
                hint = did_you_mean(capability, CAPABILITIES)
                raise ConfigError(f'Method "{self.name}" declares an unknown capability "{capability}".{hint}')

    def can(self, capability: str) -> bool:
        """Whether the method declares a capability."""
        if capability not in CAPABILITIES:
            raise ConfigError(f'Unknown capability "{capability}".{did_you_mean(capability, CAPABILITIES)}')
        return capability in self.capabilities


def methods() -> dict[str, MethodInfo]:
    """Every method by name: ours, third parties', and each tuner of peft. Imports neither torch nor peft."""
    found = dict(_peft_tuners())
    for info in (*_builtin(), *_third_party()):
        clash = found.get(info.name)
        if clash is not None and clash.kind != "peft":
            raise ConfigError(f'Method "{info.name}" is defined by both {clash.module} and {info.module}.')
        found[info.name] = info
    return dict(sorted(found.items(), key=lambda item: (item[1].kind == "peft", item[0])))


def method(name: str) -> MethodInfo:
    """The card of one method; raises `ConfigError` with the nearest name if there is none."""
    known = methods()
    if name not in known:
        ours = ", ".join(n for n, info in known.items() if info.kind != "peft")
        raise ConfigError(
            f'Unknown method "{name}".{did_you_mean(name, known)} Methods: {ours}, and the tuners of peft.'
        )
    return known[name]


def config_fields(name: str) -> dict[str, source.Field]:
    """The fields of a method's config, read from source; empty if the source cannot be found."""
    info = method(name)
    if info.path is None or not info.config:
        return {}
    here = {name: Path(__file__).with_name(file) for name, file in _CONFIG_BASES.items()}
    elsewhere = {**here, **_peft_config_files()}
    path = info.path if info.config in source.classes(info.path) else elsewhere.get(info.config)
    fields = source.dataclass_fields(path, info.config, elsewhere) if path else {}
    return {k: v for k, v in fields.items() if k not in _MACHINE_FIELDS}


#: Where the config classes stand that methods inherit from.
_CONFIG_BASES = {
    "AdapterConfig": "config.py",
    "SequenceConfig": "sequence_tuner.py",
    "StaticConfig": "static_prompts.py",
    "MappedHeadConfig": "mapped_head.py",
}
#: Fields that peft or peft-lab fills in; a user never sets them as method arguments.
_MACHINE_FIELDS = frozenset(
    (
        *("peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
        *("fingerprints", "requires", "runtime_config"),
    )
)


def check_method_args(name: str, args: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for a method argument that the method's config does not have. Imports nothing heavy."""
    fields = config_fields(name)
    if fields or not method(name).config:
        check_keys(with_preset(name, args), fields, f'method "{name}"')


def with_preset(name: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """Method arguments with those that a `preset` among them stands for; what is given beside it goes first.

    Raises:
        ConfigError: the method has no such preset, or the preset needs an argument that is not given.
    """
    given = dict(args)
    info = method(name)
    if "preset" not in given or info.kind == "peft":
        return given
    preset, presets = given.pop("preset"), info.presets
    if preset not in presets:
        known = f"Presets: {', '.join(presets)}." if presets else "It has none; give its arguments themselves."
        raise ConfigError(f'Method "{name}" has no preset "{preset}".{did_you_mean(str(preset), presets)} {known}')
    values = {**presets[preset], **given}
    missing = next((key for key, value in values.items() if value is ...), None)
    if missing is not None:
        raise ConfigError(f'Preset "{preset}" of method "{name}" needs {missing}; give it beside preset={preset}.')
    return values


def config_class(name: str) -> type:
    """The config class of a method; imports peft and the module that defines the method."""
    info = method(name)
    if not info.config:
        raise ConfigError(f'Method "{name}" is a baseline: it trains the model\'s own weights and has no config class.')
    return getattr(importlib.import_module(info.module), info.config)


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
    values.update({k: v for k, v in common.items() if k in known and k not in values})
    if model is not None and method(name).module.startswith("peft."):
        values = {**_role_defaults(name, model, known, values.get("task_type")), **values}
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f'Method "{name}" refuses {values}: {error}') from error


def register(info: MethodInfo, config_cls: Any, layer_cls: Any, model_cls: Any = None) -> None:
    """Make a method a native peft tuner under `info.name`.

    The tuner class is derived from `peft_lab.tuner.AdapterTuner` unless `model_cls` is given. After this
    `get_peft_model`, `PeftModel.from_pretrained` and the rest of peft know the method.

    Raises:
        ConfigError: peft, or another package, already has a method of that name.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import register_peft_method

    from peft_lab.tuner import AdapterTuner

    known: dict[Any, Any] = PEFT_TYPE_TO_CONFIG_MAPPING
    present = known.get(info.name.upper())
    if present is not None:
        if present.__module__ == config_cls.__module__:
            return
        raise ConfigError(f'peft already has a method "{info.name}" ({present.__module__}); choose another name.')
    peft_type = _extend_peft_type(info.name.upper())
    config_cls.peft_method_type = peft_type
    config_cls.info = info
    layer_cls.info = info
    members = {
        "prefix": f"{info.name}_",
        "tuner_layer_cls": layer_cls,
        "info": info,
        "__module__": layer_cls.__module__,
    }
    tuner = type(config_cls.__name__.removesuffix("Config") + "Model", (model_cls or AdapterTuner,), members)
    vars(sys.modules[tuner.__module__]).setdefault(tuner.__name__, tuner)  # pickle looks for it there
    register_peft_method(name=info.name, config_cls=config_cls, model_cls=tuner)


def load_all() -> None:
    """Import every built-in and third-party method, which registers them with peft."""
    for info in _builtin():
        importlib.import_module(info.module)
    for info in _third_party():
        try:
            importlib.import_module(info.module)
        except Exception as error:  # a broken plug-in must not take peft down with it
            warnings.warn(f'Method "{info.name}" of {info.module} cannot be loaded: {error}', stacklevel=2)


def _extend_peft_type(name: str) -> Any:
    """Add a member to peft's closed `PeftType`; a plain string would leave peft's status reports empty."""
    from peft import PeftType

    if name in PeftType.__members__:
        return PeftType[name]
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
    if not isinstance(value, str):
        return value
    import yaml

    try:
        read = yaml.safe_load(value)
    except yaml.YAMLError:
        return value
    if isinstance(read, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", read):
        return float(read)  # YAML 1.1 takes 1e-3 for text
    return read


def _role_defaults(name: str, model: Any, known: set[str], task_type: str | None) -> dict[str, Any]:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    from peft_lab import roles

    defaults: dict[str, Any] = {}
    tuners: dict[Any, Any] = PEFT_TYPE_TO_TUNER_MAPPING
    mapped = getattr(tuners.get(name.upper()), "target_module_mapping", None) or {}
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    info = method(name)
    if "target_modules" in known and (info.roles or model_type not in mapped):
        wanted = info.roles or _PEFT_ROLES.get(name, ("attn.q", "attn.v"))
        defaults["target_modules"] = roles.target_regex(model, wanted)
        if "feedforward_modules" in known:
            defaults["feedforward_modules"] = roles.target_regex(model, ("mlp.down",))
    if "modules_to_save" in known:
        defaults["modules_to_save"] = roles.head_modules(model, task_type) or None
    return defaults


def _card(path: Path, module: str) -> MethodInfo | None:
    values = source.module_call(path, "METHOD")
    return MethodInfo(**values, module=module, path=path) if values else None


@lru_cache(maxsize=1)
def _builtin() -> tuple[MethodInfo, ...]:
    spec = importlib.util.find_spec("peft_lab.adapters")
    folders = [Path(p) for p in (spec.submodule_search_locations if spec else None) or []]
    files = sorted(f for folder in folders for f in folder.glob("*.py") if not f.name.startswith("_"))
    cards = (_card(f, f"peft_lab.adapters.{f.stem}") for f in files)
    return tuple(_with_peft_module(card) for card in cards if card)


def _with_peft_module(info: MethodInfo) -> MethodInfo:
    """A card that only describes a tuner of peft points to peft's config file and module."""
    tuner = _peft_tuners().get(info.name)
    return replace(info, module=tuner.module, path=tuner.path) if tuner and info.kind != "baseline" else info


@lru_cache(maxsize=1)
def _third_party() -> tuple[MethodInfo, ...]:
    found = []
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        path = _module_file(entry)
        card = _card(path, entry.module) if path else None
        if card is None:
            warnings.warn(
                f'Entry point "{entry.name}" of group {ENTRY_POINTS} is left out: {entry.module} has no readable '
                "module-level METHOD = MethodInfo(...) with literal values.",
                stacklevel=2,
            )
            continue
        found.append(card)
    return tuple(found)


def _module_file(entry: importlib.metadata.EntryPoint) -> Path | None:
    if entry.dist is not None:
        for suffix in (".py", "/__init__.py"):
            path = Path(str(entry.dist.locate_file(entry.module.replace(".", "/") + suffix)))
            if path.is_file():
                return path
    spec = importlib.util.find_spec(entry.module)
    return Path(spec.origin) if spec and spec.origin else None


def _peft_root() -> Path | None:
    spec = importlib.util.find_spec("peft")
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


@lru_cache(maxsize=1)
def _peft_tuners() -> dict[str, MethodInfo]:
    root, found = _peft_root(), {}
    for path in sorted(root.glob("tuners/*/config.py")) if root else ():
        text = path.read_text(encoding="utf-8")
        match = re.search(r"self\.peft_type = (?:.*\n?.*)?PeftType\.([A-Z0-9_]+)", text)
        names = re.findall(r"^class (\w+Config)\(", text, re.MULTILINE)
        if not match or not names:
            continue
        name = match[1].lower()
        found[name] = MethodInfo(
            name=name,
            title=path.parent.name,
            paper="",
            kind="peft",
            config=_main_class(text, names, match.start()),
            learning_rate=_PEFT_LEARNING_RATES.get(name, _DEFAULT_LEARNING_RATE),
            module=f"peft.tuners.{path.parent.name}.config",
            path=path,
        )
    return found


def _main_class(text: str, names: list[str], position: int) -> str:
    """The class in whose body the peft type is set: the last one that starts before that line."""
    return max((text.find(f"class {n}("), n) for n in names if text.find(f"class {n}(") < position)[1]


@lru_cache(maxsize=1)
def _peft_config_files() -> dict[str, Path]:
    root = _peft_root()
    if root is None:
        return {}
    files = {"PeftConfig": root / "config.py", "PeftConfigMixin": root / "config.py"}
    files |= {"PromptLearningConfig": root / "config.py", "LycorisConfig": root / "tuners" / "lycoris_utils.py"}
    return files | {info.config: info.path for info in _peft_tuners().values() if info.path}
