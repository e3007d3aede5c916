"""Config fields that all methods of peft-lab share, a closed schema."""

from __future__ import annotations

import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

from peft.config import PeftConfig
from peft.utils import WEIGHTS_NAME, TaskType

from peft_lab.adapter_files import safe_files
from peft_lab.adapter_files.name_patterns import check_key_pattern, check_pattern, pattern_fields, without_patterns
from peft_lab.adapter_files.names import ADAPTER_WEIGHTS
from peft_lab.errors import ConfigError, check_keys, did_you_mean
from peft_lab.registry import MethodInfo, with_preset
from peft_lab.tuners.row_input import RowInput
from peft_lab.tuners.trained_tokens import check_indices

#: Sizes of an adapter (rank, tokens, ...) may always go up to this, whatever the dimensions of the base.
_SMALL = 4096


@dataclass
class AdapterConfig(PeftConfig):
    """Base of every config class.

    Field names are peft's where peft has them.

    Raises:
        ConfigError: a field has the wrong type or an unknown key came from a file.
    """

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Modules to adapt: names, one regex, or nothing for the method's default roles."},
    )
    target_parameters: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Stacked weights of experts to adapt, beside target_modules: names such as experts.down_proj, or "
            '"all-experts".'
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules not to adapt: names or one regex."}
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules trained in full and saved; nothing means the task head if the model has one."},
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None,
        metadata={
            "help": "Numbers of the tokens whose embeddings are trained and saved, such as those that a chat template "
            "adds: a list for the input embeddings, or a list for each module by name."
        },
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the blocks to adapt; nothing means all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the module list that holds the blocks, for unusual models."}
    )
    backbone_eval: bool | None = field(
        default=None,
        metadata={
            "help": "Frozen backbone in evaluation mode while training: no dropout, no drop path; nothing means as the "
            "method's authors train."
        },
    )
    fingerprints: dict[str, dict[str, Any]] | None = field(
        default=None, metadata={"help": "Filled in when saved: which base weights the adapter belongs to."}
    )
    requires: str = field(
        default="peft-lab", metadata={"help": "Filled in: the package to import before loading this adapter."}
    )

    #: True if the method keeps the head that an image classifier was trained with, instead of a new one.
    uses_source_head: ClassVar[bool] = False
    #: Row input of which it makes the images that the backbone reads, such as point clouds; "" for most methods.
    image_source: ClassVar[str] = ""
    #: True if it gives the logits of an image classifier in place of the head.
    produces_logits: ClassVar[bool] = False
    #: True if it gives the logits of any classifier of whole rows, whose head is neither used nor trained.
    replaces_head: ClassVar[bool] = False
    #: True if its values come from the training data, and no gradient changes them.
    values_from_data: ClassVar[bool] = False
    #: True if it is only valid on base weights of the dtype that it was trained on.
    dtype_bound: ClassVar[bool] = False
    #: True if it converts exactly to LoRA.
    exports_lora: ClassVar[bool] = False

    #: Fields by which an adapter of a method without the capability `merge` can be merged all the same.
    merge_fields: ClassVar[tuple[str, ...]] = ()

    #: Folder without weights that the config was read from; "" for none.
    read_alone: ClassVar[str] = ""
    #: The method's own choice of `backbone_eval`, that of the authors' code.
    authors_backbone_eval: ClassVar[bool] = False

    #: Set by `peft_lab.tuners.register`.
    peft_method_type: ClassVar[Any] = None
    info: ClassVar[MethodInfo]

    def __new__(cls, *args: Any, **kwargs: Any) -> AdapterConfig:
        # peft drops unknown keys of a file with a warning; a knob that is ignored must be an error instead. A newer
        # peft writes its new fields into each file, and an empty one has no effect: that one is left to peft.
        given = [key for key, value in kwargs.items() if value is not None or "peft_type" not in kwargs]
        if "preset" in given and cls.info.presets:
            known = ", ".join(cls.info.presets)
            raise ConfigError(f"A preset is not a field; use {cls.__name__}.from_preset(NAME). Presets: {known}.")
        check_keys(given, (f.name for f in fields(cls)), f'the config of method "{cls.info.name}"')
        return super().__new__(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        # All that loads an adapter sets this before the weights, for which peft would turn to the Hub and to pickles.
        if name == "inference_mode" and self.read_alone:
            raise ConfigError(f'"{self.read_alone}" has no {ADAPTER_WEIGHTS}; only safetensors files are read.')
        super().__setattr__(name, value)

    @classmethod
    def from_preset(cls, preset: str, **fields: Any) -> Any:
        """Make the config of a preset, with `fields` on top.

        Presets are relatives of the method, listed in its card.

        Raises:
            ConfigError: the method has no such preset, or the preset needs a field that is not given.
        """
        return cls(**with_preset(cls.info.name, {"preset": preset, **fields}))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Read the config of a folder, or of a Hub id with safetensors weights.

        A folder may hold the config alone, as `save_pretrained` of a config leaves it; no adapter is loaded from it.

        Raises:
            ConfigError: there are weights that are no safetensors, or the config is not what it should be.
        """
        # Without a safetensors file peft would go on to pickled weights, so that is refused before it reads any.
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        if not folder.is_dir():
            _check_repository(pretrained_model_name_or_path, subfolder, kwargs)
        else:
            safe_files.check_folder(folder)
        if folder.is_dir() and not (folder / ADAPTER_WEIGHTS).is_file() and (folder / WEIGHTS_NAME).exists():
            raise ConfigError(f'"{folder}" has no {ADAPTER_WEIGHTS}; only safetensors files are read.')
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        if folder.is_dir() and not (folder / ADAPTER_WEIGHTS).is_file():
            config.read_alone = str(folder)
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Read an adapter_config.json within the limits of `safe_files`.

        No regex of modules in it is run, but for a fast one in a config without weights. Empty values of unknown keys,
        which a newer peft writes, are left out.
        """
        path = Path(path_json_file)
        weights = path.parent / ADAPTER_WEIGHTS
        values = known_values(cls, safe_files.read_json(path))
        if weights.is_file() or values.get("fingerprints"):
            header = safe_files.read_header(weights) if weights.is_file() else {}
            return without_patterns(values, header, f"{cls.info.name}_", f'"{path}"')
        # Nothing tells the modules of a config alone, so its regexes stay for the model that it will be put on.
        for name in pattern_fields(values):
            check_key_pattern(name, values[name])
        return values

    def __post_init__(self) -> None:
        # peft's own `__post_init__` reads its fields, so they are checked before it runs.
        self._check_types(guard_only=True)
        has_regex = isinstance(self.target_modules, str) or isinstance(self.exclude_modules, str)
        if has_regex and isinstance(self.fingerprints, dict) and self.fingerprints:
            # The config is from a file: its regexes are not run, the recorded modules take their place.
            self.target_modules, self.exclude_modules = sorted(map(str, self.fingerprints)), None
        super().__post_init__()
        # The file of another method has the same shared fields; its type alone tells it apart.
        if self.peft_type is not None and str(getattr(self.peft_type, "value", self.peft_type)) != str(
            getattr(self.peft_method_type, "value", self.peft_method_type)
        ):
            raise ConfigError(f'{type(self).__name__} cannot hold an adapter of type "{self.peft_type}".')
        # A file that does not know the choice, as only a file gives a type, was trained in training mode.
        if self.backbone_eval is None:
            self.backbone_eval = self.authors_backbone_eval and self.peft_type is None
        self.peft_type = self.peft_method_type
        # JSON has neither sets nor tuples; as sorted lists, equal choices are saved alike.
        for name in ("target_modules", "target_parameters", "exclude_modules", "modules_to_save"):
            if isinstance(getattr(self, name), set | tuple):
                setattr(self, name, sorted(getattr(self, name)))
        self._check_types()
        check_patterns({f.name: getattr(self, f.name) for f in fields(self)})
        if self.trainable_token_indices is not None:
            check_indices(self.trainable_token_indices)
        if self.fingerprints is not None:
            safe_files.check_fingerprints(self.fingerprints, f'the config of method "{self.info.name}"')
        if self.target_parameters and not self.info.can("experts"):
            raise ConfigError(
                f'Method "{self.info.name}" cannot adapt stacked weights of experts; leave target_parameters out. '
                "`peft-lab methods` shows which methods can."
            )
        if self.layers_to_transform == []:
            raise ConfigError("layers_to_transform=[] names no block to adapt; name some, or leave it out for all.")
        self.check()

    def check(self) -> None:
        """Check a method's own fields; methods override this.

        Raises:
            ConfigError: a field is out of range or does not go with another one.
        """

    def row_inputs(self) -> tuple[RowInput, ...]:
        """Row inputs that the adapter reads; none for most methods.

        They are arguments of the model's forward with one value per row of the batch.
        """
        return ()

    @property
    def merges(self) -> bool:
        """True if an adapter of this config can be merged; by default what the method's card declares."""
        return self.info.can("merge")

    def set_merge_fields(self, values: Mapping[str, Any]) -> None:
        """Set fields of `merge_fields`, which choose what a merge stands for.

        Raises:
            ConfigError: another field, or a value that it does not take.
        """
        check_keys(values, self.merge_fields, f'a merge of method "{self.info.name}"')
        for name, value in values.items():
            setattr(self, name, value)
        self._check_types()
        self.check()

    def to_dict(self) -> dict[str, Any]:
        """Convert the config to plain values.

        The fingerprints are those of the base that the adapter was put on.
        """
        values = super().to_dict()
        values["fingerprints"] = getattr(self, "recorded_fingerprints", None) or self.fingerprints
        return values

    def check_sizes(self, largest: int) -> None:
        """Refuse sizes that no adapter on this base can have.

        This runs before anything is allocated for them.

        Args:
            largest: the largest dimension of the base's weights; a field may say otherwise in its metadata as `most`.

        Raises:
            ConfigError: naming the field.
        """
        for f in fields(self):
            most = f.metadata.get("most", max(largest, _SMALL))
            value = getattr(self, f.name)
            if f.name not in _NO_SIZES and "seed" not in f.name and any(abs(v) > most for v in _ints(value)):
                raise ConfigError(f"{f.name}={value} is larger than anything in this base: at most {most}.")

    def _check_types(self, guard_only: bool = False) -> None:
        cls: Any = type(self)
        hints = type_hints(cls)
        for name in (f.name for f in fields(self) if (f.name in PEFT_HINTS) == guard_only):
            value = getattr(self, name)
            # peft's enums (`TaskType.SEQ_CLS`) count as the text that they are saved as.
            value = value.value if isinstance(value, Enum) else value
            if not fits(value, hints[name]):
                raise ConfigError(
                    f'{name}={shorten(value)} does not fit method "{self.info.name}": expected {_spell(hints[name])}.'
                    + (did_you_mean(value, typing.get_args(hints[name])) if isinstance(value, str) else "")
                )


def known_values(cls: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Leave out the empty values of keys that a config class does not know.

    A newer peft writes new fields into every file, and an empty one has no effect.
    """
    known = {f.name for f in fields(cls)}
    return {key: value for key, value in values.items() if value is not None or key in known}


#: peft's own fields, which peft takes as they come.
PEFT_HINTS: dict[str, Any] = {
    "task_type": Literal[(None, *(task.value for task in TaskType))],
    "peft_type": str | None,
    "auto_mapping": dict[str, str | None] | None,
    "peft_version": str | None,
    "base_model_name_or_path": str | None,
    "revision": str | None,
    "inference_mode": bool,
}
#: Fields whose integers are no sizes, as seeds are not.
_NO_SIZES = frozenset((*PEFT_HINTS, "layers_to_transform", "trainable_token_indices", "fingerprints"))


# Annotations are text that Python evaluates, so that is done once per class.
@lru_cache(maxsize=256)
def type_hints(cls: type) -> dict[str, Any]:
    """Types of a config class's fields by name.

    Those of the fields that all of peft's configs share are stricter than peft's own.
    """
    return {**typing.get_type_hints(cls), **PEFT_HINTS}


def check_patterns(values: dict[str, Any]) -> None:
    """Check the config values that peft matches against module names.

    These are regexes, names, and names that peft puts into a regex.

    Raises:
        ConfigError: naming the field.
    """
    for name, value in values.items():
        if name.endswith("_modules") and isinstance(value, str):
            check_pattern(name, value)
        elif name.endswith("_pattern") and isinstance(value, dict):
            for key in value:
                check_key_pattern(name, str(key))
        elif name in ("layers_pattern", "modules_to_save", "target_parameters", "trainable_token_indices"):
            # peft builds a regex around such a name, so it must have no special characters; numbers have none.
            for part in [value] if isinstance(value, str) else value or ():
                if not re.fullmatch(r"[\w.\-]{1,1000}", str(part)):
                    raise ConfigError(f"{name} holds {shorten(part)}, which is no module name.")


def fits(value: Any, hint: Any) -> bool:
    """Test whether a value fits a type hint and is not huge.

    Hints are made of unions, literals, containers, dataclasses, enums and plain types.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return _fits_any(value, args)
    if origin is Literal:
        # 1 == True in Python, so the types must agree as well.
        return any(value == arg and type(value) is type(arg) for arg in args)
    if origin in (list, set, tuple) or hint in (list, set, tuple):
        inner = [arg for arg in args if arg is not Ellipsis] or [Any]
        plain = isinstance(value, list | tuple | set) and len(value) <= safe_files.MAX_NAMES
        return plain and all(_fits_any(v, inner) for v in value)
    if origin is dict or hint is dict:
        key, item = args or (str, Any)
        plain = isinstance(value, dict) and len(value) <= safe_files.MAX_NAMES
        return plain and all(fits(k, key) and fits(v, item) for k, v in value.items())
    # bool is a subclass of int, but no number in a config.
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    if hint is str:
        return isinstance(value, str) and len(value) <= safe_files.MAX_REGEX
    if is_dataclass(hint):
        return isinstance(value, dict) and {*value} <= {f.name for f in fields(hint)}
    if isinstance(hint, type) and issubclass(hint, Enum):
        return value in [member.value for member in hint]
    return isinstance(value, hint) if isinstance(hint, type) else False


def _fits_any(value: Any, hints: Iterable[Any]) -> bool:
    return any(fits(value, hint) for hint in hints)


def _ints(value: Any) -> list[int]:
    """Integers in a config value, those within lists and dicts included."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        found: list[int] = []
        for part in value:
            found += _ints(part)
        return found
    return [value] if isinstance(value, int) and not isinstance(value, bool) else []


def _check_repository(name: str, subfolder: str | None, options: dict[str, Any]) -> None:
    """Refuse a repository of the Hub without a safetensors file.

    peft itself takes pickled weights from such a repository.

    Raises:
        ConfigError: the repository, or offline the cache, has no such file.
    """
    from huggingface_hub import constants, file_exists, try_to_load_from_cache

    file = f"{subfolder}/{ADAPTER_WEIGHTS}" if subfolder else ADAPTER_WEIGHTS
    revision, token = options.get("revision"), options.get("token")
    if constants.HF_HUB_OFFLINE:
        found = isinstance(try_to_load_from_cache(name, file, options.get("cache_dir"), revision), str)
    else:
        found = file_exists(name, file, revision=revision, token=token)
    if not found:
        raise ConfigError(f'"{name}" has no {file}; only safetensors files are read.')


def shorten(value: Any) -> str:
    """Representation of a value for a message, at most 200 characters."""
    shown = repr(value)
    return shown if len(shown) <= 200 else f"{shown[:200]}..."


def _spell(hint: Any) -> str:
    return str(hint).replace("typing.", "") if typing.get_origin(hint) else getattr(hint, "__name__", str(hint))
