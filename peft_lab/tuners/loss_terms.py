"""Terms that an adapter adds to the loss of a training step.

They are added where the model itself computes the loss from `labels`, so that they hold in `transformers.Trainer`, in
loops that read `output.loss`, and with accelerate. A loss that is computed outside of the model (label smoothing, a
`compute_loss_func`, a script's own criterion) does not get them; `peft_lab.train` refuses label smoothing for adapters
that have such terms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

#: Label that a loss leaves out.
_IGNORED = -100


@dataclass(frozen=True)
class LossTerm:
    """Term of one call: the loss becomes `own` * loss + `value`.

    Attributes:
        value: scalar, a mean over the rows of the batch.
        own: factor of the model's own loss.
    """

    value: Tensor
    own: float = 1.0


def with_loss_terms(model: nn.Module, output: Any, terms: list[LossTerm], arguments: Mapping[str, Any]) -> Any:
    """Output of a model with terms added to its loss.

    Without `labels` there is no loss, and the output stays as it is. Where a Trainer gives the number of items of all
    batches of a step (`num_items_in_batch`), a term counts by the share of this batch, as the model's own loss does.

    Args:
        model: the model.
        output: output of the model, a `ModelOutput` or a tuple.
        terms: those of the call.
        arguments: the call's arguments by name.
    """
    labels, items = arguments.get("labels"), arguments.get("num_items_in_batch")
    if not terms or labels is None:
        return output
    share = 1.0 if items is None else _counted(model, arguments).ne(_IGNORED).sum() / items
    loss = output["loss"] if isinstance(output, dict) else output[0]
    for term in terms:
        loss = term.own * loss + (share * term.value).to(loss.dtype)
    if not isinstance(output, dict):
        return (loss, *output[1:])
    output["loss"] = loss
    return output


def _counted(model: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
    """Labels of the items that a Trainer counts: all, without the first token where the loss shifts them."""
    config: Any = getattr(model, "config", None)
    given: Tensor | None = arguments.get("shift_labels")
    if given is not None:
        return given
    labels: Tensor = arguments["labels"]
    shifts = LOSS_MAPPING.get(str(getattr(model, "loss_type", ""))) is ForCausalLMLoss
    return labels[..., 1:] if shifts and not getattr(config, "is_encoder_decoder", False) else labels
