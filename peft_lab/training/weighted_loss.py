"""Loss with weights of rows, or of the tokens that a reference model finds worth training on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from peft_lab.data.further_columns import column_values
from peft_lab.data.row_checks import numbered
from peft_lab.data.row_stream import RowStream
from peft_lab.errors import ConfigError, TaskError
from peft_lab.training.row_values import RowValueCollator, RowValues

if TYPE_CHECKING:
    from datasets import Dataset

    from peft_lab.data.task_schema import Task

#: Name of the weight of a row in a batch.
ROW_WEIGHT = "row_weight"
#: Share of the tokens that are trained on; the paper has 0.6 and 0.7.
REFERENCE_SHARE = 0.6

_IGNORED = -100
#: Relative difference of our loss and the model's own that rounding may leave, by bytes of a value.
_TOLERANCE = {4: 1e-4, 2: 2e-2}


def read_row_weights(task: Task, column: str, train: Dataset) -> list[float]:
    """Weights of training rows from a column of their source, divided by their mean.

    Args:
        task: the task, whose kind need not know the column.
        column: its name in the data of the split train.
        train: rows that were drawn from the split.

    Raises:
        TaskError: there is no such column, or a weight is missing, negative or not finite, or all of them are zero.
        ConfigError: the rows are streamed.
    """
    if isinstance(train, RowStream):
        raise ConfigError(f'Task "{task.name}" is streamed, and row_weight_column needs all weights; leave it out.')
    cells, rows = column_values(task, "train", column, ROW_WEIGHT, train)
    weights = np.asarray([_number(cell) for cell in cells], dtype=np.float64)
    wrong = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if len(wrong):
        raise TaskError(
            f'Task "{task.name}": {len(wrong)} train rows have no weight in column "{column}" '
            f"({numbered([rows[row] for row in wrong])}); each needs a number from 0 on."
        )
    if not weights.any():
        raise TaskError(f'Task "{task.name}": all weights in column "{column}" are 0, so there is no loss.')
    return list(weights / weights.mean())


def weights_digest(weights: Sequence[float]) -> str:
    """Hash of the weights of rows, for the record of what a run is trained on."""
    return hashlib.blake2b(np.asarray(weights, dtype=np.float64).tobytes(), digest_size=16).hexdigest()


def _number(cell: Any) -> float:
    try:
        return float(cell)
    except (TypeError, ValueError):
        return math.nan


class WeightedRows(RowValues):
    """Preprocessed rows with the weight of each."""

    def __init__(self, rows: Any, weights: Sequence[float]) -> None:
        super().__init__(rows, ROW_WEIGHT, weights, "row_weight_column")


class WeightedCollator(RowValueCollator):
    """Collator that adds the weights of the rows as float32 (n,)."""

    def __init__(self, collator: Callable[[list[Any]], dict[str, Any]]) -> None:
        super().__init__(collator, ROW_WEIGHT, torch.float32)


class WeightedLoss:
    """Sum of the losses of rows or tokens times their weights, divided by their number.

    A weight of a row holds for all of its tokens. With a reference model the tokens with the largest excess loss, that
    of the model less that of the reference, have the weight 1 and all others 0: selective language modelling, Rho-1
    (Lin et al., arXiv 2404.07965). They are chosen among the tokens of a batch, and the sum is divided by the number
    that is chosen.

    Args:
        shifts: True if the logits of a token are those of the next one.
        reference: model with the same tokens; None for the weights of rows alone.
        share: share of the tokens that are trained on.
    """

    def __init__(self, shifts: bool, reference: nn.Module | None = None, share: float = REFERENCE_SHARE) -> None:
        self.shifts, self.reference, self.share = shifts, reference, share
        self._checked = False

    def __call__(self, model: nn.Module, inputs: dict[str, Any], items: Any = None) -> tuple[Tensor, Any]:
        """Compute the loss of a batch.

        Args:
            model: the model that is trained.
            inputs: the batch, with `row_weight` if the rows have weights.
            items: number of answers of all batches of the step; None for the mean over this batch.

        Returns:
            Loss, and outputs of the model.

        Raises:
            ConfigError: the model's own loss is not the mean of these losses, at the first batch.
        """
        inputs = dict(inputs)
        weights = inputs.pop(ROW_WEIGHT, None)
        outputs = model(**inputs)
        losses, counted = self._losses(outputs, inputs.get("labels"), model)
        if not self._checked:
            self._check(losses, counted, outputs)
        chosen = counted
        if self.reference is not None:
            chosen = self._worth(losses.detach(), counted, inputs)
        factors = chosen.to(losses.dtype)
        if weights is not None:
            factors = factors * weights.to(losses.device).view(-1, *[1] * (losses.ndim - 1))
        if items is None:
            return (losses * factors).sum() / chosen.sum().clamp(min=1), outputs
        share = 1.0 if self.reference is None else self.share
        return (losses * factors).sum() / (share * items), outputs

    def _losses(self, outputs: Any, labels: Any, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Loss of each answer, and which of them count."""
        logits = outputs.get("logits") if hasattr(outputs, "get") else None
        if logits is None or not torch.is_tensor(labels):
            raise ConfigError(
                "Weights of rows and tokens need a model with logits and one answer for each; leave them out."
            )
        logits = logits.float()
        if labels.is_floating_point():
            return self._losses_of_numbers(logits, labels, model)
        if self.shifts:
            logits, labels = logits[:, :-1], labels[:, 1:]
        if logits.shape[:-1] != labels.shape:
            raise ConfigError("Weights of rows and tokens need a model with logits for each answer; leave them out.")
        losses = functional.cross_entropy(
            logits.flatten(0, -2), labels.flatten(), ignore_index=_IGNORED, reduction="none"
        )
        return losses.view(labels.shape), labels != _IGNORED

    def _losses_of_numbers(self, logits: Tensor, labels: Tensor, model: nn.Module) -> tuple[Tensor, Tensor]:
        config: Any = getattr(model, "config", None)
        if getattr(config, "problem_type", None) == "multi_label_classification":
            losses = functional.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none")
        else:
            losses = (logits.reshape(labels.shape) - labels.float()) ** 2
        return losses, torch.ones_like(losses, dtype=torch.bool)

    def _check(self, losses: Tensor, counted: Tensor, outputs: Any) -> None:
        """Compare the mean of the losses with the model's own loss."""
        own = outputs["loss"].detach().float()
        ours = losses.detach()[counted].mean()
        tolerance = _TOLERANCE.get(outputs["loss"].element_size(), 2e-2)
        if counted.any() and not torch.isclose(ours, own, rtol=tolerance, atol=tolerance):
            raise ConfigError(
                f"Weights of rows and tokens cannot be taken: the loss of the model, {own:.6g}, is not the mean of the "
                f"losses of its answers, {ours:.6g}; leave row_weight_column and reference_model out."
            )
        self._checked = True

    @torch.no_grad()
    def _worth(self, losses: Tensor, counted: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Tokens with the largest excess loss over the reference, among those that count."""
        assert self.reference is not None, "asked before"
        self.reference.to(losses.device)
        reference, _ = self._losses(self.reference(**inputs), inputs["labels"], self.reference)
        excess = (losses - reference).masked_fill(~counted, -math.inf)
        count = math.ceil(self.share * int(counted.sum()))
        chosen = torch.zeros_like(counted).flatten()
        chosen[excess.flatten().topk(count).indices] = True
        return chosen.view(counted.shape)
