"""YAML of tasks, runs and studies: plain values, no key twice, within limits.

One of two equal keys would have no effect. The limits are checked before anything is built: the parser recurses in C,
where a deep text would end the interpreter, and an alias stands for all that it refers to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from peft_lab.errors import ConfigError, PeftLabError
from peft_lab.utils.bounded_files import MAX_DEPTH, read_bytes

MAX_BYTES = 512 * 1024
#: Values of one file, those behind aliases counted each time.
MAX_VALUES = 50_000


# PyYAML may be installed without the fast parser in C
class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML's safe loader, made to refuse a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            # keys of other types may have no hash, and are refused by whoever reads the file
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f'the key "{key}" is given twice', key_node.start_mark
                )
            seen.add(key if isinstance(key, str) else id(key_node))
        return super().construct_mapping(node, deep)


def read(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        yaml.YAMLError: it is not YAML, builds more than plain values, gives a key twice, or is beyond the limits.
    """
    if len(text) > MAX_BYTES:
        raise yaml.YAMLError(f"it has {len(text):,} characters, more than {MAX_BYTES:,}")
    _check_limits(text)
    try:
        return yaml.load(text, Loader=_Loader)
    # a date such as 2024-13-45, a number of 5,000 digits, an unhashable key
    except (ValueError, TypeError) as error:
        raise yaml.YAMLError(str(error)) from error


def read_file(path: Path, error: type[PeftLabError] = ConfigError) -> Any:
    """The value of a YAML file, or of one of JSON.

    Raises:
        PeftLabError: of the given class: the file cannot be read, or as `read`.
    """
    data = read_bytes(path, MAX_BYTES, error)
    try:
        return read(data.decode("utf-8-sig"))
    except UnicodeDecodeError as failure:
        raise error(f'"{path}" cannot be read as UTF-8: {failure}.') from failure
    except yaml.YAMLError as failure:
        mark = getattr(failure, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        # of a wrong indentation the parser says what it has not found
        mend = "; look at the indentation of this line" if isinstance(failure, yaml.parser.ParserError) else ""
        raise error(
            f'"{path}" is not readable YAML or JSON{where}: {" ".join(str(failure).split())}{mend}.'
        ) from failure


def _check_limits(text: str) -> None:
    """Raise `yaml.YAMLError` for a text that is too deep, or too large with its aliases."""
    sizes: dict[str, int] = {}
    # the anchors of the open collections, and the number of values before each
    open_collections: list[tuple[str | None, int]] = []
    values = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent):
            # without a size it is an alias of what it stands in, or of nothing
            if event.anchor not in sizes:
                raise yaml.YAMLError(f'the alias "{event.anchor}" refers to nothing before it')
            values += sizes[event.anchor]
        elif isinstance(event, yaml.CollectionStartEvent):
            open_collections.append((event.anchor, values))
            values += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_collections.pop()
            if anchor is not None:
                sizes[anchor] = values - before
        elif isinstance(event, yaml.ScalarEvent):
            values += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
        if len(open_collections) > MAX_DEPTH:
            raise yaml.YAMLError(f"it is nested more than {MAX_DEPTH} levels deep")
        if values > MAX_VALUES:
            raise yaml.YAMLError(f"it holds more than {MAX_VALUES:,} values, those behind aliases included")
