"""Guard against losses, gradients and weights that are not finite.

A run that goes on after them ends like a good one, with weights that answer nothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn

from peft_lab.errors import DivergedError
from peft_lab.training.checkpoints import last_whole_checkpoint

#: Loss scale of fp16 below which an overflow is no longer a matter of the scale.
_LEAST_SCALE = 1.0


class NonFiniteGuard:
    """Check of the losses and the gradient norm of each optimizer step.

    All processes stop at the same step, whichever of them has seen the number.
    """

    def __init__(self) -> None:
        self._bad_loss: Tensor | None = None

    def add_loss(self, loss: Tensor) -> None:
        """Add the loss of one batch, for the check of the whole step."""
        bad = ~torch.isfinite(loss.detach()).all()
        self._bad_loss = bad if self._bad_loss is None else self._bad_loss | bad

    def check_step(self, trainer: Any, norm: Any) -> None:
        """Check the losses of a step and the norm of their gradient.

        Args:
            trainer: the Trainer, before it updates the weights.
            norm: norm of the gradient before clipping; None if the backend does not tell it.

        Raises:
            DivergedError: one of them is not finite, in any process.
        """
        bad_loss = self._bad_loss is not None and bool(self._bad_loss)
        self._bad_loss = None
        bad_norm = norm is not None and not math.isfinite(float(norm)) and not _is_skipped(trainer.accelerator)
        bad_loss, bad_norm = _in_any_process(bad_loss, bad_norm)
        if bad_loss or bad_norm:
            raise _error(trainer, "the loss" if bad_loss else "the norm of the gradient", trainer.state.global_step + 1)


def check_weights(trainer: Any) -> None:
    """Check the trainable weights of a Trainer's model.

    Raises:
        DivergedError: a value is not finite, in any process.
    """
    (bad,) = _in_any_process(not _finite_weights(trainer.model))
    if bad:
        raise _error(trainer, "a trained weight", trainer.state.global_step)


def check_evaluation(loss: float | None, rows: str, step: int) -> None:
    """Check the loss of an evaluation.

    Args:
        loss: the loss, the same in all processes; None if the rows have no labels.
        rows: name of the rows.
        step: training steps before the evaluation, 0 without a training.

    Raises:
        DivergedError: it is not finite, so that the metrics say nothing.
    """
    if loss is not None and not math.isfinite(loss):
        when = f" after {step} training steps" if step else ""
        raise DivergedError(
            f"The loss on the {rows} rows is not finite{when}, so their metrics would mean nothing: the learning rate "
            "of the training was too high, float16 is too narrow (use bfloat16 or float32), or these rows hold numbers "
            "that are not finite."
        )


def _is_skipped(accelerator: Any) -> bool:
    """Test whether the loss scaler of fp16 skips the step.

    That is how it finds its scale, unless the gradients overflow at every scale.
    """
    scaler = getattr(accelerator, "scaler", None)
    return scaler is not None and scaler.is_enabled() and scaler.get_scale() >= _LEAST_SCALE


def _in_any_process(*flags: bool) -> list[bool]:
    state = PartialState()
    if state.num_processes == 1:
        return list(flags)
    return [bool(flag) for flag in reduce(torch.tensor(flags, dtype=torch.float32, device=state.device), "sum")]


def _finite_weights(model: nn.Module) -> bool:
    checks = []
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point() and not parameter.is_meta:
            # of a sharded parameter each process checks its own part
            values = parameter.detach()
            checks.append((values.to_local() if hasattr(values, "to_local") else values).isfinite().all())
    # one transfer from the device for all of them
    return not checks or bool(torch.stack([check.to(checks[0].device) for check in checks]).all())


def _error(trainer: Any, what: str, step: int) -> DivergedError:
    last = last_whole_checkpoint(trainer.args.output_dir, trainer.args.world_size)
    kept = f'the last checkpoint is "{last}"' if last else "there is no checkpoint from before"
    return DivergedError(f"Training stopped at step {step} because {what} is not finite: {_cause(trainer)}; {kept}.")


def _cause(trainer: Any) -> str:
    """Likely cause and its mend, in words."""
    args = trainer.args
    if args.fp16 or any(parameter.dtype == torch.float16 for parameter in trainer.model.parameters()):
        return "float16 ends at 65504, so use bfloat16 (--bf16, --dtype bfloat16) or float32, or a lower learning rate"
    if trainer.state.global_step == 0:
        return "no weight has been updated yet, so look for numbers in the data or in the base that are not finite"
    rate = f"the learning rate {args.learning_rate:g}"
    if trainer.optimization.head_learning_rate is not None:
        rate += f" or that of the head, {trainer.optimization.head_learning_rate:g},"
    return f"most likely {rate} is too high, so pass a lower one with --overwrite_output_dir"
