"""Class and register tokens, which stand before the patches of a vision transformer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft_lab.backbones.family_table import FAMILIES

if TYPE_CHECKING:
    from torch import nn

#: Names of the tokens before the patches in any family.
_NAMES = sorted(set().union(*(family.prefix_tokens for family in FAMILIES.values())))


def prefix_tokens(model: nn.Module, path: str) -> int:
    """Number of tokens before the patches of the vision backbone at a path; 0 for text."""
    stack: Any = model.get_submodule(path)
    if getattr(stack.config, "patch_size", None) is None:
        return 0
    # The embedding is in the stack or in a module around it: outwards until one has patches.
    parts = path.split(".") if path else []
    for depth in range(len(parts), -1, -1):
        around = model.get_submodule(".".join(parts[:depth]))
        if any("patch" in name for name, _ in around.named_modules()):
            found = {n.rpartition(".")[2]: p for n, p in around.named_parameters() if "embed" in n}
            family = FAMILIES.get(stack.config.model_type)
            names = _NAMES if family is None else family.prefix_tokens
            return sum(found[name].numel() // found[name].shape[-1] for name in names if name in found)
    return 0
