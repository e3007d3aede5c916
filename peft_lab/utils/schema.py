"""Closed schemas on pydantic, with error messages of one sentence."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from peft_lab.errors import PeftLabError, did_you_mean

#: Plain words for what pydantic's errors ask for, by the beginning of their type.
_WANTED = {
    "string": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping",
    "mapping": "a mapping",
}
_TYPE_NAMES = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a mapping",
    type(None): "empty",
}


class Schema(BaseModel):
    """Base of the schemas.

    An unknown key is an error, and no value is converted to another type.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _number(value: Any) -> Any:
    # YAML 1.1 reads 1e-3, which has no dot, as text.
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


#: Field type of a number that a YAML file may write as 1e-3.
Number = Annotated[float, BeforeValidator(_number)]

S = TypeVar("S", bound=Schema)


def check(schema: type[S], values: Any, what: str, error: type[PeftLabError]) -> S:
    """Check a mapping against a schema and return the schema's object.

    `what` names the mapping in messages.

    Raises:
        PeftLabError: of the given class, about the first thing that is wrong.
    """
    if not isinstance(values, Mapping):
        raise error(f"{what} must be a mapping of keys to values, not {describe(values)}.")
    try:
        return schema.model_validate(dict(values))
    except ValidationError as failure:
        raise error(_sentence(failure, list(schema.model_fields), what)) from failure


def unknown_key(key: str, known: Sequence[str], what: str) -> str:
    """Sentence about a key that is not known."""
    return f'unknown key "{key}" in {what}.{did_you_mean(key, known)} Known: {", ".join(known)}.'


def describe(value: Any) -> str:
    """Name a value's type in plain words, with the value itself."""
    name = _TYPE_NAMES.get(type(value), f"a value of type {type(value).__name__}")
    return name if isinstance(value, (list, dict, type(None))) else f"{name} ({str(value)[:60]!r})"


def _sentence(failure: ValidationError, known: list[str], what: str) -> str:
    """One sentence about the first error.

    Unknown keys come before missing ones, and these before wrong values.
    """
    errors: list[Any] = failure.errors(include_url=False)
    # a misspelt key makes another one missing, and its own message names the nearest key
    order = {"extra_forbidden": 0, "invalid_key": 0, "missing": 1}
    first = min(errors, key=lambda error: order.get(error["type"], 2))
    error_type, location, value = first["type"], first["loc"], first["input"]
    key = ".".join(str(step) for step in location)
    if error_type == "extra_forbidden":
        return unknown_key(key, known, what)
    if error_type == "invalid_key":  # YAML reads the keys on, 3 and null as no texts
        return unknown_key(str(value), known, what)
    if error_type == "missing":
        return f'the key "{key}" is missing in {what}.'
    if error_type == "value_error":  # raised by a validator of ours
        return str(first["ctx"]["error"])
    if error_type == "literal_error":
        choices = re.findall(r"'(.*?)'", first["ctx"]["expected"])
        near = did_you_mean(str(value), choices)
        return f'"{key}" in {what} must be one of {", ".join(choices)}, not "{value}".{near}'
    if error_type == "too_short":
        return f'"{key}" in {what} must not be empty.'
    for bound, words in (("ge", "at least"), ("gt", "over"), ("le", "at most")):
        if bound in first.get("ctx", ()):
            return f'"{key}" in {what} must be {words} {first["ctx"][bound]:g}, not {value}.'
    return _wrong_type(key, first, what)


def _wrong_type(key: str, first: Mapping[str, Any], what: str) -> str:
    wanted = _WANTED.get(first["type"].partition("_")[0])
    if wanted is None:
        return f'"{key}" in {what}: {first["msg"]}, not {describe(first["input"])}.'
    number = isinstance(first["input"], (int, float))
    hint = f' Put it in quotes: "{first["input"]}".' if wanted == "text" and number else ""
    return f'"{key}" in {what} must be {wanted}, not {describe(first["input"])}.{hint}'
