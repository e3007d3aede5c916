"""Features of a frozen backbone: what a head reads of each row, computed once in evaluation mode.

Stored are the input of the head's first layer, float32 (rows, width), and for methods that read tokens the last hidden
states, float32 (rows, tokens, width), with a mask of the tokens of padded texts. Their key is a hash of the backbone's
weights and buffers, of the rows, of the processor and of the versions of the libraries.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peft_lab.adapter_files.base_fingerprint import weight_hash
from peft_lab.backbones.head_features import HeadFeatures
from peft_lab.features import store
from peft_lab.utils.versions import versions

#: Names of the stored arrays.
POOLED, TOKENS, MASK = "pooled", "tokens", "mask"


def features_key(model: nn.Module, facts: HeadFeatures, rows: str, processor: str) -> str:
    """Content hash of the features of some rows.

    Args:
        model: the model with its head.
        facts: facts of its head.
        rows: fingerprint of the rows.
        processor: identity of the image processor or tokenizer.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.get_submodule(facts.backbone).state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {weight_hash(tensor)}\n".encode())
    device = next(model.parameters()).device.type
    # Facts of the head's classes are of no account, because the features end before it.
    known = {name: value for name, value in asdict(facts).items() if name not in ("classes", "heads")}
    rest = [type(model).__name__, known, rows, processor, device, versions()]
    digest.update(json.dumps(rest, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def features_of(
    key: str, model: nn.Module, facts: HeadFeatures, batches: Callable[[], Iterator[Mapping[str, Any]]], tokens: bool
) -> dict[str, np.ndarray]:
    """Features of some rows by name, from the store or computed.

    What is stored with the tokens of the rows serves methods that read the pooled features alone as well.

    Args:
        key: `features_key` of them.
        model: the model; its head may carry an adapter, its backbone may not.
        facts: facts of its head.
        batches: makes the batches of the rows, in order.
        tokens: give the tokens too.
    """
    with_tokens = f"{key}-{TOKENS}"
    whole = tokens or store.is_stored(with_tokens)
    found = store.stored(with_tokens if whole else key, lambda: _computed(model, facts, batches(), whole))
    return found if tokens else {POOLED: found[POOLED]}


@torch.no_grad()
def _computed(
    model: nn.Module, facts: HeadFeatures, batches: Iterator[Mapping[str, Any]], tokens: bool
) -> dict[str, np.ndarray]:
    device, training = next(model.parameters()).device, model.training
    found: dict[str, list[np.ndarray]] = {}
    model.eval()
    try:
        with captured(model, facts) as seen:
            for batch in batches:
                inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
                model(**inputs)
                values = {POOLED: seen[POOLED]}
                if tokens:
                    values[TOKENS] = seen[TOKENS]
                    if "attention_mask" in inputs:
                        values[MASK] = inputs["attention_mask"]
                for name, value in values.items():
                    found.setdefault(name, []).append(_array(value))
    finally:
        model.train(training)
    return {name: _joined(parts) for name, parts in found.items()}


@contextmanager
def captured(model: nn.Module, facts: HeadFeatures) -> Iterator[dict[str, Tensor]]:
    """Pooled feature and last hidden states of the calls inside, by name; each call replaces those of the last."""
    seen: dict[str, Tensor] = {}

    def read_pooled(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen[POOLED] = args[0]

    def read_output(module: nn.Module, args: Any, output: Any) -> None:
        hidden = getattr(output, "last_hidden_state", None)
        if hidden is not None:
            seen[TOKENS] = hidden

    hooks = [
        model.get_submodule(facts.first).register_forward_pre_hook(read_pooled),
        model.get_submodule(facts.backbone).register_forward_hook(read_output),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _array(value: Tensor) -> np.ndarray:
    value = value.detach().cpu()
    return (value.float() if value.is_floating_point() else value.bool()).numpy()


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """Batches one behind the other; texts that were padded to different lengths get zeros at the right."""
    longest = max(part.shape[1] for part in parts)
    if parts[0].ndim == 4 or all(part.shape[1] == longest for part in parts):
        return np.concatenate(parts)
    padded = []
    for part in parts:
        room = [(0, 0)] * part.ndim
        room[1] = (0, longest - part.shape[1])
        padded.append(np.pad(part, room))
    return np.concatenate(padded)
