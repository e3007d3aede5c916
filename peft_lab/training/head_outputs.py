"""Inputs and outputs of the task head of a loaded run, for rows of any task of its kind."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.utils.data import DataLoader

from peft_lab.backbones import module_roles
from peft_lab.data import prompt_column
from peft_lab.data.task_schema import Task
from peft_lab.metrics.out_of_distribution import HeadOutputs

if TYPE_CHECKING:
    from datasets import Dataset

    from peft_lab.loading.load_run import Loaded


def batches(loaded: Loaded, model: Any, task: Task, rows: Dataset, size: int) -> Iterator[dict[str, Any]]:
    """Batches of rows as a model takes them, on the device of the process; the model is moved there.

    Args:
        loaded: run whose kind and processor prepare the rows.
        model: its model, or the base.
        task: task of the rows.
        rows: the rows, with encoded labels.
        size: rows of a batch.
    """
    device = PartialState().device
    model.to(device)
    rows = prompt_column.for_model(rows, model, task)
    prepared: Any = loaded.kind.preprocess(rows, loaded.processor, task, model)
    prepared = loaded.kind.evaluation_rows(prepared, loaded.processor, task)
    for batch in DataLoader(prepared, size, collate_fn=loaded.kind.data_collator(loaded.processor, task, model)):
        yield {name: value.to(device) for name, value in batch.items()}


@torch.no_grad()
def head_outputs(loaded: Loaded, model: Any, task: Task, rows: Dataset, size: int) -> HeadOutputs:
    """Pooled inputs of the task head, and its logits.

    n is the number of rows, or of the tokens that have a class, where each has one. Features of several positions are
    averaged over those without padding; logits are None where they are not (n, classes).

    Args:
        loaded, model, task, rows, size: as for `batches`.
    """
    seen: list[Any] = []
    handle = called_head(model).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    features, labels, logits = [], [], []
    try:
        for batch in batches(loaded, model, task, rows, size):
            classes = batch.pop("labels").cpu()
            # a backbone may call its head more than once; the first call counts
            seen.clear()
            found_logits = model(**batch).logits.float().cpu()
            found = seen[0].float().cpu()
            if classes.ndim == 2 and found.ndim == 3:
                # a class for each token, or -100 for none
                kept = classes >= 0
                features.append(found[kept])
                labels.append(classes[kept])
            else:
                mask = batch.get("attention_mask")
                features.append(pooled(found, None if mask is None else mask.cpu()))
                labels.append(classes)
                logits.append(found_logits)
    finally:
        handle.remove()
    whole = torch.cat(logits).numpy() if logits and logits[0].ndim == 2 else None
    return HeadOutputs(torch.cat(features).numpy(), whole, torch.cat(labels).numpy())


def called_head(model: Any) -> nn.Module:
    """Module that a model calls as its task head, with what an adapter has put around the head."""
    unwrapped: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
    # peft keeps the head it trains beside the original, below a wrapper in the head's place; an adapter's layer stands
    # there too, and one that gives the logits itself never calls the head inside of it
    path = re.split(r"\.(?:original_module|modules_to_save|base_layer)\b", module_roles.head_modules(unwrapped)[0])[0]
    return unwrapped.get_submodule(path)


def pooled(features: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of features over positions without padding, (n, features)."""
    if features.ndim == 3 and mask is not None and mask.shape == features.shape[:2]:
        weights = mask.unsqueeze(-1).to(features.dtype)
        return (features * weights).sum(1) / weights.sum(1).clamp(min=1)
    if features.ndim == 3:
        return features.mean(1)
    # feature maps of images have their channels before height and width
    return features.flatten(2).mean(-1) if features.ndim > 3 else features
