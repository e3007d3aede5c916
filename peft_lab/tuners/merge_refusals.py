"""Reasons for which a merge is refused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peft_lab.registry import CAPABILITIES, MethodInfo

#: Error message for a base whose weights are sharded.
SHARDED_MERGE = (
    "The base is sharded over processes, and a merged weight would be lost when it is gathered; save the adapter, and "
    "merge it in one process (`peft-lab merge`)."
)


def no_merge(info: MethodInfo, fields: Iterable[str] = ()) -> str:
    """Error message for a method without the capability `merge`.

    Args:
        info: the method's card.
        fields: fields of its config by which an adapter can be merged all the same.
    """
    reasons = {
        "sequence": "its prompts are tokens of the sequence, and no weight of the base stands for them",
        "head": "it gives the logits in place of the head, and no weight of the base stands for that",
        "input": "it changes what goes into the base, and no weight of the base stands for that",
    }
    reason = reasons.get(info.place, f"it does not declare that it {CAPABILITIES['merge']}")
    mend = f"; {', '.join(fields)} in its config chooses what a merge stands for" if fields else ""
    return f'Method "{info.name}" cannot be merged, because {reason}{mend}.'


def check_mergeable(info: MethodInfo, configs: Iterable[Any]) -> None:
    """Raise `NotImplementedError` unless all adapters with these configs can be merged."""
    for config in configs:
        if not config.merges:
            raise NotImplementedError(no_merge(info, config.merge_fields))
