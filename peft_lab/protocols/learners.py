"""Learners of an incremental protocol: adapters trained session by session, and estimators of features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from sklearn.base import is_classifier
from torch.nn import functional
from transformers import PrinterCallback, set_seed

from peft_lab.backbones import module_roles
from peft_lab.errors import ConfigError
from peft_lab.loading.load_run import Loaded, adapt, load_base
from peft_lab.runs.run_config import RunConfig
from peft_lab.training.arguments import build_or_refuse, training_arguments
from peft_lab.training.head_outputs import head_outputs
from peft_lab.training.run_trainer import check_acts
from peft_lab.training.trainer import LabTrainer
from peft_lab.tuners.estimators import EstimatorConfig
from peft_lab.tuners.registration import config_class, make_config

if TYPE_CHECKING:
    from datasets import Dataset

Array = Any


class Learner(Protocol):
    """Classifier that is given the rows of one session after the other, and none of them again."""

    def learn(self, rows: Dataset, places: Array, seen: Sequence[int]) -> None:
        """Learn the rows of a session.

        Args:
            rows: all training rows.
            places: positions of the rows of the session.
            seen: all classes so far, those of the session included.
        """

    def predict(self, rows: Dataset, places: Array, seen: Sequence[int]) -> Array:
        """Classes of the rows at these positions among those seen, whole numbers (places,)."""


class FeatureReader:
    """Features of a backbone; those of one that stays as it is are read once for all rows of a data set.

    Args:
        loaded: the backbone, its processor, task and labels.
        batch_size: rows of a batch.
        fixed: True if the model does not change once its features are read.
    """

    def __init__(self, loaded: Loaded, batch_size: int, fixed: bool = True) -> None:
        self.loaded, self.batch_size, self.fixed = loaded, batch_size, fixed
        self._kept: dict[int, tuple[Dataset, Array]] = {}

    def features(self, rows: Dataset, places: Array) -> Array:
        """Inputs of the task head (places, width), float64, in evaluation mode."""
        if not self.fixed:
            return self._read(rows.select(places))
        # the rows are kept with their features, so that no other object gets their id
        if id(rows) not in self._kept:
            self._kept[id(rows)] = rows, self._read(rows)
        return self._kept[id(rows)][1][places]

    def _read(self, rows: Dataset) -> Array:
        found = head_outputs(self.loaded, self.loaded.model.eval(), self.loaded.task, rows, self.batch_size)
        return found.features.astype(np.float64)


class AdapterLearner:
    """Naive baseline: a method with a linear head over all classes, trained on one session after the other.

    The loss is the cross-entropy over the classes seen so far, whose outputs alone are predicted. Nothing is kept of
    earlier sessions, so they are forgotten as far as the training overwrites them.

    Args:
        config: options of a run of the method; its training is repeated for each session.
        loaded: task, kind and labels; its model is not used.

    Attributes:
        sessions: number of sessions that it has been trained on.
    """

    def __init__(self, config: RunConfig, loaded: Loaded) -> None:
        self.sessions = 0
        info = config.check()
        self.config, self.batch_size = config, int(config.training_arguments.get("per_device_eval_batch_size", 32))
        seed = int(config.training_arguments.get("seed", 42))
        set_seed(seed)
        processor, base = load_base(
            loaded.kind,
            loaded.task,
            loaded.labels,
            config.model_name_or_path,
            config.model_revision,
            config.dtype,
            quantization=config.quantization,
        )
        loaded.kind.check_processor(processor, loaded.task, base)
        self.head_modules = module_roles.head_modules(base)
        set_seed(seed)
        settings = loaded.kind.adapter_settings(processor, loaded.task, loaded.labels)
        model = adapt(base, info, config.method_args, loaded.kind.task_type(loaded.task), settings)
        check_acts(config, model)
        self.loaded = Loaded(model, processor, loaded.task, loaded.kind, loaded.labels, loaded.folder)

    def learn(self, rows: Dataset, places: Array, seen: Sequence[int]) -> None:
        """Train on the rows of a session, with a fresh optimizer and schedule."""
        loaded, rows = self.loaded, rows.select(places)
        with TemporaryDirectory() as scratch:
            flags = {**self.config.training_arguments, "save_strategy": "no", "eval_strategy": "no"}
            config = RunConfig.from_mapping({**self.config.to_dict(), **flags, "output_dir": scratch})
            arguments = training_arguments(config, config.check())
            arguments.label_names = list(loaded.kind.trainer_labels)
            trainer = build_or_refuse(
                LabTrainer,
                model=loaded.model,
                args=arguments,
                train_dataset=loaded.kind.preprocess(rows, loaded.processor, loaded.task, loaded.model),
                processing_class=loaded.processor,
                data_collator=loaded.kind.data_collator(loaded.processor, loaded.task, loaded.model),
                compute_loss_func=_loss_over(seen),
                optimization=config,
                head_modules=self.head_modules,
                max_seconds=config.max_seconds,
            )
            trainer.remove_callback(PrinterCallback)  # the protocol says itself what comes out
            trainer.train()
        self.sessions += 1

    def predict(self, rows: Dataset, places: Array, seen: Sequence[int]) -> Array:
        """Seen class with the highest logit."""
        loaded, classes = self.loaded, np.asarray(sorted(seen))
        found = head_outputs(loaded, loaded.model.eval(), loaded.task, rows.select(places), self.batch_size)
        return classes[found.logits[:, classes].argmax(1)]


def _loss_over(seen: Sequence[int]) -> Callable[..., torch.Tensor]:
    """Cross-entropy over the logits of some classes."""

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        kept = torch.zeros(outputs.logits.shape[-1], dtype=torch.bool, device=outputs.logits.device)
        kept[list(seen)] = True
        logits = outputs.logits.float().masked_fill(~kept, float("-inf"))
        if num_items_in_batch is None:
            return functional.cross_entropy(logits, labels)
        return functional.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch

    return loss


class EstimatorLearner:
    """Estimator in scikit-learn's manner on features of a backbone, frozen or adapted.

    One with `partial_fit(X, y, classes=)` is given the rows of one session after the other. One that has `fit` alone is
    fitted anew to the features of all sessions so far, which are kept for it (`keeps_features`).

    Args:
        estimator: the estimator; labels are numbers of classes.
        reader: features of the frozen backbone, or those with the adapter where other learners share both; None for a
            reader of its own for the adapter.
        adapter: adapter whose features are read; trained on the first session unless it has been, or on each.
        each: train the adapter on each session. What the estimator knows of earlier sessions stays as it is in the
            features that the backbone had then, because their rows are gone.

    Raises:
        ConfigError: the estimator does not tell classes apart.
    """

    def __init__(
        self,
        estimator: Any,
        reader: FeatureReader | None = None,
        adapter: AdapterLearner | None = None,
        each: bool = False,
    ) -> None:
        if not is_classifier(estimator):
            raise ConfigError(
                f'The estimator "{type(estimator).__name__}" does not tell classes apart, which sessions bring; leave '
                "it out."
            )
        self.estimator, self.adapter, self.each = estimator, adapter, each
        self._kept: list[tuple[Array, Array]] = []
        if reader is None:
            assert adapter is not None, "features come from one of the two"
            reader = FeatureReader(adapter.loaded, adapter.batch_size, fixed=not each)
        self.reader = reader

    @property
    def keeps_features(self) -> bool:
        """True if the features of earlier sessions are kept."""
        return keeps_features(self.estimator)

    def learn(self, rows: Dataset, places: Array, seen: Sequence[int]) -> None:
        """Train the adapter if it is its turn, then fit the estimator to the features of the session.

        Raises:
            ConfigError: the estimator refuses the rows, as some do with those of a single class.
        """
        if self.adapter is not None and (self.each or not self.adapter.sessions):
            self.adapter.learn(rows, places, seen)
        features, labels = self.reader.features(rows, places), np.asarray(rows["label"][:])[places]
        try:
            if not self.keeps_features:
                self.estimator.partial_fit(features, labels, classes=np.asarray(sorted(seen)))
                return
            self._kept.append((features, labels))
            self.estimator.fit(*(np.concatenate(parts) for parts in zip(*self._kept, strict=True)))
        except ValueError as error:
            raise ConfigError(
                f'The estimator "{type(self.estimator).__name__}" refuses the rows of a session: {error}'
            ) from error

    def predict(self, rows: Dataset, places: Array, seen: Sequence[int]) -> Array:
        """Classes that the estimator predicts."""
        return np.asarray(self.estimator.predict(self.reader.features(rows, places)))


def keeps_features(estimator: Any) -> bool:
    """Test whether an estimator has to be fitted anew to all features."""
    return not hasattr(estimator, "partial_fit")


def is_estimator(name: str) -> bool:
    """Test whether a method is an estimator of features, which is not trained by gradients."""
    return hasattr(config_class(name), "estimator")


def make_estimator(name: str, args: Any) -> Any:
    """Array estimator of a method, by its config.

    Raises:
        ConfigError: it reads other features than the inputs of the head, a field acts on the head of a model alone, or
            it has a value that none can have.
    """
    config, usual = make_config(name, args), make_config(name, {})
    shared = {f.name for f in fields(EstimatorConfig)}
    known = {*config.estimator_class._get_param_names()}
    for f in fields(config):
        if f.name not in shared | known and getattr(config, f.name) != getattr(usual, f.name):
            raise ConfigError(
                f'{f.name} of method "{name}" acts on the head of a model, and a protocol fits the array estimator; '
                "leave it out."
            )
    # by default a protocol reads what the head reads, also of texts
    if getattr(config, "pooling", "head") not in ("auto", "head"):
        raise ConfigError(
            f'pooling="{config.pooling}" of method "{name}": the protocol reads the inputs of the task head; leave '
            "pooling out."
        )
    return config.estimator()


def frozen_backbone(config: RunConfig, kind: Any, task: Any, labels: Sequence[str], folder: Path) -> Loaded:
    """Frozen backbone of a protocol, with its processor."""
    set_seed(int(config.training_arguments.get("seed", 42)))
    processor, base = load_base(
        kind, task, labels, config.model_name_or_path, config.model_revision, config.dtype, quantization=None
    )
    kind.check_processor(processor, task, base)
    return Loaded(base.requires_grad_(False), processor, task, kind, list(labels), folder)
