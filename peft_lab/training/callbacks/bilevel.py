"""Bi-level training: weights on training data, a learned activation on held-out data."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import reduce
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from peft_lab.errors import ConfigError
from peft_lab.utils.atomic_files import new_file

logger = logging.getLogger("peft_lab")

#: Of the activations: IAPT's, far below that of the other parameters.
LEARNING_RATE = 1e-6


class AlternatingActivation(TrainerCallback):
    """Callback that trains learned activations on held-out data.

    They make a step after every few steps of all other parameters. First-order bi-level training, as of IAPT's and
    MiLoRA's rational activations. `trainer.add_callback` takes it, and the run option `alternating_every` adds it; the
    training itself leaves the activations alone. The state that a resume needs lies in `alternating.safetensors` of
    each checkpoint.

    Args:
        dev_dataset: held-out rows, preprocessed as those of training.
        every: steps of training between two steps of the activations.
        learning_rate: of the activations.
        collator: joins rows into a batch; that of the training by default.

    Raises:
        ConfigError: `every` is below 1, or, when training begins, the model has no learned activation.
    """

    #: Hooks of the step that runs; of all trainings, so that the next one removes what one broken off has left.
    _hooks: ClassVar[list[Any]] = []

    def __init__(
        self,
        dev_dataset: Dataset[Any],
        every: int = 1,
        learning_rate: float = LEARNING_RATE,
        collator: Callable[[list[Any]], dict[str, Any]] | None = None,
    ) -> None:
        if every < 1:
            raise ConfigError(f"every={every} must be at least 1.")
        self.dev_dataset, self.every, self.learning_rate, self.collator = dev_dataset, every, learning_rate, collator
        self._parameters: list[nn.Parameter] = []
        self._optimizer: torch.optim.Optimizer | None = None
        self._batches: Iterator[Any] = iter(())
        self._steps = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the activations, and make ready the held-out batches."""
        self._parameters = activation_parameters(kwargs["model"])
        if not self._parameters:
            raise ConfigError("The model has no learned activation to train in turn, such as IAPT's rational one.")
        # peft may have cast or moved the parameters since the callback was made
        self._optimizer = torch.optim.AdamW(self._parameters, lr=self.learning_rate, weight_decay=0.0)
        # a generator of its own leaves the training's draws as they are; each process draws other rows
        loader = DataLoader(
            self.dev_dataset,
            batch_size=args.train_batch_size,
            shuffle=True,
            collate_fn=self.collator or kwargs["train_dataloader"].collate_fn,
            generator=torch.Generator().manual_seed(args.seed + args.process_index),
        )
        self._batches, self._steps = _endless(loader), 0
        if state.global_step:
            self._restore(_kept(args, state))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let no gradient reach the activations.

        It would also count where gradients are clipped to a norm.
        """
        self._hooks.extend(parameter.register_hook(torch.zeros_like) for parameter in self._parameters)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the activations out of the step on training data.

        Without a gradient an optimizer leaves them alone.
        """
        while self._hooks:
            self._hooks.pop().remove()
        for parameter in self._parameters:
            parameter.grad = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After every few steps, one step of the activations alone."""
        if state.global_step % self.every or self._optimizer is None:
            return
        batch = {key: value.to(args.device) for key, value in next(self._batches).items()}
        # not backward(), because it would add to the gradients of all other parameters too
        gradients = torch.autograd.grad(kwargs["model"](**batch).loss, self._parameters, allow_unused=True)
        # no wrapper averages these gradients over the processes, because backward() did not compute them
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = None if gradient is None else reduce(gradient, reduction="mean")
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._steps += 1

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the steps of the activations and the moments of their optimizer."""
        # one process is enough, because averaged gradients give the same moments in all of them
        if not state.is_world_process_zero or self._optimizer is None:
            return
        moments = {}
        for index, parameter in enumerate(self._parameters):
            for name, value in self._optimizer.state[parameter].items():
                moments[f"{index}.{name}"] = value
        # a killed run leaves no half-written file under the final name
        with new_file(_kept(args, state)) as partial:
            save_file({**moments, "steps": torch.tensor(self._steps)}, partial)

    def _restore(self, path: Path) -> None:
        """Restore the moments and the position in the held-out batches."""
        if not path.is_file():
            logger.warning('There is no "%s": the moments and the batches of the activations start anew.', path)
            return
        kept = load_file(path)
        self._steps = int(kept.pop("steps"))
        for key, value in kept.items():
            index, _, name = key.partition(".")
            parameter = self._parameters[int(index)]
            assert self._optimizer is not None, "made before"
            # AdamW keeps its count of steps on the CPU, wherever the parameter lies
            self._optimizer.state[parameter][name] = value if name == "step" else value.to(parameter.device)
        # the batches are drawn from a seed, so those already used are passed over
        for _ in range(self._steps):
            next(self._batches)


def activation_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Trainable parameters of the learned activations of a model."""
    found: list[nn.Parameter] = []
    for module in model.modules():
        # by class, because peft's wrappers answer for attributes of the modules inside them
        for name in getattr(type(module), "activation_names", ()):
            found += getattr(module, name).values()
    return [parameter for parameter in found if parameter.requires_grad]


def _kept(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / "alternating.safetensors"


def _endless(loader: DataLoader[Any]) -> Iterator[Any]:
    while True:
        yield from loader
