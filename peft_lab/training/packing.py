"""Packing: several rows of a decoder in one sequence, each of which sees itself alone.

Positions start again at each row. Transformers makes the attention mask of them where no other mask is given, so the
losses and gradients are those of padded rows; the first batch is checked for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel

from peft_lab.errors import ConfigError
from peft_lab.registry import MethodInfo

if TYPE_CHECKING:
    from datasets import Dataset

    from peft_lab.data.kind import Kind
    from peft_lab.data.task_schema import Task

IGNORED = -100
#: Columns that can be packed, and the one that packed rows need not.
_PACKED, _MASK = ("input_ids", "labels"), "attention_mask"
#: Relative difference of the logits of packed rows from those of each alone that rounding may leave, by bytes.
_TOLERANCE = {4: 1e-4, 2: 5e-2}
#: Tokens of a row with which a model is tried.
_TRIED = 48
#: Sequences that are kept open for further rows, so that packing takes time in proportion to the rows.
_OPEN = 64

Row = dict[str, list[int]]


def packed_length(info: MethodInfo, kind: Kind, processor: Any, task: Task, model: Any) -> int:
    """Tokens of a packed sequence of a run.

    Raises:
        ConfigError: the rows of the kind cannot be packed, or the method has prompts before each row.
    """
    length = kind.packed_length(processor, task, model)
    if length is None:
        raise ConfigError(f'packing joins rows that a decoder writes; kind "{kind.name}" has none, leave packing out.')
    config = model.active_peft_config if isinstance(model, PeftModel) else None
    if info.place == "sequence" or getattr(config, "is_prompt_learning", False):
        raise ConfigError(
            f'packing: the prompts of method "{info.name}" have no place before each packed row; leave packing out.'
        )
    return length


def pack(rows: Dataset, length: int) -> Dataset:
    """Rows joined to sequences of at most `length` tokens, in their order, each in the first sequence with room for it.

    Returns:
        Data set of `input_ids`, `labels` and `position_ids`, which start at 0 for each row.

    Raises:
        ConfigError: the rows have a column with one value for each of them, or another form.
    """
    from datasets import Dataset

    others = [name for name in rows.column_names if name not in (*_PACKED, _MASK)]
    if others or not set(_PACKED) <= set(rows.column_names):
        raise ConfigError(
            f"packing joins rows of {' and '.join(_PACKED)}, and has no place for {', '.join(others) or 'others'}; "
            "leave packing out."
        )
    bins: list[Row] = []
    # the bins that still have room for a short row; those before are full
    first = 0
    for row in rows.select_columns(list(_PACKED)):
        size = len(row["input_ids"])
        chosen = next((found for found in bins[first:] if len(found["input_ids"]) + size <= length), None)
        if chosen is None:
            chosen = {name: [] for name in (*_PACKED, "position_ids")}
            bins.append(chosen)
        chosen["input_ids"] += row["input_ids"]
        # a first token is predicted by none, and packed it would be by the last one of the row before
        chosen["labels"] += [IGNORED, *row["labels"][1:]]
        chosen["position_ids"] += range(size)
        while first < len(bins) and (len(bins[first]["input_ids"]) >= length or len(bins) - first > _OPEN):
            first += 1
    return Dataset.from_list(bins)


@dataclass(frozen=True)
class PackedCollator:
    """Join packed sequences into a batch; padding is one more row behind the others, without a loss.

    Attributes:
        plain: collator of rows that are not packed, such as those of an evaluation.
        pad_token_id: token that fills shorter sequences.
    """

    plain: Callable[[Any], dict[str, Any]]
    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Batch as the model takes it: int64 tensors (sequences, tokens), and no cache.

        With a cache or a mask, transformers would take the positions for those of one row.
        """
        if "position_ids" not in rows[0]:
            return self.plain(rows)
        longest = max(len(row["input_ids"]) for row in rows)
        batch: dict[str, Any] = {"use_cache": False}
        for name, value in (("input_ids", self.pad_token_id), ("labels", IGNORED)):
            padded = [[*row[name], *[value] * (longest - len(row[name]))] for row in rows]
            batch[name] = torch.tensor(padded)
        positions = [[*row["position_ids"], *range(longest - len(row["position_ids"]))] for row in rows]
        batch["position_ids"] = torch.tensor(positions)
        return batch


def packed_collator(
    plain: Callable[[Any], dict[str, Any]], processor: Any, model: Any, rows: Iterable[Mapping[str, Any]]
) -> PackedCollator:
    """Collator of packed rows, once a few of them have been tried.

    Args:
        plain: collator of the kind of task.
        processor: the tokenizer.
        model: the model, with its adapter.
        rows: packed training rows.

    Raises:
        ConfigError: the model or its attention does not keep the rows apart.
    """
    collator = PackedCollator(plain, processor.pad_token_id)
    _check_isolation(model, collator, next(iter(rows))["input_ids"])
    return collator


def _check_isolation(model: Any, collator: PackedCollator, tokens: Sequence[int]) -> None:
    """Compare the logits of packed rows with those of each row alone."""
    tokens = tokens[:_TRIED]
    # pieces of one row do, because any tokens make a row
    pieces = [tokens[: len(tokens) // 3 + 1], tokens[len(tokens) // 3 :], tokens[: len(tokens) // 2 + 1]]
    tried = [[pieces[0], pieces[1]], [pieces[2]], [pieces[1], pieces[0], pieces[2]]]
    batch = collator([_sequence(parts) for parts in tried])
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "position_ids")}
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if "position_ids" not in signature(base.forward).parameters:
        raise ConfigError(f"packing: {type(base).__name__} takes no positions; leave packing out.")
    training = [module for module in model.modules() if module.training]
    model.eval()
    worst = 0.0
    try:
        with torch.no_grad():
            packed = model(**inputs, use_cache=False).logits.float()
            for number, parts in enumerate(tried):
                start = 0
                for part in parts:
                    alone = model(input_ids=torch.tensor([part], device=model.device), use_cache=False).logits.float()
                    found = packed[number, start : start + len(part)] - alone[0]
                    worst = max(worst, (found.abs().max() / alone.abs().max()).item())
                    start += len(part)
    finally:
        for module in training:
            module.training = True
    if not worst <= _TOLERANCE.get(base.dtype.itemsize, 1e-4):
        raise ConfigError(
            f"packing: {type(base).__name__} does not keep packed rows apart (their logits differ by {worst:.1e} of "
            "the largest); leave packing out."
        )


def _sequence(parts: Sequence[Sequence[int]]) -> Row:
    return {
        "input_ids": [token for part in parts for token in part],
        "labels": [IGNORED for part in parts for _ in part],
        "position_ids": [place for part in parts for place in range(len(part))],
    }
