"""Pruning of a run: before the training, by magnitude or by BiP, or, by an L1 penalty, in its end.

"Sparse then Prune" (Prasetyo et al. 2023, arXiv:2307.11988) regularises a model for sparsity while it is fine-tuned and
prunes it by magnitude afterwards, without a further step. Two things are read otherwise than in the authors' code:

- the penalty is the L1 norm of the weights that are pruned, and acts on full fine-tuning, which trains them. The
  authors' code has 0.01 mean(log(1 + a²)) of the attention maps a of the last block instead, by which no weight becomes
  small. An adapter's base is frozen, and what it adds to a weight is dense, so there is no penalty for adapters;
- the head and the norms stay dense, which the authors prune as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from peft_lab.backbones.names import PEFT_PREFIX, unwrap
from peft_lab.errors import ConfigError
from peft_lab.loading.pruned_base import mark_pruned, read_pruning, record_of, write_pruning
from peft_lab.runs.pruning import PruneOptions, PruningRecord, read_prune
from peft_lab.training.pruning_batches import PruningBatches
from peft_lab.tuners.pruning import apply_masks, bip_masks, candidate_layers, magnitude_masks, prunable_layers

#: Default factor of the L1 norm, of the size of usual gradients and not tuned.
L1_PENALTY = 1e-4
#: Default steps of each level of BiP.
BIP_STEPS = 20
#: peft's wrapper of a module that is trained in full, at the end of a path.
_SAVED = re.compile(r"\.modules_to_save\.[^.]+$")


class RunPruning:
    """Pruning of a run's base.

    Args:
        options: the run option `prune`; None for no pruning, by which all methods do nothing.
    """

    def __init__(self, options: PruneOptions | None) -> None:
        self.options = options
        self.record: PruningRecord | None = None
        self._layers: dict[str, Any] = {}
        self._masks: dict[str, Tensor] = {}

    def begin(self, base: nn.Module, checkpoint: str | None = None, batches: PruningBatches | None = None) -> None:
        """Prune the base, as it was loaded, before its method is put on.

        The first of several processes chooses for all of them.

        Args:
            base: the base.
            checkpoint: checkpoint that the training goes on from, which may hold masks.
            batches: batches for masks that the weights alone do not tell.

        Raises:
            ConfigError: the base has no weights to prune, or BiP cannot prune it.
        """
        options = self.options
        if options is None:
            return
        if not options.before:
            self._layers = prunable_layers(base)
            return
        masks: list[Any] = [None]
        if PartialState().is_main_process:
            masks = [self._choose(base, options, checkpoint, batches)]
        broadcast_object_list(masks)
        # not those with values: a process may have empty weights until the first one sends its own (FSDP)
        candidates = candidate_layers(base)
        self._layers = {path: candidates[path] for path in masks[0]}
        self._prune(masks[0], stored=options.by == "bip")
        assert self.record is not None, "set by pruning"
        mark_pruned(base, self.record)

    def _choose(
        self, base: nn.Module, options: PruneOptions, checkpoint: str | None, batches: PruningBatches | None
    ) -> dict[str, Tensor]:
        layers = prunable_layers(base)
        if options.by == "magnitude":
            return magnitude_masks(layers, options.share, options.structured)
        kept = read_pruning(Path(checkpoint)) if checkpoint else None
        if kept is not None:
            return kept.masks(layers)[1]
        assert batches is not None, "given for a way that reads rows"
        return _bip_masks(base, layers, options, batches)

    def _prune(self, masks: dict[str, Tensor], stored: bool) -> None:
        options = self.options
        assert options is not None, "asked before"
        self._masks, self.record = masks, record_of(options.by, options.share, options.structured, masks, stored)
        apply_masks(self._layers, masks)

    def check_alone(self, model: nn.Module, method: str) -> None:
        """Refuse a method that prunes the base itself.

        Raises:
            ConfigError: naming it.
        """
        configs = model.peft_config.values() if isinstance(model, PeftModel) else ()
        if self.options is not None and any(getattr(config, "prunes_base", False) for config in configs):
            raise ConfigError(
                f'prune and method "{method}" with its own sparsity both set weights of the base to zero; leave one of '
                "them out."
            )

    def callbacks(self) -> list[TrainerCallback]:
        """Callbacks of the Trainer."""
        if self.options is None:
            return []
        if self.options.before:
            return [KeepPruned(self)]
        penalty = self.options.penalty
        return [L1Penalty([*self._layers], L1_PENALTY if penalty is None else penalty)]

    def check_sharding(self, trainer: Any) -> None:
        """Refuse trainings that divide the weights which are pruned and trained.

        Raises:
            ConfigError: FSDP or DeepSpeed.
        """
        if self.options is None or not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            return
        if trained_weights(trainer.model, self._layers):
            raise ConfigError(
                "prune keeps zeros in whole weights that are trained, which FSDP and DeepSpeed divide; leave it out, "
                "or take a method that freezes the base."
            )

    def finish(self, model: nn.Module) -> None:
        """Prune the trained weights, if they were not before the training.

        Raises:
            ConfigError: the training has left no weights to prune.
        """
        options = self.options
        if options is None or options.before:
            return
        self._layers = prunable_layers(unwrap(model))
        self._prune(magnitude_masks(self._layers, options.share, options.structured), stored=False)

    def write(self, folder: Path, writes: bool = True) -> None:
        """Write how the base is pruned beside an adapter or checkpoint, in the process that `writes`.

        A model that was pruned in the end holds its zeros itself.
        """
        if writes and self.record is not None and self.options is not None and self.options.before:
            write_pruning(folder, self.record, self._layers, self._masks)

    def trained(self, model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        """Parameters of a model that are pruned and trained, with their masks."""
        return [(parameter, self._masks[path]) for parameter, path in trained_weights(model, self._masks)]

    def summary(self) -> dict[str, Any] | None:
        """Entry of metrics.json; None without pruning."""
        if self.record is None:
            return None
        return {**self.record.model_dump(exclude={"layers"}), "layers": len(self._masks)}


def prune_alike(base: nn.Module, values: Mapping[str, Any]) -> None:
    """Prune a base so that as many weights are zero as in a run with this option `prune`."""
    RunPruning(read_prune(quick_prune(values))).begin(base)


def quick_prune(values: Mapping[str, Any]) -> dict[str, Any]:
    """The option `prune` with magnitude in place of BiP: another choice of as many weights, without training rows."""
    if values.get("by") != "bip":
        return dict(values)
    return {"by": "magnitude"} | {name: values[name] for name in ("share", "structured") if name in values}


def _bip_masks(
    base: nn.Module, layers: Mapping[str, Any], options: PruneOptions, batches: PruningBatches
) -> dict[str, Tensor]:
    """Masks of BiP, on the device of the training; the base comes back to its own."""
    steps, given = options.steps or BIP_STEPS, ("learning_rate", "mask_learning_rate", "penalty")
    values = {name: getattr(options, name) for name in given if getattr(options, name) is not None}
    home = next(base.parameters()).device
    base.to(batches.device)
    try:
        rows = batches(base, 2 * steps)
        masks = bip_masks(base, layers, rows, options.share, options.structured, steps=steps, **values)
    finally:
        base.to(home)
    return {path: mask.cpu() for path, mask in masks.items()}


def trained_weights(model: nn.Module, paths: Mapping[str, Any]) -> list[tuple[nn.Parameter, str]]:
    """Trained weights of some layers of a base, or of copies that an adapter trains in full, with the layer's path."""
    found = []
    for name, parameter in model.named_parameters():
        path, _, leaf = name.removeprefix(PEFT_PREFIX).rpartition(".")
        path = _SAVED.sub("", path)
        if leaf == "weight" and parameter.requires_grad and path in paths:
            found.append((parameter, path))
    return found


class KeepPruned(TrainerCallback):
    """Callback that keeps pruned weights at zero where they are trained, and saves the masks with each checkpoint.

    Their gradients are zero too, and so have no part in a norm that gradients are clipped to.
    """

    def __init__(self, pruning: RunPruning) -> None:
        self.pruning = pruning
        self._kept: list[tuple[nn.Parameter, Tensor]] = []
        self._hooks: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the trained weights that are pruned."""
        self._kept = []
        for parameter, mask in self.pruning.trained(kwargs["model"]):
            kept = mask.to(parameter.device)
            self._kept.append((parameter, kept))
            self._hooks.append(parameter.register_hook(lambda gradient, kept=kept: gradient * kept))
        self._set_zeros()

    @torch.no_grad()
    def _set_zeros(self) -> None:
        for parameter, kept in self._kept:
            parameter.masked_fill_(~kept, 0.0)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set what the optimizer has changed without a gradient, as Muon does."""
        self._set_zeros()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save how the base is pruned, for a resume."""
        if args.should_save:
            self.pruning.write(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the hooks."""
        while self._hooks:
            self._hooks.pop().remove()


class L1Penalty(TrainerCallback):
    """Callback that adds the gradient of penalty * (sum of |w|) to that of some weights, once in each step.

    It comes behind clipping, so that the norm of the loss's gradient alone is clipped.

    Args:
        paths: paths of the layers.
        penalty: factor of the L1 norm.
    """

    def __init__(self, paths: list[str], penalty: float) -> None:
        self.paths, self.penalty = dict.fromkeys(paths), penalty

    @torch.no_grad()
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the gradient, which is 0 at 0."""
        for parameter, _ in trained_weights(kwargs["model"], self.paths):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.sign(), alpha=self.penalty)
