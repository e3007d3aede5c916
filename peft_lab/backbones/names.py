"""Helpers for module names, paths and regexes. Imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

#: Prefix of all module names of the base below a `PeftModel`, in state dicts and adapter files.
PEFT_PREFIX = "base_model.model."
#: Attribute in which peft's layers, and ours, keep the module that they wrap, within a path.
WRAPPED = re.compile(r"\.base_layer(?![^.])")


def unwrap(model: Any) -> Any:
    """Return the base model of a `PeftModel`; other models as they are."""
    # The test by attribute spares the import of peft.
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def model_type(module: Any) -> str | None:
    """Return the `model_type` of a transformers model; None for other modules."""
    # Many inner modules of transformers hold the config too; only whole models have this prefix.
    if not hasattr(module, "base_model_prefix"):
        return None
    return getattr(getattr(module, "config", None), "model_type", None)


def without_adapters(module: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the modules of a base by path, as if no adapter were on it.

    An adapter around a module gives the module in its place, under the path of the wrapper.
    """
    while (inside := _adapted(module)) is not None:
        module = inside
    yield path, module
    for name, child in module.named_children():
        yield from without_adapters(child, join(path, name))


def _adapted(module: Any) -> Any:
    """Return the module inside of an adapter's layer or of a wrapper of peft; None for other modules."""
    children = module._modules
    # The attributes in which peft's layers, ours and peft's wrappers of saved modules keep the base. A wrapper of
    # trained tokens has an empty one, because its base stands inside of a layer of its own.
    for name in ("base_layer", "original_module"):
        if name in children:
            return children[name] if children[name] is not None else children.get("token_adapter")
    return None


def join(path: str, name: str) -> str:
    """Join two paths, each of which may be empty."""
    return f"{path}.{name}" if path and name else path or name


def is_under(path: str, parent: str) -> bool:
    """Test whether a path is another one or lies below it."""
    return path == parent or path.startswith(f"{parent}.")


def ends_with(path: str, name: str) -> bool:
    """Test whether peft finds a path by a name in `target_modules`."""
    return path == name or path.endswith(f".{name}")


def any_of(patterns: Iterable[str]) -> str:
    """Return one regex for several."""
    patterns = list(patterns)
    return patterns[0] if len(patterns) == 1 else f"(?:{'|'.join(patterns)})"


def path_regex(path: str) -> str:
    """Return a path as a regex; every `*` is any index."""
    return re.escape(path).replace(r"\*", r"\d+")
