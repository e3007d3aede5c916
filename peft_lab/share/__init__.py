"""Give adapters to others: push to the Hub, convert to LoRA."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft_lab.share.hub import push
    from peft_lab.share.lora import to_lora

__all__ = ["push", "to_lora"]

_LAZY = {"push": "hub", "to_lora": "lora"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"peft_lab.share.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'peft_lab.share' has no attribute {name!r}")
