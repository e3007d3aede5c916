"""`transformers.Trainer` for adapters: decay groups, frozen normalisation, exact resume."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from peft_lab.backbones.frozen_norms import set_frozen_norms
from peft_lab.data.row_stream import RowStream
from peft_lab.hub.push import create_repository, push
from peft_lab.runs.optimization import OptimizationOptions, read_phases
from peft_lab.training.callbacks.notebook import name_splits
from peft_lab.training.checkpoint_manifest import WriteManifest
from peft_lab.training.checkpoints import order_times
from peft_lab.training.learning_rates import phase_schedule, rates_of_parameters, split_groups
from peft_lab.training.model_rows import plain_errors_of_workers
from peft_lab.training.non_finite import NonFiniteGuard, check_evaluation, check_weights
from peft_lab.training.own_loss import check_own_loss
from peft_lab.training.process_arrays import share_arrays
from peft_lab.training.read_training_data import ReadTrainingData
from peft_lab.training.repeated_rows import RepeatedRows
from peft_lab.training.sharding import gather_adapter, keep_shared_whole, prepare_sharding
from peft_lab.training.sharpness import SharpnessAware, check_sharpness
from peft_lab.training.step_timer import StepTimer, factor
from peft_lab.tuners.layer import AdapterLayer
from peft_lab.tuners.operations import ExpertWeight
from peft_lab.utils import strict_json, verbosity

#: Loss in place of the model's own, from the model, a batch, and the number of answers of the step.
TrainingLoss = Callable[[nn.Module, dict[str, Any], Any], tuple[torch.Tensor, Any]]

#: Trainer's own measurements of an evaluation; they are no property of the model.
_TIMINGS = ("runtime", "samples_per_second", "steps_per_second", "epoch", "model_preparation_time")


class LabTrainer(Trainer):
    """Trainer for adapters and baselines.

    Everything not named here is `transformers.Trainer`'s own.

    - Parameters with at most one dimension get no weight decay, whatever their name, unless the method declares that
      zero is the base's own value (SVFit's singular values); all others get it. (Trainer goes by name, and would decay
      `q_proj.ssf_scale` but not `layernorm.ssf_scale`.)
    - Normalisation layers whose parameters are frozen keep their running statistics: these are not in an adapter file.
    - The gradient of a batch is the same however it is divided into accumulation steps and processes, also for the
      many heads that take `num_items_in_batch` and ignore it.
    - A checkpoint of a finished training is recognised, so that resuming from it trains no further step.
    - A checkpoint has a manifest, by which `checkpoints.checkpoint_to_resume` finds every later damage.
    - An evaluation in several processes is that of the adapter that is saved, and its loss counts each row once.
    - The first loss, gradient or weight that is not finite ends the training by a `DivergedError`, and none of them is
      saved.
    - No pickle is written beside the weights. A push uploads what `peft-lab push` does, when the run is over.

    Args:
        optimization: options of the run for its learning rates, schedule, sharpness and weights.
        training_loss: loss in place of the model's own in training steps: from the model, a batch, and the number of
            answers of all batches of the step or None, the loss and the model's outputs.
        head_modules: module paths of the task head, as they were before the adapter was put on.
        max_seconds: end training after this time of steps; the learning rate then falls to 0 over time, not steps.
        inputs: what is trained on, for the manifest of each checkpoint (`run_inputs.inputs_of`).
        keeps_labels: False if `preprocess_logits_for_metrics` leaves nothing to compare the labels with; an evaluation
            then keeps none of them.
    """

    model: Any
    hub_model_id: Any

    def __init__(
        self,
        *args: Any,
        optimization: OptimizationOptions | None = None,
        training_loss: TrainingLoss | None = None,
        head_modules: Sequence[str] = (),
        max_seconds: float | None = None,
        inputs: Mapping[str, Any] | None = None,
        keeps_labels: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._training_loss = training_loss
        others = (self.label_smoother, self.compute_loss_func, training_loss)
        check_own_loss(self.model, any(other is not None for other in others))
        # Trainer would call it behind `prediction_step`, and keep all labels
        self._reduce = None if keeps_labels else self.preprocess_logits_for_metrics
        if self._reduce is not None:
            self.preprocess_logits_for_metrics = None
        prepare_sharding(self)
        name_splits(self)
        if verbosity.level() == "quiet":
            self.remove_callback(PrinterCallback)  # it prints what Trainer logs where no bar is drawn
        # behind the callbacks that were given, which may add files to a checkpoint, and before the timer's clock
        self.add_callback(WriteManifest(inputs or {}))
        self.add_callback(StepTimer(max_seconds))
        self.add_callback(_HandOnEpoch(self.data_collator))
        self._reader = ReadTrainingData()
        self.add_callback(self._reader)
        self.optimization = optimization or OptimizationOptions()
        self._sharpness: SharpnessAware | None = None
        if self.optimization.sam_rho is not None:
            check_sharpness(self)
            self._sharpness = SharpnessAware(self.optimization.sam_rho)
        self.head_modules = tuple(head_modules)
        self._loss_divides: bool | None = None
        self._guard = NonFiniteGuard()
        self._repeated = RepeatedRows(self.accelerator)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[Any, Any, Any]:
        """Loss, logits and labels of a batch; without its labels if they are not to be kept.

        Rows that several processes repeat are left out of the loss.
        """
        found = super().prediction_step(model, self._repeated.leave_out(inputs), *args, **kwargs)
        loss, logits, labels = self._repeated.put_back(found)
        if self._reduce is not None and logits is not None and labels is not None:
            return loss, self._reduce(logits, labels), labels.flatten(1)[:, :0]
        return loss, logits, labels

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters with weight decay.

        Those of two dimensions or more, and the `decayed_vectors` of a method. The axis of the experts does not count.
        """
        decayed = {id(parameter) for parameter in model.parameters() if parameter.ndim > 1}
        for layer in model.modules():
            if not isinstance(layer, AdapterLayer):
                continue
            if isinstance(layer.base_layer, ExpertWeight):
                for name in layer.adapter_layer_names:
                    decayed -= {id(parameter) for parameter in getattr(layer, name).values() if parameter.ndim == 2}
            for name in layer.decayed_vectors:
                decayed |= {id(parameter) for parameter in getattr(layer, name).values()}
        return [name for name, parameter in model.named_parameters() if id(parameter) in decayed]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer, with groups of their own for parameters that have another learning rate."""
        # Trainer calls this again at resume, when the groups are there already
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model) if model is not None else super().create_optimizer()
        if fresh:
            trained = self.model if model is None else model
            rates = rates_of_parameters(
                trained, self.optimization, self.args.learning_rate, self.head_parameters(trained)
            )
            split_groups(optimizer, rates)
        return optimizer

    def head_parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """Parameters of the task head, in peft's trained copy too."""
        # dots on both sides, because a bare path such as `fc` would match `fc2` too
        marks = [f".{path}." for path in self.head_modules]
        found = []
        for name, parameter in model.named_parameters():
            if any(mark in f".{name}" for mark in marks):
                found.append(parameter)
        return found

    def get_train_dataloader(self) -> DataLoader:
        """Loader of the training rows; of a stream, each process reads its own part."""
        stream = self.train_dataset
        if not isinstance(stream, RowStream):
            return super().get_train_dataloader()
        args = self.args
        # not by accelerator.prepare, which would let the first process read all rows and send them to the others
        return DataLoader(
            stream.of_process(args.process_index, args.world_size),
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
        )

    def drawn_positions(self) -> list[int]:
        """Positions of the training rows that this process draws until `max_steps`, as its loader will.

        Those that are read ahead of the last step are among them.
        """
        with torch.random.fork_rng(devices=[]):
            loader = self.get_train_dataloader()
            # of the loaders that accelerate keeps, only the one of the training counts
            self.accelerator._dataloaders.pop()
            batches = self.args.max_steps * self.args.gradient_accumulation_steps
            # accelerate looks one batch ahead, to know the last one, and each worker some more (two by default)
            batches += 1 + self.args.dataloader_num_workers * (self.args.dataloader_prefetch_factor or 2)
            found: list[int] = []
            for batch in islice(getattr(loader, "batch_sampler", None) or (), batches):
                found += batch
        return found

    @property
    def timer(self) -> StepTimer:
        """Timer of the training steps; a resume replaces it."""
        return next(c for c in self.callback_handler.callbacks if isinstance(c, StepTimer))

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Create the learning rate schedule, over time where time ends the training."""
        if self.lr_scheduler is None and self.optimization.lr_phases is not None:
            stepped: Any = optimizer or self.optimizer
            phases = read_phases(self.optimization.lr_phases)
            self.lr_scheduler = phase_schedule(stepped, phases, num_training_steps)
            return self.lr_scheduler
        if self.args.lr_scheduler_type == "warmup_stable_decay":
            # transformers has no default, and a tenth is that of its paper (MiniCPM, arXiv 2404.06395)
            given: Any = self.args.lr_scheduler_kwargs
            known = dict(given or {})
            known.setdefault("num_decay_steps", max(1, round(0.1 * num_training_steps)))
            self.args.lr_scheduler_kwargs = known
        if self.lr_scheduler is None and self.timer.max_seconds and self.args.lr_scheduler_type == "linear":
            warm_up = self.args.warmup_steps  # a part of the whole, as `training.training_arguments` has made sure
            optimized: Any = optimizer or self.optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimized, lambda _: factor(self.timer.progress, warm_up)
            )
            return self.lr_scheduler
        return super().create_scheduler(num_training_steps, optimizer)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the loss with frozen normalisation layers in eval mode.

        Trainer has just called `model.train()`, which switches them on.
        """
        set_frozen_norms(self.model)  # of baselines and peft's own tuners; ours see to it themselves
        if self._training_loss is not None and model.training:
            return self._compute_training_loss(model, inputs, return_outputs, num_items_in_batch)
        # an evaluation does not pass through `get_batch_samples`, so the divisor is mended here as well
        items = None if self._repeated.are_there else self._divisor(num_items_in_batch, inputs)
        return super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=items)

    def _compute_training_loss(self, model: nn.Module, inputs: Any, return_outputs: bool, items: Any) -> Any:
        assert self._training_loss is not None, "asked before"
        # without a count of items the loss is a mean, which Trainer divides by the number of accumulation steps
        self.loss_is_scaled_for_ga = items is not None
        loss, outputs = self._training_loss(model, inputs, items)
        if items is not None and self.args.average_tokens_across_devices:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Batches of one step, and the divisor of their loss."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        # with None from here, Trainer's step itself divides the loss by the number of accumulation steps
        if batches and self._training_loss is None:
            items = self._divisor(items, batches[0])
        if self._sharpness is not None:
            self._sharpness.begin(batches, items)
        return batches, items

    def _divisor(self, items: Any, batch: dict[str, Any]) -> Any:
        """Divisor of the loss: `items`, or None where the model ignores it.

        Trainer goes by the signature of `forward`, and would make the gradients and losses of such a model (for one,
        `BertForSequenceClassification`) too large by the number of accumulation steps and processes.
        """
        if items is None or self.label_smoother is not None or self.compute_loss_func is not None:
            return items
        # the answer is kept, because a test costs two forward passes
        if self._loss_divides is None:
            self._loss_divides = self._divides_by_items(batch)
        return None if self._loss_divides is False else items

    @torch.no_grad()
    def _divides_by_items(self, batch: dict[str, Any]) -> bool | None:
        """Test whether the loss halves when the number of items doubles.

        None if this batch cannot tell, because its loss is 0 or not finite.
        """
        if not self.model_accepts_loss_kwargs:
            return None
        training, inputs = self.model.training, self._prepare_inputs(dict(batch))
        # in eval mode, because dropout would make the two losses differ
        self.model.eval()
        with torch.random.fork_rng(devices=[]):
            losses = [self.model(**inputs, num_items_in_batch=torch.tensor(n))["loss"].float() for n in (1, 2)]
        self.model.train(training)
        once, halved = (loss.mean().item() for loss in losses)
        return None if once == 0 or not math.isfinite(once) else math.isclose(once, 2 * halved, rel_tol=0.1)

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Train on one batch, and keep its loss for the check of the step."""
        loss = super().training_step(model, *args, **kwargs)
        self._guard.add_loss(loss)
        sharpness = self._sharpness
        if sharpness is not None and sharpness.completes_step():
            with sharpness.ascent(model) as moved:
                for batch in sharpness.batches if moved else ():
                    self._guard.add_loss(super().training_step(model, batch, sharpness.items))
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        # Trainer asks for it once before each update of the weights, with the norm from before clipping
        norm = super()._get_grad_norm(*args, **kwargs)
        self._guard.check_step(self, norm)
        return norm

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate the adapter that is saved, that of the first process, and refuse a loss that is not finite."""
        share_arrays(self.model)
        output = super().evaluation_loop(*args, **kwargs)
        rows = kwargs.get("metric_key_prefix", "eval")
        check_evaluation((output.metrics or {}).get(f"{rows}_loss"), rows, self.state.global_step)
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with None in the history for numbers that are not finite."""
        super().log(logs, *args, **kwargs)
        self.state.log_history[-1] = strict_json.finite(self.state.log_history[-1])

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train; of a finished training only load the weights."""
        if isinstance(resume_from_checkpoint, str) and self._is_finished(resume_from_checkpoint):
            found = self._restore(resume_from_checkpoint)
        else:
            with plain_errors_of_workers():
                found = super().train(resume_from_checkpoint, *args, **kwargs)
        check_weights(self)
        return found

    def fit_features(self) -> None:
        """Fit the model to features of the training rows, read once in order, without gradient steps."""
        self._reader.before_sharding(self.model, self.get_train_dataloader(), self.args.eval_batch_size)
        check_weights(self)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository before training, so that a refusal comes early."""
        if not self.is_world_process_zero():
            return
        # made absolute, because the path `.` has no name
        name = self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name
        # None means private too: nothing may become public by omission
        wanted = self.args.hub_private_repo if private is None else private
        self.hub_model_id = create_repository(name, wanted is not False, token or self.args.hub_token)
        # Trainer reads this attribute later, and only the method replaced here would set it
        self.push_in_progress = None

    def push_to_hub(
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Upload the run's folder as `peft-lab push` does, and wait for it.

        None on all but the first process.
        """
        token = token or self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        if not self.is_world_process_zero():
            return None
        wanted = self.args.hub_private_repo if private is None else private
        return push(
            str(self.args.output_dir),
            str(self.hub_model_id),
            wanted is not False,
            revision=revision or self.args.hub_revision,
            token=token,
            commit_message=commit_message,
        )

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        if self.is_fsdp_enabled and resume_from_checkpoint is None:
            self._reader.before_sharding(self.model, train_dataloader, self.args.eval_batch_size)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        gather_adapter(self.model)
        keep_shared_whole(self.model)
        return prepared

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        check_weights(self)
        # Trainer starts from an infinite metric, which JSON does not have
        self.state.best_metric = strict_json.finite(self.state.best_metric)
        # Trainer keeps the checkpoints that were changed last, which are the wrong ones once a clock was set back
        if self.args.should_save:
            order_times(str(self.args.output_dir))
        super()._save_checkpoint(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:  # a pickle, which nothing here reads
            (Path(str(output_dir or self.args.output_dir)) / "training_args.bin").unlink(missing_ok=True)

    def _is_finished(self, checkpoint: str) -> bool:
        state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        if state.global_step >= self._max_steps():
            return True
        control = state.stateful_callbacks.get("TrainerControl", {})
        stopped = bool(control.get("args", {}).get("should_training_stop"))
        return stopped and state.global_step < state.max_steps  # early stopping, not the end of a shorter schedule

    def _max_steps(self) -> int:
        if self.args.max_steps > 0:
            return self.args.max_steps
        updates = max(math.ceil(len(self.get_train_dataloader()) / self.args.gradient_accumulation_steps), 1)
        return math.ceil(self.args.num_train_epochs * updates)

    def _restore(self, checkpoint: str) -> TrainOutput:
        self._load_from_checkpoint(checkpoint)
        self.state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        # as at the end of an uninterrupted training
        best = Path(checkpoint).with_name(f"checkpoint-{self.state.best_global_step}")
        if self.args.load_best_model_at_end and best.is_dir():
            self.state.best_model_checkpoint = str(best)
            self._load_best_model()
        return TrainOutput(self.state.global_step, float("nan"), {})


class _HandOnEpoch(TrainerCallback):
    """Tell a collator that draws at random which epoch begins, also where training goes on within one."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if hasattr(self.collator, "set_epoch"):
            self.collator.set_epoch(int(state.epoch or 0))


def scores(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Scores of an evaluation by Trainer, without prefix and timings."""
    named = {key.removeprefix(prefix): value for key, value in values.items()}
    return {key: value for key, value in named.items() if key not in _TIMINGS}
