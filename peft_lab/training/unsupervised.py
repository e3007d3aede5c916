"""Unsupervised FixMatch with trusted rows (UFM): training without the labels of the training rows.

Source: Zhang et al. 2024, Knowledge Composition using Task Vectors with Learned Anisotropic Scaling, arXiv:2407.02880,
on FixMatch (Sohn et al. 2020, arXiv:2001.07685). Written from the paper.

The model at the start classifies the training rows. Of each class the rows that it is most confident of, at most
min(rows / classes, 100), are trusted: their first answers stay their labels. Of all others the answer of the model as
it is counts, sharpened by a temperature of 0.5, where its confidence is above a threshold that rises from 0.9 to 1 over
the training. The answer is that to the plain row, in evaluation mode; what learns it is the model's answer to another
view, in training mode: images are shifted at random, and dropout is drawn.

Readings where the paper and its code differ, or leave something open:

- A row is trusted among those that the model puts into its class. The code ranks all rows by the probability of each
  class, marks those of the last class alone, and takes a tenth of rows / classes.
- The sharpened probabilities are p^(1/T) / sum p^(1/T); the code multiplies p by T, which changes nothing.
- The threshold holds for sharpened probabilities, and trusted rows always count.
- Batches are drawn from all rows alike, not one half from the trusted ones.
- Views are those above, where the authors crop and flip: a mirrored sign or letter is another one.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import AutoConfig, TrainerCallback

from peft_lab.backbones.pypi_weights import resolve_model
from peft_lab.data.classification_kind import ClassificationKind
from peft_lab.errors import ConfigError
from peft_lab.training.read_training_data import read_training_data
from peft_lab.training.row_values import RowValueCollator, RowValues
from peft_lab.tuners import shifted
from peft_lab.tuners.registration import has_trait

if TYPE_CHECKING:
    from peft_lab.data.kind import Kind
    from peft_lab.data.task_schema import Task
    from peft_lab.registry import MethodInfo
    from peft_lab.runs.run_config import RunConfig

logger = logging.getLogger("peft_lab")

#: Name of the trusted label of a row in a batch, and the label of a row that is not trusted.
TRUSTED, UNTRUSTED = "trusted_label", -1
#: Most trusted rows of a class, temperature of the answers, and threshold at the start and at the end.
_MOST_TRUSTED, _TEMPERATURE, _THRESHOLDS = 100, 0.5, (0.9, 1.0)
#: Name that transformers gives a class without one.
_NAMELESS = re.compile(r"LABEL_\d+")


def check_start(
    config: RunConfig, info: MethodInfo, kind: Kind, task: Task, base: Any, labels: Sequence[str] | None
) -> None:
    """Refuse a run without labels whose first answers would mean nothing.

    Args:
        config, info, kind, task: of the run; nothing is checked without `unsupervised`.
        base: the backbone as it was loaded.
        labels: names of the task's classes.

    Raises:
        ConfigError: the answers of the task are no single classes, or the checkpoint brings no head for its classes.
    """
    if config.unsupervised is None:
        return
    option = f'unsupervised="{config.unsupervised}"'
    if not isinstance(kind, ClassificationKind) or labels is None:
        raise ConfigError(
            f'{option} is for one class a row, and task "{task.name}" of kind "{kind.name}" has other answers; leave '
            "it out."
        )
    if task.streaming:
        raise ConfigError(f'Task "{task.name}" is streamed, and {option} looks at all training rows first.')
    if has_trait(info, "uses_source_head"):
        raise ConfigError(f'Method "{info.name}" reads the labels of the training rows, which {option} leaves unread.')
    name = config.model_name_or_path
    new = getattr(base, "new_head_weights", ())
    if new:
        raise ConfigError(
            f'{option} takes its first labels from the head of the checkpoint, and "{name}" brings none for these '
            f"{len(labels)} classes ({new[0]} is new); start from a fine-tuned checkpoint, as `--method full` or "
            "`peft-lab merge` writes it."
        )
    hub = {"revision": config.model_revision} if config.model_revision else {}
    known = AutoConfig.from_pretrained(resolve_model(name), trust_remote_code=False, **hub).id2label or {}
    names = [str(known[number]) for number in sorted(known)]
    if names != list(labels) and not all(_NAMELESS.fullmatch(each) for each in names):
        raise ConfigError(
            f'{option} takes its first labels from the head of the checkpoint, and the classes of "{name}" '
            f"({', '.join(names[:6])}) are not those of the task in their order ({', '.join(labels[:6])}); list them "
            'so in "labels" of the task, or choose another checkpoint.'
        )


def check_readers(model: nn.Module) -> None:
    """Refuse adapters that read the training data, whose labels nothing may see.

    Raises:
        ConfigError: an adapter on the model draws training rows before the first step.
    """
    read_training_data(model, _Unread())


class _Unread:
    """Training rows that refuse to be read."""

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        raise ConfigError(
            "The adapter reads the training rows with their labels before the first step (such as `blocks` of atlas), "
            "which an unsupervised run leaves unread; leave that or unsupervised out."
        )


def with_trusted_labels(
    config: RunConfig, model: Any, rows: Any, collator: Callable[[list[Any]], dict[str, Any]], batch_size: int
) -> tuple[RowValues, RowValueCollator]:
    """Training rows with their trusted labels in place of their own, and their collator.

    Args:
        config: the run.
        model: the model before the first step, on its device.
        rows: preprocessed training rows.
        collator: their collator.
        batch_size: rows of a batch of the first answers.
    """
    probabilities = first_answers(model, rows, collator, batch_size)
    trusted = trusted_labels(probabilities, config.trusted_per_class)
    counts = [int((trusted == label).sum()) for label in range(probabilities.shape[1])]
    logger.info("unsupervised: %d of %d training rows are trusted.", sum(counts), len(trusted))
    if 0 in counts:
        logger.warning(
            "unsupervised: the model puts no training row into %d of %d classes, so it learns none of their rows at "
            "first.",
            *(counts.count(0), len(counts)),
        )
    # the labels of the rows end here: a batch has a constant in their place
    values = RowValues(rows, TRUSTED, trusted.tolist(), "unsupervised", constants={"labels": 0})
    return values, RowValueCollator(collator, TRUSTED, torch.int64)


@torch.no_grad()
def first_answers(model: Any, rows: Any, collator: Callable[[list[Any]], dict[str, Any]], batch_size: int) -> Tensor:
    """Probabilities of the classes, float32 (rows, classes), of the model without its adapter, in evaluation mode."""
    base = model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
    found = []
    # a loader draws a seed for its workers, and what is drawn afterwards must not depend on it
    with torch.random.fork_rng(devices=[]), _evaluating(model), base:
        for batch in DataLoader(rows, batch_size, collate_fn=collator):
            inputs = {name: _moved(value, model.device) for name, value in batch.items() if name != "labels"}
            found.append(model(**inputs)["logits"].float().softmax(-1).cpu())
    return torch.cat(found)


def trusted_labels(probabilities: Tensor, count: int | None = None) -> Tensor:
    """Labels of the trusted rows, int64 (rows,), and `UNTRUSTED` for the others.

    Args:
        probabilities: (rows, classes), of the model at the start.
        count: trusted rows of each class; None for min(rows / classes, 100), at least 1.
    """
    rows, classes = probabilities.shape
    count = max(min(rows // classes, _MOST_TRUSTED), 1) if count is None else count
    confidence, predicted = probabilities.max(-1)
    found = torch.full((rows,), UNTRUSTED, dtype=torch.int64)
    for label in range(classes):
        own = (predicted == label).nonzero().flatten()
        best = confidence[own].argsort(descending=True, stable=True)[:count]
        found[own[best]] = label
    return found


def threshold(progress: float) -> float:
    """Confidence that the answer to an untrusted row must exceed, after this part of the steps."""
    first, last = _THRESHOLDS
    return first + (last - first) * progress


def fixmatch_loss(weak: Tensor, strong: Tensor, trusted: Tensor, least: float) -> Tensor:
    """Mean cross-entropy of the strong views over the rows that count; zero if none does.

    Args:
        weak: logits (rows, classes) of the plain rows, without gradient.
        strong: logits of their other views.
        trusted: trusted labels (rows,), `UNTRUSTED` for the others.
        least: confidence that the sharpened answer to an untrusted row must exceed.
    """
    answers = (weak.float() / _TEMPERATURE).softmax(-1)
    known = trusted != UNTRUSTED
    fixed = functional.one_hot(trusted.clamp_min(0), answers.shape[-1]).to(answers)
    counts = known | (answers.max(-1).values > least)
    targets = torch.where(known[:, None], fixed, answers)
    losses = functional.cross_entropy(strong.float(), targets, reduction="none")
    return (losses * counts).sum() / counts.sum().clamp(min=1)


class UnsupervisedFixMatch(TrainerCallback):
    """Loss of a batch without labels; as a callback it follows the steps, which set its threshold."""

    def __init__(self) -> None:
        self.progress = 0.0
        self._compared = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the part of the steps that is over."""
        self.progress = state.global_step / state.max_steps

    def __call__(self, model: Any, inputs: dict[str, Any], items: Any = None) -> tuple[Tensor, Any]:
        """Compute the loss of a batch, whose labels it does not read.

        Args:
            model: the model in training mode.
            inputs: the batch, with `trusted_label`.
            items: rows of all batches of the step; None for the mean over this batch.

        Returns:
            Loss, and outputs for the second view.
        """
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        trusted = inputs.pop(TRUSTED)
        with torch.no_grad(), _evaluating(model):
            weak = model(**inputs)["logits"]
        if "pixel_values" in inputs:
            inputs["pixel_values"] = shifted(inputs["pixel_values"])
        outputs = model(**inputs)
        self._compare(weak, outputs["logits"])
        loss = fixmatch_loss(weak, outputs["logits"], trusted, threshold(self.progress))
        return (loss if items is None else loss * len(trusted) / items), outputs

    def _compare(self, weak: Tensor, strong: Tensor) -> None:
        """Warn once if both views of the first batch are the same."""
        if not self._compared and torch.allclose(weak.float(), strong.detach().float(), rtol=1e-5, atol=1e-6):
            logger.warning(
                "unsupervised: both views of a row are the same, because the model draws no dropout in training mode; "
                "it learns from its own answers alone. A backbone with dropout, or backbone_eval=False, mends that."
            )
        self._compared = True


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and each module back into its own."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
