"""Trainer of a run, built from its options, rows and model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import EarlyStoppingCallback, TrainingArguments

from peft_lab.adapter_files.names import ADAPTER_CONFIG
from peft_lab.data.kind import Kind
from peft_lab.errors import ConfigError
from peft_lab.loading.load_run import load, load_base
from peft_lab.runs.optimization import ON_GRADIENTS
from peft_lab.runs.run_config import RunConfig
from peft_lab.training.arguments import build_or_refuse
from peft_lab.training.cached_features import CachedFeatures
from peft_lab.training.callbacks.bilevel import LEARNING_RATE, AlternatingActivation
from peft_lab.training.model_rows import HELD_OUT
from peft_lab.training.own_loss import check_own_loss
from peft_lab.training.packing import packed_collator
from peft_lab.training.pruning import RunPruning
from peft_lab.training.trainer import LabTrainer
from peft_lab.training.unsupervised import UnsupervisedFixMatch, check_readers, with_trusted_labels
from peft_lab.training.weighted_loss import REFERENCE_SHARE, WeightedCollator, WeightedLoss, WeightedRows

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from peft_lab.data.task_schema import Task


def build_trainer(
    config: RunConfig,
    arguments: TrainingArguments,
    kind: Kind,
    task: Task,
    labels: Sequence[str] | None,
    processor: Any,
    model: Any,
    rows: Mapping[str, Any],
    row_weights: Sequence[float] | None,
    pruning: RunPruning,
    **values: Any,
) -> LabTrainer:
    """Build the Trainer of a run.

    Args:
        config, arguments: options of the run, and those of Trainer.
        kind, task, labels, processor, model: what is trained, and on what.
        rows: split -> preprocessed rows.
        row_weights: weights of the training rows; None without any.
        pruning: pruning of the base.
        values: further arguments of `LabTrainer`.

    Raises:
        ConfigError: an option that cannot act here.
    """
    check_acts(config, model)
    pruning.check_alone(model, config.method)
    chunked = config.loss_chunk_size is not None
    if chunked and not kind.scores_tokens:
        raise ConfigError(f'loss_chunk_size is for decoders that write; kind "{kind.name}" has no such loss.')
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]] = kind.data_collator(processor, task, model)
    if config.features is not None:
        collator = CachedFeatures.collator
    train: Any = rows["train"]
    if config.packing:
        collator = packed_collator(collator, processor, model, train)
    if row_weights is not None:
        train, collator = WeightedRows(train, row_weights), WeightedCollator(collator)
    loss = _training_loss(config, kind, task, labels, processor)
    check_own_loss(model, loss is not None or bool(arguments.label_smoothing_factor))
    if config.unsupervised is not None:
        _check_alone(arguments)
        check_readers(model)
        if config.quantization is None:  # a quantised model is where it has to be
            model.to(arguments.device)
        train, collator = with_trusted_labels(config, model, train, collator, arguments.eval_batch_size)
    callbacks = [*_callbacks(config, rows), *pruning.callbacks()]
    if isinstance(loss, UnsupervisedFixMatch):
        callbacks.append(loss)
    # Trainer itself makes the output folder
    trainer = build_or_refuse(
        LabTrainer,
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=rows["validation"],
        processing_class=processor,
        data_collator=collator,
        # a loss in chunks makes no logits
        preprocess_logits_for_metrics=None if chunked else kind.preprocess_logits_for_metrics,
        keeps_labels=kind.keeps_labels,
        callbacks=callbacks,
        optimization=config,
        training_loss=loss,
        max_seconds=config.max_seconds,
        **values,
    )
    pruning.check_sharding(trainer)
    return trainer


def check_acts(config: RunConfig, model: Any) -> None:
    """Refuse options of the optimization where no parameter is trained.

    Raises:
        ConfigError: naming the option.
    """
    if any(parameter.requires_grad for parameter in model.parameters()):
        return
    given = next((name for name in ON_GRADIENTS if getattr(config, name) not in (None, {})), None)
    if given is not None:
        raise ConfigError(
            f'{given} acts on trained parameters, and method "{config.method}" has none here; leave {given} out.'
        )


def _callbacks(config: RunConfig, rows: Mapping[str, Any]) -> list[TrainerCallback]:
    found: list[TrainerCallback] = []
    if config.early_stopping_patience is not None:
        found.append(EarlyStoppingCallback(config.early_stopping_patience))
    if config.alternating_every is not None:
        rate = config.alternating_learning_rate or LEARNING_RATE
        found.append(AlternatingActivation(rows[HELD_OUT], config.alternating_every, rate))
    return found


def _check_alone(arguments: TrainingArguments) -> None:
    """Refuse several processes, each of which would have views and thresholds of its own.

    Raises:
        ConfigError: there are several.
    """
    if arguments.world_size > 1:
        raise ConfigError("unsupervised trains in one process; start the run without accelerate, or leave it out.")


def _training_loss(
    config: RunConfig, kind: Kind, task: Task, labels: Sequence[str] | None, processor: Any
) -> WeightedLoss | UnsupervisedFixMatch | None:
    """Loss that the options ask for in place of the model's own; None without any."""
    if config.unsupervised is not None:
        return UnsupervisedFixMatch()
    if not config.weighs_losses:
        return None
    if config.reference_model is None:
        return WeightedLoss(kind.scores_tokens)
    if not kind.predicts_tokens:
        raise ConfigError(
            f'reference_model chooses tokens by their losses, and kind "{kind.name}" predicts no tokens; leave it out.'
        )
    if (Path(config.reference_model).expanduser() / ADAPTER_CONFIG).is_file():
        loaded = load(config.reference_model, task)
        tokens, reference = loaded.processor, loaded.model
    else:
        tokens, reference = load_base(kind, task, labels, config.reference_model, dtype=config.dtype)
    if tokens.get_vocab() != processor.get_vocab():
        raise ConfigError(
            f'reference_model "{config.reference_model}" has other tokens than "{config.model_name_or_path}", so their '
            "losses cannot be compared; choose one with the same tokenizer."
        )
    reference.requires_grad_(False)
    return WeightedLoss(kind.scores_tokens, reference.eval(), config.reference_share or REFERENCE_SHARE)
