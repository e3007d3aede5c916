"""Options of a run as Trainer takes them: `RunConfig` and `TrainingArguments`."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import TrainingArguments
from transformers.utils import is_in_notebook

from peft_lab.errors import ConfigError, PeftLabError, did_you_mean
from peft_lab.metrics import METRICS, greater_is_better
from peft_lab.registry import MethodInfo
from peft_lab.runs.run_config import RunConfig, load_run
from peft_lab.utils import verbosity

if TYPE_CHECKING:
    from peft_lab.data.task_schema import Task

logger = logging.getLogger("peft_lab")

_T = TypeVar("_T")

#: Part of the steps in which the learning rate rises (measured, see benchmarks/defaults.md), and the least number of
#: steps for it, because the first step of a warm-up has the rate zero.
_WARM_UP, _WARM_UP_FROM = 0.1, 20
#: Steps of a training that only the time ends.
_WITHOUT_END = 10_000_000


def as_run_config(config: Any, options: Mapping[str, Any]) -> RunConfig:
    """Make a `RunConfig` of a mapping, a file or keyword arguments.

    Args:
        config: the options; None if `options` holds all of them.
        options: options that override `config`.

    Raises:
        ConfigError: an option is unknown, missing or has a wrong value.
    """
    if config is None:
        return load_run(None, options, "the arguments of train()")
    if isinstance(config, str | Path):
        return load_run(config, options)
    if isinstance(config, RunConfig) and not options:
        return config
    values = config.to_dict() if isinstance(config, RunConfig) else dict(config)
    return load_run(None, {**values, **options}, "the arguments of train()")


def training_arguments(config: RunConfig, info: MethodInfo) -> TrainingArguments:
    """Build the `TrainingArguments` of a run.

    The run's own flags come first, then the defaults of peft-lab, then those of Trainer.

    Raises:
        ConfigError: Trainer refuses a value.
    """
    # a copy, because the run's own options are recorded later without these defaults
    flags = dict(config.training_arguments)
    if not info.takes_steps:
        _leave_out_steps(flags, config, info)
    flags.setdefault("learning_rate", info.learning_rate)
    flags.setdefault("report_to", "none")
    flags.setdefault("restore_callback_states_from_checkpoint", True)  # else early stopping forgets its count at resume
    flags.setdefault("remove_unused_columns", False)  # the collator reads what the kind's preprocessing made
    flags.setdefault("logging_nan_inf_filter", False)  # it would leave batches out of an evaluation's loss in silence
    if flags.get("metric_for_best_model"):
        # Trainer takes every metric but a loss for one of which more is better
        flags.setdefault("greater_is_better", greater_is_better(flags["metric_for_best_model"]))
    # an upload is private unless the run says otherwise, as with `peft-lab push`
    flags.setdefault("hub_private_repo", True)
    flags.setdefault("hub_strategy", "end")
    if flags["hub_strategy"] != "end":
        raise ConfigError(
            f'hub_strategy "{flags["hub_strategy"]}" would upload checkpoints; only "end" (the finished run) can be.'
        )
    flags.pop("do_train", None)  # a run always trains
    if flags.get("max_steps", -1) <= 0 or flags["max_steps"] >= _WARM_UP_FROM:
        flags.setdefault("warmup_steps", _WARM_UP)
    # Trainer's default of three epochs could end the training before its time has passed
    if config.max_seconds is not None and flags.keys().isdisjoint({"max_steps", "num_train_epochs"}):
        flags["max_steps"] = _WITHOUT_END
    if config.early_stopping_patience is not None:
        _set_early_stopping(flags)
    if config.features is not None:
        # the backbone does not run, so there is nothing to compute a second time
        for name in ("gradient_checkpointing", "activation_checkpointing"):
            flags.pop(name, None)
    _set_device_flags(flags)
    if not shows_bars():
        flags.setdefault("disable_tqdm", True)
    logger.debug(
        "Flags of Trainer: %s.", ", ".join(f"{name}={flags[name]}" for name in sorted(flags) if name != "hub_token")
    )
    with warnings.catch_warnings():
        # a flag that is to go is the user's own
        warnings.simplefilter("default", FutureWarning)
        return build_or_refuse(TrainingArguments, output_dir=config.output_dir, **flags)


def _leave_out_steps(flags: dict[str, Any], config: RunConfig, info: MethodInfo) -> None:
    """Set the flags of a run without gradient steps: it saves no checkpoints, and its learning rate is 0.

    Raises:
        ConfigError: an option asks for evaluations between steps, or a part of them.
    """
    for name in ("early_stopping_patience", "alternating_every", "head_learning_rate", "max_seconds"):
        if getattr(config, name) is not None:
            raise ConfigError(
                f'Method "{info.name}" is fitted without gradient steps and takes no {name}; leave it out.'
            )
    if flags.get("learning_rate"):
        logger.warning(
            'Method "%s" is fitted without gradient steps: learning_rate %g has no effect.',
            *(info.name, flags["learning_rate"]),
        )
    flags |= {"learning_rate": 0.0, "save_strategy": "no", "eval_strategy": "no", "load_best_model_at_end": False}


def check_fitted_by_class(info: MethodInfo, task: Task) -> None:
    """Refuse a method without gradient steps on a task whose answers are no single classes.

    Raises:
        ConfigError: naming both.
    """
    if not info.takes_steps and task.problem_type != "single_label_classification":
        raise ConfigError(
            f'Method "{info.name}" is fitted by class, and an answer of task "{task.name}" is no single class '
            f"(problem_type {task.problem_type}); take a method that is trained in steps."
        )


def shows_bars() -> bool:
    """Test whether Trainer's progress bars have a terminal or a notebook to be drawn on, and are wanted."""
    # a notebook draws them itself, though its standard error is no terminal
    return verbosity.shows_bars() or (is_in_notebook() and verbosity.level() != "quiet")


def _set_early_stopping(flags: dict[str, Any]) -> None:
    """Evaluate and save together: Trainer returns to the best checkpoint."""
    strategy = flags.setdefault("eval_strategy", "epoch")
    flags.setdefault("save_strategy", strategy)
    flags.setdefault("load_best_model_at_end", True)
    flags.setdefault("metric_for_best_model", "loss")
    # Trainer returns to the best model only if it saves at a multiple of the evaluation steps
    for steps, other in (("save_steps", "eval_steps"), ("eval_steps", "save_steps")):
        if other in flags:
            flags.setdefault(steps, flags[other])


def _set_device_flags(flags: dict[str, Any]) -> None:
    """Set the defaults that depend on the device and on recomputation."""
    # pinned memory helps only copies to a GPU, and torch warns about it where there is none
    flags.setdefault("dataloader_pin_memory", torch.cuda.is_available())
    if not torch.cuda.is_available() and (flags.get("bf16") or flags.get("bf16_full_eval")):
        flags.setdefault("use_cpu", not torch.backends.mps.is_available())  # Trainer wants bf16 on CPU spelt out
    if flags.get("gradient_checkpointing") or flags.get("activation_checkpointing"):
        flags.setdefault("ddp_find_unused_parameters", False)  # as Trainer does for a model without an adapter


def check_best_metric(arguments: TrainingArguments, task: Task) -> None:
    """Refuse a metric for the best model that no evaluation gives.

    Trainer itself finds out only after the first evaluation.

    Raises:
        ConfigError: the metric is not measured on the task.
    """
    name = (arguments.metric_for_best_model or "loss").removeprefix("eval_")
    known = ["loss", *(Path(metric).stem for metric in task.metrics)]
    # a metric of the Hub may give values under other names than its own
    if name not in known and all(metric in METRICS for metric in task.metrics):
        raise ConfigError(
            f'metric_for_best_model "{name}" is not measured on task "{task.name}".{did_you_mean(name, known)} '
            f"Known: {', '.join(known)}."
        )


def build_or_refuse(build: Callable[..., _T], **values: Any) -> _T:
    """Call `build`; turn a refusal of Trainer into a `ConfigError`."""
    try:
        return build(**values)
    # a `PeftLabError` is a `ValueError` too, and its sentence needs no second one around it
    except PeftLabError:
        raise
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise ConfigError(f"Training arguments are refused: {' '.join(str(error).split())}") from error
