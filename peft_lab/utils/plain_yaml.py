"""YAML of tasks, runs and studies: plain values, and no key twice.

One of two equal keys would have no effect.
"""

from __future__ import annotations

from typing import Any

import yaml


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
        yaml.YAMLError: it is not YAML, builds more than plain values, or gives a key twice.
    """
    return yaml.load(text, Loader=_Loader)
