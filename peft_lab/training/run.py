"""Training run: a method trained on a task, measured and saved.

The result is a folder with the adapter, its metrics and its model card.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate import PartialState
from peft import PeftModel
from transformers import EarlyStoppingCallback, TrainingArguments, enable_full_determinism, set_seed

from peft_lab.adapter_files.names import write_json
from peft_lab.backbones import module_roles
from peft_lab.backbones.head_features import head_features
from peft_lab.backbones.pypi_weights import cached_commit
from peft_lab.data import prompt_column
from peft_lab.data.row_maps import map_options, recorded_reads
from peft_lab.data.splits import Splits, load_splits
from peft_lab.data.task_registry import kind as task_kind
from peft_lab.data.task_registry import load_task
from peft_lab.errors import WriteError
from peft_lab.hub.model_card import write_card
from peft_lab.loading.foreign_adapters import write_record
from peft_lab.loading.load_run import adapt, load_base, method_config
from peft_lab.metrics.baselines import comparison, shortfall
from peft_lab.metrics.per_row import written_metrics
from peft_lab.metrics.predictions import Predictions, write_predictions
from peft_lab.registry import MethodInfo
from peft_lab.runs import own_tasks, run_folder
from peft_lab.runs.pruning import read_prune
from peft_lab.runs.run_config import RunConfig
from peft_lab.training.arguments import as_run_config, check_best_metric, check_fitted_by_class, training_arguments
from peft_lab.training.baseline_scores import of_untouched_base, split_of_base, without_input
from peft_lab.training.cached_features import CachedFeatures
from peft_lab.training.checkpoints import checkpoint_to_resume, last_whole_checkpoint, remove_checkpoints
from peft_lab.training.chunked_loss import chunked_loss
from peft_lab.training.drawn_rows import DrawnRows, draws_few, known_rows
from peft_lab.training.learning_rates import rate_record
from peft_lab.training.model_rows import check_options, chosen_rows, hold_out, model_rows
from peft_lab.training.packing import packed_length
from peft_lab.training.peak_memory import PeakMemory
from peft_lab.training.pruning import RunPruning
from peft_lab.training.pruning_batches import PruningBatches
from peft_lab.training.run_inputs import base_hash, check_finished, check_inputs, inputs_of, load_finished
from peft_lab.training.run_metrics import class_name, data_record, parameter_counts
from peft_lab.training.run_trainer import build_trainer
from peft_lab.training.trainer import LabTrainer, scores
from peft_lab.training.unsupervised import check_start
from peft_lab.training.weighted_loss import read_row_weights, weights_digest
from peft_lab.tuners.registration import has_trait
from peft_lab.utils import strict_json
from peft_lab.utils.atomic_files import write_errors, write_text
from peft_lab.utils.interruption import going_on
from peft_lab.utils.versions import device_name, versions

if TYPE_CHECKING:
    from transformers import EvalPrediction, PreTrainedModel

    from peft_lab.data.task_schema import Task

logger = logging.getLogger("peft_lab")

_NO_ROOM = "make room, and repeat the command: the run goes on from its last whole checkpoint"


@dataclass
class TrainResult:
    """Result of `train`.

    Attributes:
        output_dir: folder with the adapter, its processor, metrics, labels and card.
        metrics: the content of metrics.json.
        model: the trained model, adapter included.
        trainer: the Trainer that was used; None if the run had been finished before.
        is_main_process: False on all but the first process of a distributed run.
    """

    output_dir: Path
    metrics: dict[str, Any]
    model: PreTrainedModel | PeftModel
    trainer: LabTrainer | None = None
    is_main_process: bool = True


def train(config: RunConfig | Mapping[str, Any] | str | Path | None = None, /, **options: Any) -> TrainResult:
    """Train an adapter or a baseline, evaluate it, and save everything.

    A run that was interrupted is continued from its last complete checkpoint; one that is finished is not repeated.

    Args:
        config: a `RunConfig`, a mapping, or a YAML or JSON file; None if everything is in `options`.
        options: fields of `RunConfig` and flags of `TrainingArguments`; they override `config`.

    Raises:
        ConfigError: an option or the backbone is not what it should be; raised before anything is written.
        TaskError: the task or its data are not what they should be.
        AdapterMismatchError: the adapter of a finished run does not fit its base any more.
        WriteError: the output folder cannot be written; the same call goes on from the last whole checkpoint.
    """
    config = as_run_config(config, options)
    info, task, state = run_folder.check_run(config)
    folder = Path(config.output_dir).expanduser()
    check_options(config, task)
    arguments = training_arguments(config, info)
    check_best_metric(arguments, task)
    if state == "finished":
        metrics = run_folder.read_metrics(folder)
        check_finished(metrics, task, folder)
        result = TrainResult(folder, metrics, load_finished(folder, task))
        also = " `peft-lab push` uploads it." if arguments.push_to_hub else ""
        logger.warning(
            'The run in "%s" is finished; pass --overwrite_output_dir to repeat it.%s', config.output_dir, also
        )
        return result
    run = _Run(config, info, task, arguments, folder)
    try:
        with going_on(run.how_to_go_on), write_errors(folder, _NO_ROOM):
            return run.execute()
    except WriteError:
        run.clear_unfinished()
        raise


@contextmanager
def prepare(options: Mapping[str, Any]) -> Iterator[LabTrainer]:
    """Trainer of a run before its first step.

    Nothing is trained, and nothing stays on the disk.
    """
    with write_errors(tempfile.gettempdir()), tempfile.TemporaryDirectory() as scratch:
        # what a step costs is asked of the whole model, whose backbone stored features would stand in for
        config = as_run_config(None, {**options, "output_dir": scratch, "features": None})
        info, task = config.check(), load_task(config.task)
        check_options(config, task)
        run = _Run(config, info, task, training_arguments(config, info), Path(scratch))
        run._load()
        run._build_trainer()
        yield run.trainer


class _Run:
    """Steps of one run; each reads what the earlier ones have set."""

    def __init__(
        self, config: RunConfig, info: MethodInfo, task: Task, arguments: TrainingArguments, folder: Path
    ) -> None:
        self.config, self.info, self.task, self.arguments, self.folder = config, info, task, arguments, folder
        self.kind = task_kind(task.kind)
        arguments.label_names = list(self.kind.trainer_labels)
        self.start = time.perf_counter()
        self.process = PartialState()
        #: State of the folder once it is this run's; before, nothing was written.
        self.claimed, self.was_empty = False, False
        #: True if checkpoints are written or read, which record what is trained on; hashing it takes time.
        self.keeps_record, self.base = False, ""
        self.pruning = RunPruning(read_prune(config.prune))
        self.checkpoint: str | None = None
        self.inputs: dict[str, Any] = {}
        #: Split that is evaluated, and predictions for its rows; test comes last, if there is one.
        self.scored = "validation"
        self.items: Predictions | None = None
        #: Weights of the training rows; None without any.
        self.row_weights: list[float] | None = None
        #: Options of the task that were chosen on the validation rows.
        self.tuned: dict[str, Any] = {}

    def execute(self) -> TrainResult:
        """Train, evaluate and save."""
        # in this order every refusal comes before `_claim_folder` removes or writes anything
        checkpoint = checkpoint_to_resume(
            self.folder,
            self.arguments.resume_from_checkpoint,
            self.process.num_processes,
            overwrite=self.config.overwrite_output_dir,
        )
        self.checkpoint, self.keeps_record = checkpoint, checkpoint is not None or self.arguments.save_strategy != "no"
        self._load()
        if self.keeps_record:
            self.inputs = inputs_of(self.config, self.rows, self.base, self.splits, self.raw["train"], self.reads)
            if self.row_weights is not None:
                self.inputs["data"]["row_weights"] = weights_digest(self.row_weights)
        if checkpoint is not None:
            check_inputs(checkpoint, self.inputs, own=Path(checkpoint).parent.resolve() == self.folder.resolve())
        self._build_trainer()
        rows = self.raw if self.kind.raw_baseline else {**self.rows, "train": known_rows(self.rows["train"])}
        known = self.config.unsupervised is None
        self.baselines = without_input(self.kind, self.task, self.labels, rows, known)
        self._claim_folder(checkpoint)
        # memory and time are those of the training steps, without loading and evaluation at the end
        lookup = self.features.used() if self.features else nullcontext()
        with chunked_loss(self.model, self.config.loss_chunk_size), lookup:
            self._score_untouched_base()
            with PeakMemory(self.arguments.device) as memory:
                started = time.perf_counter()
                if self.info.takes_steps:
                    self.trainer.train(checkpoint)
                else:
                    self.trainer.fit_features()
                seconds = time.perf_counter() - started
            self.pruning.finish(self.model)
            scores = self._evaluate()
        # without `_internal_call` Trainer would push now, before the metrics and the card are written
        self.trainer.save_model(str(self.folder), _internal_call=True)
        self.pruning.write(self.folder, writes=self.process.is_main_process)
        self.metrics = self._measured(scores, memory, seconds, checkpoint)
        write_record(self.model, self.folder, writes=self.process.is_main_process)
        if self.process.is_main_process:
            self._write()
        # no process may return or push before the first one has written the folder
        self.process.wait_for_everyone()
        if shortfall(self.metrics) and self.process.is_main_process:
            logger.warning("%s", shortfall(self.metrics))
        if self.arguments.push_to_hub:
            self.trainer.push_to_hub()
        return TrainResult(self.folder, self.metrics, self.model, self.trainer, self.process.is_main_process)

    def _score_untouched_base(self) -> None:
        do_eval = self.config.training_arguments.get("do_eval") is not False
        split = split_of_base(self.trainer, self.kind, self.task, self.rows, do_eval)
        if split is not None:
            # metrics may look at the rows, and evaluations in training are those of the validation rows
            before, self.scored = self.scored, split
            self.baselines[split].append(of_untouched_base(self.trainer, self.rows[split]))
            self.scored = before

    def _load(self) -> None:
        seed = self.arguments.seed
        if self.arguments.full_determinism:
            enable_full_determinism(seed)
        else:
            set_seed(seed)
        # False is also the default of TrainingArguments, so only what the run itself says counts
        wants_test = self.config.training_arguments.get("do_predict") is not False
        # the first process fills the caches that the others then read
        with self.process.main_process_first(), self._maps():
            self.splits: Splits = load_splits(self.task, test=wants_test and self.task.has_test)
        self.labels = self.splits.labels
        self._load_model(seed)
        self._prepare_rows(seed)

    def _load_model(self, seed: int) -> None:
        """Load processor and backbone, and put the method on it."""
        keeps_head, config = has_trait(self.info, "uses_source_head"), self.config
        source = (config.model_name_or_path, config.model_revision, config.dtype)
        self.processor, base = load_base(self.kind, self.task, self.labels, *source, keeps_head, config.quantization)
        self.kind.check_processor(self.processor, self.task, base)
        check_fitted_by_class(self.info, self.task)
        check_start(self.config, self.info, self.kind, self.task, base, self.labels)
        # found before the adapter is on it, because peft wraps the head and its paths change
        self.head_modules = [] if keeps_head else module_roles.head_modules(base)
        facts = head_features(base) if self.config.features else None
        batches = PruningBatches(config, self.arguments, self.kind, self.task, self.processor, self.splits)
        self.pruning.begin(base, self.checkpoint, batches)  # before the base is hashed
        if self.keeps_record:
            self.base = base_hash(base, self.head_modules)
        set_seed(seed)  # the backbone's own random draws must not shift the adapter's
        settings = self.kind.adapter_settings(self.processor, self.task, self.labels)
        settings |= prompt_column.settings(self.splits.prompt_values)
        self.model = adapt(base, self.info, self.config.method_args, self.kind.task_type(self.task), settings)
        self.features = CachedFeatures(self.model, facts, self.info.name) if self.config.features else None

    def _prepare_rows(self, seed: int) -> None:
        """Limit the rows of each split, and preprocess them for the model."""
        self.raw = chosen_rows(self.config, self.splits, seed)
        if self.config.alternating_every is not None:
            self.raw |= hold_out(self.config, self.task, self.model, self.raw["train"], seed)
        if self.config.row_weight_column is not None:
            self.row_weights = read_row_weights(self.task, self.config.row_weight_column, self.raw["train"])
        drops, packed = bool(self.arguments.remove_unused_columns), None
        if self.config.packing:
            packed = packed_length(self.info, self.kind, self.processor, self.task, self.model)
        with self.process.main_process_first(), self._maps():
            asks_all = self.features is not None or self.config.unsupervised is not None
            whole = packed is not None or asks_all
            few = draws_few(self.arguments, self.model, self.raw["train"], whole)
            with recorded_reads() as self.reads:
                self.raw, self.rows = model_rows(
                    self.raw, self.kind, self.processor, self.task, self.model, drops, packed, few
                )
        if self.task.streaming:
            data_seed = self.arguments.data_seed
            self.rows["train"] = self.rows["train"].shuffled(seed if data_seed is None else data_seed)

    def _maps(self) -> AbstractContextManager[None]:
        # the other processes find what the first one has kept
        overwrite = self.config.overwrite_cache and self.process.is_main_process
        return map_options(self.config.preprocessing_num_workers, overwrite)

    def _build_trainer(self) -> None:
        if self.features is not None:
            collator = self.kind.data_collator(self.processor, self.task, self.model)
            with self.process.main_process_first():
                batch = self.arguments.per_device_eval_batch_size
                if self.config.quantization is None:
                    model: Any = self.model
                    model.to(self.arguments.device)
                self.rows = self.features.rows(self.rows, collator, self.processor, batch)
        self.trainer = build_trainer(
            self.config,
            self.arguments,
            self.kind,
            self.task,
            self.labels,
            self.processor,
            self.model,
            self.rows,
            self.row_weights,
            self.pruning,
            compute_metrics=self._scores_of_rows,
            head_modules=self.head_modules,
            inputs=self.inputs,
        )
        if isinstance(self.rows["train"], DrawnRows):
            with self._maps():
                self.rows["train"].read(self.trainer.drawn_positions())

    def _scores_of_rows(self, prediction: EvalPrediction) -> dict[str, float]:
        """Compute the metrics, and keep the predictions of each row.

        No split is evaluated a second time for them.
        """
        rows = self.raw[self.scored]
        if self.scored == "validation":
            self.tuned = self.kind.tune(self.task, self.labels, prediction)
        task = self.task.with_options(self.tuned)
        self.items = self.kind.row_predictions(prediction, task, rows)
        return self.kind.compute_metrics(task, self.labels, rows)(prediction)

    def _claim_folder(self, checkpoint: str | None) -> None:
        """Clear the folder and write run.yaml: nothing is refused from here on."""
        self.claimed = True
        if self.process.is_main_process:
            self.was_empty = not (self.folder.is_dir() and any(self.folder.iterdir()))
            if self.config.overwrite_output_dir:
                run_folder.remove_run(self.folder)
            # a checkpoint from elsewhere says nothing of those here, so all of them go
            inside = checkpoint if checkpoint and Path(checkpoint).parent.samefile(self.folder) else None
            remove_checkpoints(self.folder, after=inside)
            run_folder.write_run(self.config, self.folder)
        # the other processes must not save into the folder while it is being cleared
        self.process.wait_for_everyone()

    def how_to_go_on(self) -> str:
        """Sentence for a run that is stopped."""
        if not self.claimed:
            return "Stopped before the first step; nothing was written, and the same command starts again."
        last = last_whole_checkpoint(self.folder, self.process.num_processes)
        where = f"goes on from {Path(last).name}" if last else "starts again, because there is no checkpoint yet"
        return f"Stopped at step {self.trainer.state.global_step}; the same command {where}."

    def clear_unfinished(self) -> None:
        """Remove what was not written whole, so that the same command works once there is room."""
        if not self.claimed or not self.process.is_main_process or (self.folder / run_folder.METRICS).is_file():
            return
        last = last_whole_checkpoint(self.folder, self.process.num_processes)
        remove_checkpoints(self.folder, after=last)
        if last is None and self.was_empty:
            shutil.rmtree(self.folder)
        else:
            run_folder.remove_results(self.folder)

    def _evaluate(self) -> dict[str, dict[str, Any]]:
        """Score the validation rows and then, once, the test rows."""
        self.trainer.remove_callback(EarlyStoppingCallback)  # it would look for the validation metric in the test's
        wanted = {"validation": "eval", "test": "test"}
        if self.config.training_arguments.get("do_eval") is False:
            del wanted["validation"]
        found_scores = {}
        for split, prefix in wanted.items():
            if split not in self.rows:
                continue
            self.scored = split
            found = self.trainer.evaluate(self.rows[split], metric_key_prefix=prefix)
            # metrics of written text need generation, which Trainer's evaluation does not do
            written = self.kind.generation_scores(
                self.model, self.processor, self.raw[split], self.task, self.arguments.per_device_eval_batch_size
            )
            found_scores[split] = scores(found, f"{prefix}_") | written_metrics(written)
            if self.items is not None:
                self.items.columns.update({name: np.asarray(values) for name, values in written.items()})
        return found_scores

    def _measured(
        self, scores: dict[str, Any], memory: PeakMemory, seconds: float, checkpoint: str | None
    ) -> dict[str, Any]:
        baselines = {split: self.baselines[split] for split in scores if split in self.baselines}
        values = {
            # a token must not lie in a file that is meant to be shared
            "run": run_folder.shared_options(self.config.to_dict() | {"hub_token": None}),
            "metrics": scores,
            "main_metric": self.task.main_metric,
            **comparison(scores, baselines, self.task.main_metric),
            "learning_rate": self.arguments.learning_rate,
            "learning_rates": rate_record(self.trainer.optimizer),
            "seed": self.arguments.seed,
            "global_step": self.trainer.state.global_step,
            # of a stream, Trainer gives the share of max_steps
            "epoch": None if self.task.streaming else self.trainer.state.epoch,
            "resumed_from": Path(checkpoint).name if checkpoint else None,
            "best_checkpoint": Path(self.trainer.state.best_model_checkpoint or "").name or None,
            "base_revision": cached_commit(self.config.model_name_or_path, self.config.model_revision),
            "parameters": parameter_counts(self.trainer),
            "pruning": self.pruning.summary(),
            "adapter_bytes": run_folder.weights_bytes(self.folder),
            "peak_memory_bytes": memory.peak,
            "memory_before_training_bytes": memory.before,
            "train_seconds": seconds + self.trainer.timer.earlier,
            "step_seconds": self.trainer.timer.step_seconds,
            "wall_seconds": time.perf_counter() - self.start,
            "data": data_record(self.task, self._own_task(), self.labels, self.splits, self.raw),
            "method_config": method_config(self.model),
            "model_class": class_name(self.model),
            "processes": self.process.num_processes,
            "versions": versions(),
            "device": device_name(),
        }
        # as metrics.json holds them: None for a metric that is undefined, no path of this machine
        return run_folder.without_paths(strict_json.finite(values))

    def _own_task(self) -> Path | None:
        """Task file of the user's own; None for a built-in task."""
        return self.task.origin if self.config.task != self.task.name else None

    def _write(self) -> None:
        if self.labels:
            run_folder.write_labels(self.folder, list(self.labels), self.tuned)
        own = self._own_task()
        # your own task file may change or move later, so the run keeps a copy of it
        if own is not None:
            write_text(self.folder / run_folder.TASK, own.read_text(encoding="utf-8"))
            own_tasks.remember(own)
        # not by Trainer's own method, which writes NaN where a best metric is undefined
        write_json(self.folder / run_folder.HISTORY, run_folder.without_paths(asdict(self.trainer.state)))
        # the items are those of the split evaluated last, which is test only if test was scored
        if self.items is not None and "test" in self.metrics["metrics"]:
            write_predictions(self.folder, self.items)
        write_card(self.folder, self.metrics, self.info, self.task)
        write_json(self.folder / run_folder.METRICS, self.metrics)  # last: it marks the run as finished
