"""Code in examples and pages, checked without running it: it compiles, and what it imports and calls exists."""

from __future__ import annotations

import ast
import importlib
from types import ModuleType


def missing_names(code: str) -> list[str]:
    """Names that some code imports, or reads from a module that it has imported, and that do not exist.

    Raises:
        SyntaxError: the code does not compile.
    """
    tree = ast.parse(code)
    modules: dict[str, ModuleType] = {}
    missing: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                module = importlib.import_module(alias.name)
                bound = alias.asname or alias.name.partition(".")[0]
                modules[bound] = module if alias.asname else importlib.import_module(bound)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            missing += [f"{node.module}.{alias.name}" for alias in node.names if not hasattr(module, alias.name)]
    read = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    for node in read:
        owner = ast.unparse(node.value)
        if owner in modules and not hasattr(modules[owner], node.attr):
            missing.append(f"{owner}.{node.attr}")
    return missing
