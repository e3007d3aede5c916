"""Facts read out of Python source without importing it.

Listing and validating need no torch that way.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Field:
    """Dataclass field as its source shows it.

    The annotation is text, and the default is known if it is a literal.
    """

    name: str
    annotation: str
    default: Any = None
    help: str = ""


@lru_cache(maxsize=256)
def parse(path: Path) -> ast.Module:
    """Parse one source file; cached per path."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _literal(node: ast.AST | None) -> Any:
    try:
        return ast.literal_eval(node) if node is not None else None
    except (ValueError, TypeError):
        return None


def module_call(path: Path, name: str) -> dict[str, Any] | None:
    """Keyword arguments of the module-level `name = Something(key=literal, ...)`.

    None if there is no such line.
    """
    for node in _statements(path, name):
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Call)
            and any(isinstance(t, ast.Name) and t.id == name for t in node.targets)
        ):
            return {k.arg: ast.literal_eval(k.value) for k in node.value.keywords if k.arg}
    return None


def _statements(path: Path, name: str) -> list[ast.stmt]:
    """Module-level statements among which the first assignment to a name is."""
    text = path.read_text(encoding="utf-8")
    if name not in text:
        return []
    # Files of methods and kinds are long and all of them are listed, so that the lines of the call alone are parsed.
    start = re.search(rf"^{re.escape(name)} = ", text, re.MULTILINE)
    end = re.compile(r"^\)$", re.MULTILINE).search(text, start.end()) if start else None
    if start and end:
        try:
            return ast.parse(text[start.start() : end.end()]).body
        except SyntaxError:  # it ends elsewhere
            pass
    return parse(path).body


def classes(path: Path) -> dict[str, ast.ClassDef]:
    """All module-level classes of a file by name."""
    return {node.name: node for node in parse(path).body if isinstance(node, ast.ClassDef)}


def base_names(node: ast.ClassDef) -> list[str]:
    """Names of the direct base classes, without their modules."""
    found = []
    for base in node.bases:
        if isinstance(base, ast.Name):
            found.append(base.id)
        elif isinstance(base, ast.Attribute):
            found.append(base.attr)
    return found


def class_fields(node: ast.ClassDef) -> dict[str, Field]:
    """Annotated fields in a class body, in order, without inherited ones."""
    fields = {}
    for line in node.body:
        if not (isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)):
            continue
        if "ClassVar" in ast.unparse(line.annotation):
            continue
        default, help_text = _literal(line.value), ""
        if isinstance(line.value, ast.Call):
            options = {k.arg: k.value for k in line.value.keywords}
            factory = options.get("default_factory")
            # lists are made anew for each instance
            default = _literal(factory.body if isinstance(factory, ast.Lambda) else options.get("default"))
            metadata = options.get("metadata")
            if isinstance(metadata, ast.Dict):
                pairs = {_literal(k): v for k, v in zip(metadata.keys, metadata.values, strict=True)}
                help_text = str(_literal(pairs.get("help")) or "")
        fields[line.target.id] = Field(line.target.id, ast.unparse(line.annotation), default, help_text)
    return fields


def dataclass_fields(path: Path, class_name: str, elsewhere: dict[str, Path] | None = None) -> dict[str, Field]:
    """Fields of a dataclass with those that it inherits.

    `elsewhere` maps base classes to the files that they stand in.
    """
    known = classes(path)
    if class_name not in known:
        return {}
    node = known[class_name]
    fields: dict[str, Field] = {}
    # bases first, because a class replaces inherited fields in their places, as dataclasses do
    for base in base_names(node):
        where = path if base in known else (elsewhere or {}).get(base)
        if where is not None:
            fields.update(dataclass_fields(where, base, elsewhere))
    fields.update(class_fields(node))
    return fields


def sets_attribute(path: Path, name: str) -> bool:
    """Test whether a class of a file sets a class attribute."""
    for node in classes(path).values():
        for line in node.body:
            targets = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return True
    return False
