"""Sharpness-aware minimization: the gradient of each step is taken where the loss is highest nearby."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peft_lab.errors import ConfigError


class SharpnessAware:
    """Sharpness-aware minimization, SAM (Foret et al., arXiv 2010.01412), of the trained parameters.

    With g the gradient of the batches of one optimizer step, the step takes the gradient at w + rho * g / |g|, the norm
    being that of all trained parameters together. Accumulation: g is that of all batches of the step. Dropout draws
    anew in the second pass.

    Args:
        rho: radius of the neighbourhood.
    """

    def __init__(self, rho: float) -> None:
        self.rho = rho
        #: Batches of the step, the divisor of their loss, and how many of them have been passed once.
        self.batches: Sequence[Any] = ()
        self.items: Any = None
        self._passed = 0

    def begin(self, batches: Sequence[Any], items: Any) -> None:
        """Keep the batches of the next step."""
        self.batches, self.items, self._passed = list(batches), items, 0

    def completes_step(self) -> bool:
        """Count a batch; True if it was the last of its step."""
        self._passed += 1
        return self._passed == len(self.batches)

    @contextmanager
    def ascent(self, model: nn.Module) -> Iterator[bool]:
        """Move the parameters up the gradient within the block, and take the gradient away.

        Yields:
            False if the gradient is zero or not finite: then parameters and gradient stay as they are.
        """
        trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
        gradients = [gradient for parameter in trained if (gradient := parameter.grad) is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not torch.isfinite(norm) or norm == 0:
            yield False
            return
        # kept whole, because adding and taking away again would round
        kept: list[Tensor] = [parameter.detach().clone() for parameter in trained]
        with torch.no_grad():
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter.add_((self.rho / norm).to(parameter.device) * gradient)
                parameter.grad = None
        try:
            yield True
        finally:
            with torch.no_grad():
                for parameter, value in zip(trained, kept, strict=True):
                    parameter.copy_(value)


def check_sharpness(trainer: Any) -> None:
    """Refuse trainings whose gradients are not there as a whole between two passes.

    Raises:
        ConfigError: sharded training.
    """
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ConfigError(
            "sam_rho needs the whole gradient before a step, which FSDP and DeepSpeed divide; leave it out."
        )
