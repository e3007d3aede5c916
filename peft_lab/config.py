"""The config fields that every method of peft-lab shares, checked as a closed schema."""

from __future__ import annotations

import re
import types
import typing
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from peft.config import PeftConfig

from peft_lab.errors import ConfigError, check_keys, did_you_mean
from peft_lab.registry import MethodInfo

_MAX_NAMES = 100_000


@dataclass
class AdapterConfig(PeftConfig):
    """Base of every config class; field names are peft's where peft has them.

    Raises:
        ConfigError: a field has the wrong type or an unknown key came from a file.
    """

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Modules to adapt: names, one regex, or nothing for the method's default roles."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules not to adapt: names or one regex."}
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules trained in full and saved; nothing means the task head if the model has one."},
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the blocks to adapt; nothing means all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the module list that holds the blocks, for unusual models."}
    )
    fingerprints: dict[str, dict[str, Any]] | None = field(
        default=None, metadata={"help": "Filled in when saved: which base weights the adapter belongs to."}
    )
    requires: str = field(
        default="peft-lab", metadata={"help": "Filled in: the package to import before loading this adapter."}
    )

    #: Set by `peft_lab.registry.register`.
    peft_method_type: ClassVar[Any] = None
    info: ClassVar[MethodInfo]

    def __new__(cls, *args: Any, **kwargs: Any) -> AdapterConfig:
        # peft drops unknown keys of a file with a warning; a knob that is ignored must be an error instead.
        check_keys(kwargs, (f.name for f in fields(cls)), f'the config of method "{cls.info.name}"')
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.peft_type is not None and str(getattr(self.peft_type, "value", self.peft_type)) != str(
            getattr(self.peft_method_type, "value", self.peft_method_type)
        ):
            raise ConfigError(f'{type(self).__name__} cannot hold an adapter of type "{self.peft_type}".')
        self.peft_type = self.peft_method_type
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            if isinstance(getattr(self, name), set | tuple):
                setattr(self, name, sorted(getattr(self, name)))
        self._check_types()
        for name in ("target_modules", "exclude_modules"):
            _check_regex(name, getattr(self, name))
        self.check()

    def check(self) -> None:
        """Raise `ConfigError` where a method's own fields do not fit; methods override it."""

    def to_dict(self) -> dict[str, Any]:
        """The config as plain values, with the fingerprints of the base it was put on."""
        values = super().to_dict()
        values["fingerprints"] = getattr(self, "recorded_fingerprints", None) or self.fingerprints
        return values

    def _check_types(self) -> None:
        hints = typing.get_type_hints(type(self))
        for name in (f.name for f in fields(self) if f.name not in _PEFT_FIELDS):
            value = getattr(self, name)
            if not _fits(value, hints[name]):
                raise ConfigError(
                    f'{name}={value!r} does not fit method "{self.info.name}": expected {_spell(hints[name])}.'
                    + (did_you_mean(value, typing.get_args(hints[name])) if isinstance(value, str) else "")
                )


_PEFT_FIELDS = frozenset(f.name for f in fields(PeftConfig))


def _check_regex(name: str, value: Any) -> None:
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise ConfigError(f"{name}={value!r} is not a valid regular expression: {error}.") from error


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is of a type hint made of unions, literals, lists, dicts and plain types."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return any(value == arg and type(value) is type(arg) for arg in args)
    if origin is list:
        return isinstance(value, list) and len(value) <= _MAX_NAMES and all(_fits(v, args[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(k, args[0]) and _fits(v, args[1]) for k, v in value.items())
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _spell(hint: Any) -> str:
    return str(hint).replace("typing.", "") if typing.get_origin(hint) else getattr(hint, "__name__", str(hint))
