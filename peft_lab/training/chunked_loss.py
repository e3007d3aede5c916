"""Cross-entropy of a decoder in chunks of tokens, so that the logits of a batch are never there at once.

Each chunk goes through the model's own code behind its stack, so soft-capping, scaling and an adapted head count as
they do without chunks. Tokens without a loss, such as those of the prompt, have no logits at all.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import ModelOutput

from peft_lab.errors import ConfigError

IGNORED = -100
#: Relative difference of the losses of one row with and without chunks that rounding may leave, by bytes of a value.
_TOLERANCE = {4: 1e-5, 2: 1e-2}


@dataclass
class ChunkedOutput(ModelOutput):
    """Output of a decoder whose loss is taken in chunks.

    Attributes:
        loss: mean over the tokens with a label, or their sum divided by `num_items_in_batch`.
        predicted: most likely token at each place, int64 (n, t - 1), 0 where there is no label; None in training.
        log_probabilities: of the true tokens, float32 (n, t - 1), 0 where there is no label; None in training.
    """

    loss: Tensor | None = None
    predicted: Tensor | None = None
    log_probabilities: Tensor | None = None


@contextmanager
def chunked_loss(model: Any, size: int | None) -> Iterator[None]:
    """Compute the loss of a decoder in chunks within the block.

    Args:
        model: a causal language model of transformers, with an adapter or without.
        size: tokens of a chunk; None leaves the model as it is.

    In training a call with labels returns the loss alone; in evaluation also the predicted tokens and the
    log-probabilities of the true ones, both (n, t - 1).

    Raises:
        ConfigError: the model has no logits that can be left out, or, at the first batch, its loss is more than the
            cross-entropy of its logits.
    """
    if size is None:
        yield
        return
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = vars(base).get("forward")
    base.forward = _ChunkedForward(base, size).forward
    try:
        yield
    finally:
        if own is None:
            del base.forward
        else:
            base.forward = own


class _ChunkedForward:
    """Forward of a decoder whose loss is taken in chunks."""

    def __init__(self, base: Any, size: int) -> None:
        self.base, self.size, self.original = base, size, base.forward
        self.stack: nn.Module | None = getattr(base, base.base_model_prefix, None)
        if "logits_to_keep" not in inspect.signature(type(base).forward).parameters or self.stack is None:
            raise ConfigError(
                f"loss_chunk_size: {type(base).__name__} computes the logits of all tokens at once; leave it out."
            )
        self.checked, self.output_type = False, ModelOutput

        # Trainer and the adapter read the arguments of the model's own forward
        @functools.wraps(self.original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self.run(args, kwargs)

        self.forward = forward

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Loss of a call with labels; any other call is the model's own."""
        labels = kwargs.get("labels")
        if labels is None:
            return self.original(*args, **kwargs)
        if not self.checked:
            self.checked = True
            self._check(args, kwargs)
        items = kwargs.get("num_items_in_batch")
        states = self._states(args, kwargs)
        # peft's virtual tokens stand before the row's own
        targets = functional.pad(labels, (states.shape[1] - labels.shape[1], 0), value=IGNORED)[:, 1:]
        return self._loss(states[:, :-1], targets.to(states.device), items)

    def _states(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Last hidden states of the stack, (n, t, dim)."""
        found: list[Any] = []
        assert self.stack is not None
        hook = self.stack.register_forward_hook(lambda module, inputs, output: found.append(output))
        own = self.base.loss_function
        # the labels stay, because adapters read them; one token's logits are made, because some models need some
        self.base.loss_function = lambda logits, *args, **kwargs: logits.new_zeros(())
        try:
            output = self.original(*args, **kwargs, logits_to_keep=1)
        finally:
            hook.remove()
            self.base.loss_function = own
        name = type(self.base).__name__
        if len(found) != 1:
            raise ConfigError(f"loss_chunk_size: the hidden states of {name} are not to be had; leave it out.")
        if getattr(output, "aux_loss", None) is not None:
            raise ConfigError(f"loss_chunk_size: the loss of {name} has a part for its router; leave it out.")
        self.output_type = type(found[0])
        return found[0][0]

    def _loss(self, states: Tensor, targets: Tensor, items: Any) -> ChunkedOutput:
        kept = targets != IGNORED
        states, wanted = states[kept], targets[kept]
        total = states.new_zeros((), dtype=torch.float32)
        tokens, values = [], []
        for part, target in zip(states.split(self.size), wanted.split(self.size), strict=True):
            loss, token, value = self._chunk(part, target)
            total = total + loss
            tokens.append(token)
            values.append(value)
        output = ChunkedOutput(total / (len(wanted) if items is None else items))
        if not self.base.training:
            # float32, as the kind of task makes them of whole logits
            output.predicted = torch.zeros_like(targets).masked_scatter(kept, torch.cat([wanted[:0], *tokens]))
            scores = torch.zeros_like(targets, dtype=torch.float32)
            output.log_probabilities = scores.masked_scatter(kept, torch.cat([scores.new_zeros(0), *values]))
        return output

    def _chunk(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sum of the losses, predicted tokens and log-probabilities of some tokens."""
        if torch.is_grad_enabled():
            # the logits are computed again for the gradient instead of being kept
            return checkpoint(self._scored, states, targets, use_reentrant=False)
        return self._scored(states, targets)

    def _scored(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self._logits(states).float()
        losses = functional.cross_entropy(logits, targets, reduction="none")
        return losses.sum(), logits.detach().argmax(-1), -losses.detach()

    def _logits(self, states: Tensor) -> Tensor:
        """Logits of states (tokens, dim), by the model's own code behind the stack."""
        stack: Any = self.stack
        own = vars(stack).get("forward")
        stack.forward = lambda *args, **kwargs: self.output_type(last_hidden_state=states[None])
        try:
            # of the class, because the adapter's part of the instance's forward has been run already
            return type(self.base).forward(self.base).logits[0]
        finally:
            if own is None:
                del stack.forward
            else:
                stack.forward = own

    @torch.no_grad()
    def _check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse a model whose loss has further parts, such as that of a router."""
        labels = kwargs["labels"]
        row = int((labels != IGNORED).sum(1).argmax())
        rows = slice(row, row + 1)
        one = {
            name: value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == len(labels) else value
            for name, value in kwargs.items()
            if name != "num_items_in_batch"
        }
        if args or int((one["labels"] != IGNORED).sum()) == 0:
            self.checked = not args
            return
        modes = {module: module.training for module in self.base.modules()}
        self.base.eval()
        try:
            plain = self.original(**one).loss.float()
            found = self.run((), one)["loss"]
        except (ValueError, RuntimeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"loss_chunk_size: {type(self.base).__name__} takes its loss in a way of its own; leave it out."
            ) from error
        finally:
            for module, mode in modes.items():
                module.training = mode
        if not torch.isclose(found, plain, rtol=_TOLERANCE.get(self.base.dtype.itemsize, 1e-5), atol=1e-6):
            raise ConfigError(
                f"loss_chunk_size: the loss of {type(self.base).__name__} is not the cross-entropy of its logits alone "
                f"({plain.item():.4f}, in chunks {found.item():.4f}); leave it out."
            )
