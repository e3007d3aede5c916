"""One run: task + backbone + method + training arguments -> `Trainer` -> a folder with the adapter and its metrics."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import EarlyStoppingCallback, TrainingArguments, enable_full_determinism, set_seed

from peft_lab.adapter_files.names import write_json
from peft_lab.backbones import module_roles
from peft_lab.backbones.pypi_weights import cached_commit
from peft_lab.data import prompt_column
from peft_lab.data.splits import Splits, carve, load_splits, per_class, subset
from peft_lab.data.task_registry import kind as task_kind
from peft_lab.data.task_registry import load_task
from peft_lab.data.task_schema import check_classes
from peft_lab.errors import ConfigError, PeftLabError, did_you_mean
from peft_lab.hub.model_card import write_card
from peft_lab.loading.foreign_adapters import write_record
from peft_lab.loading.load_run import adapt, count_parameters, load, load_base
from peft_lab.metrics import METRICS
from peft_lab.metrics.predictions import Items, write_items
from peft_lab.registry import MethodInfo
from peft_lab.runs import run_folder
from peft_lab.runs.run_config import RunConfig, load_run
from peft_lab.training.callbacks.bilevel import LEARNING_RATE, AlternatingActivation, activation_parameters
from peft_lab.training.trainer import LabTrainer, PeakMemory, last_complete_checkpoint, remove_checkpoints, scores
from peft_lab.utils.versions import device_name, versions

if TYPE_CHECKING:
    from transformers import EvalPrediction, PreTrainedModel, TrainerCallback

    from peft_lab.data.task_schema import Task

logger = logging.getLogger("peft_lab")

_T = TypeVar("_T")

#: Steps of a training that only the time ends.
_WITHOUT_END = 10_000_000
#: Rows of train that bi-level training holds out, and their share unless the run says otherwise.
HELD_OUT, HELD_OUT_FRACTION = "held_out", 0.1


@dataclass
class TrainResult:
    """What `train` returns.

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
        ConfigError, TaskError, AdapterMismatchError: what is wrong, before anything is written.
    """
    config = _as_config(config, options)
    info = config.check()
    task = load_task(config.task)
    if config.examples_per_class is not None:
        check_classes(task)
    state = run_folder.check_output_dir(config)
    folder = Path(config.output_dir).expanduser()
    arguments = training_arguments(config, info)
    _check_best_metric(arguments, task)
    if state == "finished":
        also = " `peft-lab push` uploads it." if arguments.push_to_hub else ""
        logger.warning(
            'The run in "%s" is finished; pass --overwrite_output_dir to repeat it.%s', config.output_dir, also
        )
        return TrainResult(folder, run_folder.read_metrics(folder), load(folder).model)
    return _Run(config, info, task, arguments, folder).execute()


def _as_config(config: Any, options: Mapping[str, Any]) -> RunConfig:
    if config is None:
        return RunConfig.from_mapping(options, "the arguments of train()")
    if isinstance(config, str | Path):
        return load_run(config, options)
    values = config.to_dict() if isinstance(config, RunConfig) else dict(config)
    return RunConfig.from_mapping({**values, **options}, "the arguments of train()")


def training_arguments(config: RunConfig, info: MethodInfo) -> TrainingArguments:
    """The run's `TrainingArguments`: its own flags over our defaults over Trainer's.

    Raises:
        ConfigError: Trainer refuses a value.
    """
    flags = dict(config.training_arguments)
    flags.setdefault("learning_rate", info.learning_rate)
    flags.setdefault("report_to", "none")
    flags.setdefault("restore_callback_states_from_checkpoint", True)  # else early stopping forgets its count at resume
    flags.setdefault("remove_unused_columns", False)  # the collator reads what the kind's preprocessing made
    flags.setdefault("label_names", ["labels"])
    flags.setdefault("hub_private_repo", True)
    flags.setdefault("hub_strategy", "end")
    if flags["hub_strategy"] != "end":
        raise ConfigError(
            f'hub_strategy "{flags["hub_strategy"]}" would upload checkpoints; only "end" (the finished run) can be.'
        )
    flags.pop("do_train", None)
    if config.max_seconds is not None and flags.keys().isdisjoint({"max_steps", "num_train_epochs"}):
        flags["max_steps"] = _WITHOUT_END
    if config.early_stopping_patience is not None:
        strategy = flags.setdefault("eval_strategy", "epoch")
        flags.setdefault("save_strategy", strategy)
        flags.setdefault("load_best_model_at_end", True)
        for steps in ("save_steps", "eval_steps"):
            other = "eval_steps" if steps == "save_steps" else "save_steps"
            if other in flags:
                flags.setdefault(steps, flags[other])
        flags.setdefault("metric_for_best_model", "loss")
    flags.setdefault("dataloader_pin_memory", torch.cuda.is_available())
    if not torch.cuda.is_available() and (flags.get("bf16") or flags.get("bf16_full_eval")):
        flags.setdefault("use_cpu", not torch.backends.mps.is_available())  # Trainer wants bf16 on CPU spelt out
    if flags.get("gradient_checkpointing") or flags.get("activation_checkpointing"):
        flags.setdefault("ddp_find_unused_parameters", False)  # as Trainer does for a model without an adapter
    return _refusing(TrainingArguments, output_dir=config.output_dir, **flags)


def _check_best_metric(arguments: TrainingArguments, task: Task) -> None:
    """Refuse a metric for the best model that no evaluation will give; Trainer finds out after the first one."""
    name = (arguments.metric_for_best_model or "loss").removeprefix("eval_")
    known = ["loss", *(Path(metric).stem for metric in task.metrics)]
    if name not in known and all(metric in METRICS for metric in task.metrics):
        raise ConfigError(
            f'metric_for_best_model "{name}" is not measured on task "{task.name}".{did_you_mean(name, known)} '
            f"Known: {', '.join(known)}."
        )


def _refusing(build: Callable[..., _T], **values: Any) -> _T:
    """Call `build`; what Trainer refuses becomes a `ConfigError` of one sentence."""
    try:
        return build(**values)
    except PeftLabError:
        raise
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise ConfigError(f"Training arguments are refused: {' '.join(str(error).split())}") from error


@contextmanager
def prepare(options: Mapping[str, Any]) -> Iterator[LabTrainer]:
    """The Trainer of a run as it stands before its first step; nothing is trained, and nothing stays on the disk."""
    with tempfile.TemporaryDirectory() as scratch:
        config = _as_config(None, {**options, "output_dir": scratch})
        info, task = config.check(), load_task(config.task)
        run = _Run(config, info, task, training_arguments(config, info), Path(scratch))
        run._load()
        run._build_trainer()
        yield run.trainer


class _Run:
    """The steps of one run, in order; each reads what the ones before it have set."""

    def __init__(
        self, config: RunConfig, info: MethodInfo, task: Task, arguments: TrainingArguments, folder: Path
    ) -> None:
        self.config, self.info, self.task, self.arguments, self.folder = config, info, task, arguments, folder
        self.kind = task_kind(task.kind)
        self.start = time.perf_counter()
        self.process = PartialState()
        self.items: Items | None = None  # of the split that was evaluated last, which is test if there is one

    def execute(self) -> TrainResult:
        checkpoint = self._checkpoint()
        self._load()
        self._build_trainer()
        self._claim_folder(checkpoint)
        with PeakMemory() as memory:
            started = time.perf_counter()
            self.trainer.train(checkpoint)
            seconds = time.perf_counter() - started
        scores = self._evaluate()
        self.trainer.save_model(str(self.folder), _internal_call=True)
        self.metrics = self._measured(scores, memory, seconds, checkpoint)
        if self.process.is_main_process:
            self._write()
        self.process.wait_for_everyone()
        if self.arguments.push_to_hub:
            self.trainer.push_to_hub()
        return TrainResult(self.folder, self.metrics, self.model, self.trainer, self.process.is_main_process)

    def _checkpoint(self) -> str | None:
        """The checkpoint to start from: the one asked for, else the last complete one of this run."""
        asked = self.arguments.resume_from_checkpoint
        word = str(asked).lower()
        own = None
        if not self.config.overwrite_output_dir:
            own = last_complete_checkpoint(self.folder, self.process.num_processes)
        if asked is None or word == "true":
            if asked is not None and own is None:
                raise ConfigError(f'There is no complete checkpoint in "{self.config.output_dir}" to resume from.')
            return own
        if word == "false":
            if own is not None:
                raise ConfigError(
                    f'"{self.config.output_dir}" holds checkpoints; to start afresh pass --overwrite_output_dir.'
                )
            return None
        if not (Path(asked) / "trainer_state.json").is_file():
            raise ConfigError(f'"{asked}" is not a checkpoint folder of Trainer: it has no trainer_state.json.')
        return str(asked)

    def _load(self) -> None:
        seed = self.arguments.seed
        if self.arguments.full_determinism:
            enable_full_determinism(seed)
        else:
            set_seed(seed)
        wants_test = self.config.training_arguments.get("do_predict") is not False
        has_test = "test" in self.task.splits or self.task.test_fraction > 0
        with self.process.main_process_first():
            self.splits: Splits = load_splits(self.task, test=wants_test and has_test)
        self.labels = self.splits.labels
        self.processor, base = load_base(
            self.kind,
            self.task,
            self.labels,
            self.config.model_name_or_path,
            self.config.model_revision,
            self.config.dtype,
            self.info.can("keeps_head"),
        )
        self.kind.check_processor(self.processor, base)
        self.head_modules = [] if self.info.can("keeps_head") else module_roles.head_modules(base)
        set_seed(seed)  # the backbone's own random draws must not shift the adapter's
        settings = self.kind.adapter_settings(self.processor, self.labels)
        settings |= prompt_column.settings(self.splits.prompt_values)
        self.model = adapt(base, self.info, self.config.method_args, self.kind.info.task_type, settings)
        limits = (self.config.max_train_samples, self.config.max_eval_samples, self.config.max_test_samples)
        parts = (self.splits.train, self.splits.validation, self.splits.test)
        named = zip(("train", "validation", "test"), parts, limits, strict=True)
        self.raw = {name: subset(rows, limit) for name, rows, limit in named if rows is not None}
        if self.config.examples_per_class is not None:
            self.raw["train"] = per_class(self.raw["train"], self.config.examples_per_class, seed)
        if self.config.alternating_every is not None:
            self._hold_out(self.config.alternating_fraction or HELD_OUT_FRACTION, seed)
        self.raw = {name: prompt_column.for_model(rows, self.model, self.task) for name, rows in self.raw.items()}
        with self.process.main_process_first():
            self.rows = {
                name: self.kind.preprocess(rows, self.processor, self.task, self.model)
                for name, rows in self.raw.items()
            }
        drops = bool(self.arguments.remove_unused_columns)
        prompt_column.check_kept(self.rows["train"], self.raw["train"], self.kind.name, drops)

    def _hold_out(self, fraction: float, seed: int) -> None:
        """Take rows out of those that are trained on, for the activation alone."""
        if not activation_parameters(self.model):
            raise ConfigError(
                f'alternating_every={self.config.alternating_every}: method "{self.info.name}" with '
                f"{self.config.method_args} learns no activation; leave one of them out."
            )
        rest, held_out = carve(self.task, self.raw["train"], HELD_OUT, fraction, seed)
        self.raw |= {"train": rest, HELD_OUT: held_out}

    def _callbacks(self) -> list[TrainerCallback]:
        config = self.config
        found: list[TrainerCallback] = []
        if config.early_stopping_patience is not None:
            found.append(EarlyStoppingCallback(config.early_stopping_patience))
        if config.alternating_every is not None:
            rate = config.alternating_learning_rate or LEARNING_RATE
            found.append(AlternatingActivation(self.rows[HELD_OUT], config.alternating_every, rate))
        return found

    def _build_trainer(self) -> None:
        self.trainer = _refusing(
            LabTrainer,
            model=self.model,
            args=self.arguments,
            train_dataset=self.rows["train"],
            eval_dataset=self.rows["validation"],
            processing_class=self.processor,
            data_collator=self.kind.data_collator(self.processor, self.model),
            compute_metrics=self._keeping_items(self.kind.compute_metrics(self.task, self.labels)),
            preprocess_logits_for_metrics=self.kind.preprocess_logits_for_metrics,
            callbacks=self._callbacks(),
            head_learning_rate=self.config.head_learning_rate,
            head_modules=self.head_modules,
            max_seconds=self.config.max_seconds,
        )

    def _keeping_items(self, compute: Callable[[EvalPrediction], dict[str, float]]) -> Callable[..., dict[str, float]]:
        """`compute`, which also keeps what was found for each row: no split is evaluated twice for that."""

        def keep(prediction: EvalPrediction) -> dict[str, float]:
            self.items = self.kind.items(prediction)
            return compute(prediction)

        return keep

    def _claim_folder(self, checkpoint: str | None) -> None:
        """From here on the folder belongs to this run: everything that could be refused has been."""
        if self.process.is_main_process:
            if self.config.overwrite_output_dir:
                run_folder.remove_run(self.folder)
            inside = checkpoint if checkpoint and Path(checkpoint).parent.samefile(self.folder) else None
            remove_checkpoints(self.folder, after=inside)
            run_folder.write_run(self.config, self.folder)
        self.process.wait_for_everyone()

    def _evaluate(self) -> dict[str, dict[str, Any]]:
        """Scores on the validation rows and then, once, on the test rows."""
        self.trainer.remove_callback(EarlyStoppingCallback)  # it would look for the validation metric in the test's
        wanted = {"validation": "eval", "test": "test"}
        if self.config.training_arguments.get("do_eval") is False:
            del wanted["validation"]
        found_scores = {}
        for split, prefix in wanted.items():
            if split in self.rows:
                found = self.trainer.evaluate(self.rows[split], metric_key_prefix=prefix)
                written = self.kind.generation_items(
                    self.model, self.processor, self.raw[split], self.task, self.arguments.per_device_eval_batch_size
                )
                means = {name: float(np.mean(values)) for name, values in written.items()}
                found_scores[split] = scores(found, f"{prefix}_") | means
                if self.items is not None:
                    self.items.columns.update({name: np.asarray(values) for name, values in written.items()})
        return found_scores

    def _measured(
        self, scores: dict[str, Any], memory: PeakMemory, seconds: float, checkpoint: str | None
    ) -> dict[str, Any]:
        trainable, total = count_parameters(self.model)
        head = {id(p) for p in self.trainer.head_parameters(self.model)}
        adapter = sum(p.numel() for p in self.model.parameters() if p.requires_grad and id(p) not in head)
        peft_config = self.model.active_peft_config.to_dict() if isinstance(self.model, PeftModel) else {}
        return {
            "run": self.config.to_dict() | {"hub_token": None},
            "metrics": scores,
            "main_metric": self.task.main_metric,
            "learning_rate": self.arguments.learning_rate,
            "seed": self.arguments.seed,
            "global_step": self.trainer.state.global_step,
            "epoch": self.trainer.state.epoch,
            "resumed_from": Path(checkpoint).name if checkpoint else None,
            "best_checkpoint": Path(self.trainer.state.best_model_checkpoint or "").name or None,
            "base_revision": cached_commit(self.config.model_name_or_path, self.config.model_revision),
            "parameters": {"trainable": trainable, "adapter": adapter, "total": total},
            "adapter_bytes": run_folder.weights_bytes(self.folder),
            "peak_memory_bytes": memory.peak,
            "memory_before_training_bytes": memory.before,
            "train_seconds": seconds + self.trainer.timer.earlier,
            "step_seconds": self.trainer.timer.step_seconds,
            "wall_seconds": time.perf_counter() - self.start,
            "data": {
                "task": self.task.name,
                "version": self.task.version,
                "labels": _outputs(self.task, self.labels),
                "fingerprint": self.splits.fingerprint,
                "fingerprints": self.splits.fingerprints,
                "rows": {name: len(rows) for name, rows in self.rows.items()},
            },
            "method_config": {key: value for key, value in peft_config.items() if key != "fingerprints"},
            "processes": self.process.num_processes,
            "versions": versions(),
            "device": device_name(),
        }

    def _write(self) -> None:
        if self.labels:
            run_folder.write_labels(self.folder, list(self.labels))
        origin = self.task.origin
        if origin is not None and self.config.task != self.task.name:
            (self.folder / run_folder.TASK).write_text(origin.read_text(encoding="utf-8"), encoding="utf-8")
        write_record(self.model, self.folder)
        self.trainer.state.save_to_json(str(self.folder / run_folder.HISTORY))
        if self.items is not None and "test" in self.metrics["metrics"]:
            write_items(self.folder, self.items)
        self._card()
        write_json(self.folder / run_folder.METRICS, self.metrics)  # last: it marks the run as finished

    def _card(self) -> None:
        write_card(self.folder, self.metrics, self.info, self.task)


def _outputs(task: Task, labels: Any) -> int | None:
    """Number of outputs of the head: one per label, one for regression, None without a head of the task's."""
    return len(labels) if labels else 1 if task.problem_type == "regression" else None
