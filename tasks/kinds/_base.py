"""What every kind of task supplies, and what the classifying kinds share. A kind is one file of `peft_lab.tasks`.

Torch, transformers and datasets are imported inside the methods, so that checking a task file needs none of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from peft_lab.backbones.from_pretrained import load_checkpoint
from peft_lab.errors import ConfigError, TaskError
from peft_lab.metrics import METRICS, load_metric
from peft_lab.metrics.predictions import Predictions
from peft_lab.registry import KindInfo

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import EvalPrediction, PreTrainedModel

    from peft_lab.data.task_schema import Task

#: Prediction records of a classifier: `{"label": name, "score": probability}`.
Record = dict[str, Any]


class Kind:
    """Base of all kinds. A subclass sets `info`, its card, and implements the methods that raise here.

    Attributes:
        info: the card.
        preprocess_logits_for_metrics: `Trainer`'s hook, for kinds whose logits are too big to be kept.
    """

    info: ClassVar[KindInfo]
    preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None

    @property
    def name(self) -> str:
        """Name of the kind."""
        return self.info.name

    def check(self, task: Task) -> None:
        """Raise `TaskError` if the values of a task do not fit together; the schema has been checked already."""

    def cast(self, rows: Dataset, task: Task) -> Dataset:
        """Give the canonical columns their types; raises `TaskError` if they cannot have them."""
        return rows

    def auto_class(self) -> Any:
        """The transformers Auto class that loads a backbone with the head for this kind."""
        raise NotImplementedError

    def load_processor(self, model_name_or_path: str, task: Task, **hub_kwargs: Any) -> Any:
        """The tokenizer or image processor of a backbone, set as the task wants it."""
        raise NotImplementedError

    def load_model(
        self, model_name_or_path: str, task: Task, labels: Sequence[str] | None, **hub_kwargs: Any
    ) -> PreTrainedModel:
        """The backbone with a head for the task."""
        raise NotImplementedError

    def load_classifier(self, model_name_or_path: str, task: Task, **hub_kwargs: Any) -> PreTrainedModel:
        """The backbone with the head that it was trained with; raises `ConfigError` if it has none."""
        raise ConfigError(f'A method that keeps the head of an image classifier does not go with kind "{self.name}".')

    def check_processor(self, processor: Any, model: PreTrainedModel) -> None:
        """Raise `ConfigError` if the model cannot take what the processor makes."""

    def adapter_settings(self, processor: Any, labels: Sequence[str] | None) -> dict[str, Any]:
        """What a method may have to know of processor and labels, by the names of the config fields that hold it."""
        return {}

    def preprocess(self, rows: Dataset, processor: Any, task: Task, model: Any) -> Dataset:
        """Rows as `Trainer` takes them: columns are arguments of the model's forward, and `labels`.

        A column `prompt_ids` of numbers, which is there for methods that choose prompts by row, is left as it is.
        """
        raise NotImplementedError

    def data_collator(self, processor: Any, model: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """What joins preprocessed rows into a batch."""
        raise NotImplementedError

    def compute_metrics(self, task: Task, labels: Sequence[str] | None) -> Callable[[EvalPrediction], dict[str, float]]:
        """`Trainer`'s function from predictions to the task's metrics, by name."""
        raise NotImplementedError

    def row_predictions(self, prediction: EvalPrediction) -> Predictions | None:
        """Predictions for each row of an evaluation; None for a kind without values of single rows."""
        return None

    def generation_scores(
        self, model: Any, processor: Any, rows: Dataset, task: Task, batch_size: int = 16
    ) -> dict[str, list[float]]:
        """Metrics of the text that the model writes, a value for each row; empty for kinds that write none.

        `rows` are not preprocessed.
        """
        return {}

    def generation_metrics(
        self, model: Any, processor: Any, rows: Dataset, task: Task, batch_size: int = 16
    ) -> dict[str, float]:
        """Means of `generation_scores`."""
        found = self.generation_scores(model, processor, rows, task, batch_size)
        return {name: sum(values) / len(values) for name, values in found.items()}

    def predict(self, model: Any, processor: Any, inputs: Sequence[Any], task: Task, batch_size: int = 32) -> list[Any]:
        """Answers to raw inputs, in order."""
        raise NotImplementedError


class ClassificationKind(Kind):
    """Kinds with a head over label names: loading with the right head, metrics, predictions as label and score."""

    def load_model(
        self, model_name_or_path: str, task: Task, labels: Sequence[str] | None, **hub_kwargs: Any
    ) -> PreTrainedModel:
        """The backbone with a head of `len(labels)` outputs (one for regression) and its label map.

        Raises:
            TaskError: the checkpoint has weights of other shapes below the head, which would start at random.
        """
        names = list(labels) if labels is not None else ["score"]
        hub_kwargs.setdefault("dtype", self.info.default_dtype)
        model, info = load_checkpoint(
            self.auto_class(),
            model_name_or_path,
            id2label=dict(enumerate(names)),
            label2id={name: index for index, name in enumerate(names)},
            problem_type=task.problem_type,
            # a checkpoint may bring a head of its own, for other labels
            ignore_mismatched_sizes=True,
            **hub_kwargs,
        )
        body = f"{model.base_model_prefix}."
        for key in sorted(str(k[0] if isinstance(k, tuple) else k) for k in info.get("mismatched_keys", ())):
            if key.startswith(body):
                raise TaskError(f'"{model_name_or_path}": the shape of its weight {key} does not fit its own config.')
        return model

    def adapter_settings(self, processor: Any, labels: Sequence[str] | None) -> dict[str, Any]:
        return {"labels": list(labels)} if labels is not None else {}

    def compute_metrics(self, task: Task, labels: Sequence[str] | None) -> Callable[[EvalPrediction], dict[str, float]]:
        metrics = {name: load_metric(name) for name in task.metrics}
        takes_probabilities = {name for name in task.metrics if name in METRICS and METRICS[name].takes_probabilities}
        average = "binary" if labels is not None and len(labels) == 2 else "macro"
        options = {"f1": {"average": average, "labels": list(range(len(labels or ())))}}

        def compute(prediction: EvalPrediction) -> dict[str, float]:
            logits = prediction.predictions
            # some models return hidden states beside the logits
            logits = logits[0] if isinstance(logits, tuple) else logits
            predicted = logits.squeeze(-1) if labels is None else logits.argmax(-1)
            found: dict[str, float] = {}
            for name, metric in metrics.items():
                given = _probabilities(logits) if name in takes_probabilities else predicted
                results = metric.compute(predictions=given, references=prediction.label_ids, **options.get(name, {}))
                found |= plain_results(name, results)
            return found

        return compute

    def row_predictions(self, prediction: EvalPrediction) -> Predictions:
        import numpy as np

        logits = prediction.predictions
        logits = np.asarray(logits[0] if isinstance(logits, tuple) else logits, dtype=np.float32)
        references: Any = prediction.label_ids
        if logits.shape[-1] == 1:
            return Predictions("regression", {"reference": references.reshape(-1), "prediction": logits.reshape(-1)})
        confidence = _probabilities(logits).max(-1)
        columns = {"reference": references, "prediction": logits.argmax(-1), "confidence": confidence}
        return Predictions("classification", columns)

    def records(self, logits: Any, model: Any) -> list[Record]:
        """Logits (n, labels) as one record a row; a regression's score is the value itself."""
        if model.config.problem_type == "regression":
            return [{"label": model.config.id2label[0], "score": value} for value in logits.squeeze(-1).tolist()]
        scores, indices = logits.float().softmax(-1).max(-1)
        pairs = zip(indices.tolist(), scores.tolist(), strict=True)
        return [{"label": model.config.id2label[index], "score": score} for index, score in pairs]

    def batches(
        self, model: Any, inputs: Sequence[Any], encode: Callable[[Sequence[Any]], Any], size: int
    ) -> list[Record]:
        """Run the model over encoded batches in evaluation mode and return its records; the mode is put back."""
        import torch

        found: list[Record] = []
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                for start in range(0, len(inputs), size):
                    batch = encode(inputs[start : start + size]).to(model.device)
                    found += self.records(model(**batch).logits, model)
        finally:
            model.train(training)
        return found


def _probabilities(logits: Any) -> Any:
    """Probabilities of the classes, float32 (n, classes)."""
    import numpy as np
    from scipy.special import softmax

    return softmax(np.asarray(logits, dtype=np.float32), -1)


def plain_results(name: str, results: Mapping[str, Any]) -> dict[str, float]:
    """A metric's results as plain numbers; raises `TaskError` for anything else, which no table could show."""
    found = {}
    for key, value in results.items():
        try:
            found[key] = float(value)
        except (TypeError, ValueError) as error:
            raise TaskError(
                f'Metric "{name}" returns {type(value).__name__} for "{key}"; it must be a number.'
            ) from error
    return found


def length_limit(task: Task, default: int, tokenizer: Any, model: Any, reserve: int = 0) -> int:
    """The number of tokens a row may have: the task's wish, cut to what tokenizer and model take less `reserve`."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None else None
    positions = getattr(text, "max_position_embeddings", None) or math.inf
    return int(min(task.max_length or default, min(tokenizer.model_max_length or math.inf, positions) - reserve))
