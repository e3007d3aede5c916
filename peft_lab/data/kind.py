"""Interface of the kinds of task, and a base for classification.

Torch, transformers and datasets are imported inside the methods, so that checking a task file needs none of them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from peft_lab.backbones.from_pretrained import load_checkpoint
from peft_lab.backbones.heads import backbone_weights
from peft_lab.data.row_checks import RowFault, column_faults
from peft_lab.data.task_schema import PROMPT_IDS
from peft_lab.errors import ConfigError, TaskError
from peft_lab.metrics import HUB_METRICS, METRICS, load_metric
from peft_lab.metrics.baselines import Baseline
from peft_lab.metrics.predictions import Predictions
from peft_lab.registry import KindInfo

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import EvalPrediction, PreTrainedModel

    from peft_lab.data.task_schema import Task

#: Prediction records of a classifier: `{"label": name, "score": probability}`.
Record = dict[str, Any]


class Kind:
    """Base of all kinds of task.

    A subclass sets `info`, its card, and implements the methods that raise here.

    Attributes:
        info: the card.
        text_columns: canonical columns of texts, in which a blank one is a fault.
        predicts_texts: inputs of a prediction are texts, so that the name of a file among them is a mistake.
        preprocess_logits_for_metrics: `Trainer`'s hook, for kinds whose logits are too big to be kept.
        scores_tokens: its predictions are predicted tokens and log-probabilities of the true ones, both (n, t - 1); a
            loss in chunks gives them without the hook.
    """

    info: ClassVar[KindInfo]
    text_columns: ClassVar[tuple[str, ...]] = ()
    predicts_texts: ClassVar[bool] = False
    scores_tokens: ClassVar[bool] = False
    preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None

    @property
    def name(self) -> str:
        """Name of the kind."""
        return self.info.name

    def check(self, task: Task) -> None:
        """Raise `TaskError` if the values of a task do not fit together.

        The schema has been checked already.
        """

    def cast(self, dataset: Dataset, task: Task) -> Dataset:
        """Cast the canonical columns to their types.

        Raises `TaskError` if they cannot have them.
        """
        return dataset

    def row_faults(self, dataset: Dataset, task: Task) -> list[RowFault]:
        """Rows that no model can learn from, such as those without a text; `label` has a check of its own.

        What becomes of them is said by `empty_rows` of the task.
        """
        return column_faults(dataset, task, self.text_columns)

    def auto_class(self) -> Any:
        """Auto class of transformers that loads a backbone with this kind's head."""
        raise NotImplementedError

    def load_processor(self, model_name_or_path: str, task: Task, **hub_kwargs: Any) -> Any:
        """Tokenizer or image processor of a backbone, set as the task wants."""
        raise NotImplementedError

    def load_model(
        self, model_name_or_path: str, task: Task, labels: Sequence[str] | None, **hub_kwargs: Any
    ) -> PreTrainedModel:
        """The backbone with a head for the task."""
        raise NotImplementedError

    def load_classifier(self, model_name_or_path: str, task: Task, **hub_kwargs: Any) -> PreTrainedModel:
        """Backbone with the head that it was trained with.

        Raises `ConfigError` if it has none.
        """
        raise ConfigError(f'A method that keeps the head of an image classifier does not go with kind "{self.name}".')

    def check_processor(self, processor: Any, model: PreTrainedModel) -> None:
        """Raise `ConfigError` if the model cannot take what the processor makes."""

    def adapter_settings(self, processor: Any, labels: Sequence[str] | None) -> dict[str, Any]:
        """Config fields of a method that processor and labels decide."""
        return {}

    def preprocess(self, dataset: Dataset, processor: Any, task: Task, model: Any) -> Dataset:
        """Data set as `Trainer` takes it.

        Its columns are arguments of the model's forward, and `labels`.

        A column `prompt_ids` of numbers, which is there for methods that choose prompts by row, is left as it is.
        """
        raise NotImplementedError

    def packed_length(self, processor: Any, task: Task, model: Any) -> int | None:
        """Tokens of a packed sequence; None for kinds whose rows cannot be packed.

        Their rows have `input_ids`, `labels` of the same length, and `attention_mask`.
        """
        return None

    def data_collator(self, processor: Any, model: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Function that joins preprocessed rows into a batch."""
        raise NotImplementedError

    def compute_metrics(self, task: Task, labels: Sequence[str] | None) -> Callable[[EvalPrediction], dict[str, float]]:
        """`Trainer`'s function from predictions to the task's metrics, by name."""
        raise NotImplementedError

    def row_predictions(self, prediction: EvalPrediction) -> Predictions | None:
        """Predictions for each row of an evaluation; None without any."""
        return None

    def baseline(self, task: Task, labels: Sequence[str] | None, train: Dataset, rows: Dataset) -> Baseline | None:
        """Scores of a predictor that sees no input; None if undefined.

        Args:
            task, labels: as for `compute_metrics`.
            train: preprocessed training rows, whose answers the predictor knows.
            rows: preprocessed rows that it is scored on.
        """
        return None

    def generation_scores(
        self, model: Any, processor: Any, dataset: Dataset, task: Task, batch_size: int = 16
    ) -> dict[str, list[float]]:
        """Metrics of the written text, a value for each row.

        Empty for kinds of task in which it writes none.

        `rows` are not preprocessed.
        """
        return {}

    def generation_metrics(
        self, model: Any, processor: Any, dataset: Dataset, task: Task, batch_size: int = 16
    ) -> dict[str, float]:
        """Means of `generation_scores`."""
        found = self.generation_scores(model, processor, dataset, task, batch_size)
        return {name: sum(values) / len(values) for name, values in found.items()}

    def predict(self, model: Any, processor: Any, inputs: Sequence[Any], task: Task, batch_size: int = 32) -> list[Any]:
        """Answers to raw inputs, in order."""
        raise NotImplementedError

    def predict_with_prompts(
        self,
        model: Any,
        processor: Any,
        inputs: Sequence[Any],
        task: Task,
        batch_size: int,
        ids: Sequence[int] | None,
    ) -> list[Any]:
        """Answers to raw inputs, in order, each with its own prompts.

        Args:
            model, processor, inputs, task, batch_size: as for `predict`.
            ids: number of the prompts of each input; None if the method chooses none by row.
        """
        if ids is None:
            return self.predict(model, processor, inputs, task, batch_size)
        import torch

        from peft_lab.tuners.forward_context import row_inputs

        found: list[Any] = []
        for start in range(0, len(inputs), batch_size):
            chosen = slice(start, start + batch_size)
            # `generate` takes no arguments of ours, so the numbers reach the forward through a context
            with row_inputs(**{PROMPT_IDS: torch.tensor(ids[chosen])}):
                found += self.predict(model, processor, inputs[chosen], task, batch_size)
        return found


class ClassificationKind(Kind):
    """Base of the kinds with a head over label names."""

    def load_model(
        self, model_name_or_path: str, task: Task, labels: Sequence[str] | None, **hub_kwargs: Any
    ) -> PreTrainedModel:
        """Backbone with a head of `len(labels)` outputs (one for regression).

        Raises:
            TaskError: the checkpoint has weights of other shapes below the head, which would start at random.
        """
        names = list(labels) if labels is not None else ["score"]
        hub_kwargs.setdefault("dtype", self.info.default_dtype)
        model, info = load_checkpoint(
            self.auto_class(),
            model_name_or_path,
            num_labels=len(names),  # the config of timm's models reads no number from the labels
            id2label=dict(enumerate(names)),
            label2id={name: index for index, name in enumerate(names)},
            problem_type=task.problem_type,
            # a checkpoint may bring a head of its own, for other labels
            ignore_mismatched_sizes=True,
            **hub_kwargs,
        )
        # a head of other shapes is meant to be replaced; any other weight of another shape means a wrong checkpoint
        # transformers lists a key, or a key with its two shapes
        keys = [str(entry[0] if isinstance(entry, tuple) else entry) for entry in info.get("mismatched_keys", ())]
        wrong = backbone_weights(model, keys)
        if wrong:
            raise TaskError(f'"{model_name_or_path}": the shape of its weight {wrong[0]} does not fit its own config.')
        return model

    def adapter_settings(self, processor: Any, labels: Sequence[str] | None) -> dict[str, Any]:
        return {"labels": list(labels)} if labels is not None else {}

    def compute_metrics(self, task: Task, labels: Sequence[str] | None) -> Callable[[EvalPrediction], dict[str, float]]:
        metrics = {name: load_metric(name) for name in task.metrics}
        takes_probabilities = {name for name in task.metrics if name in METRICS and METRICS[name].takes_probabilities}
        # over all labels, because classes that are absent from an evaluation count too
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

    def baseline(self, task: Task, labels: Sequence[str] | None, train: Dataset, rows: Dataset) -> Baseline:
        """Scores of the most frequent training class, or of the training mean."""
        import numpy as np
        from transformers import EvalPrediction

        known, wanted = (np.asarray(part["labels"][:]) for part in (train, rows))
        if labels is None:
            predictor, logits = "the mean of the training rows", np.asarray([known.mean()])
        else:
            predictor = "the most frequent class of the training rows"
            logits = np.eye(len(labels))[np.bincount(known, minlength=len(labels)).argmax()]
        # one answer for all rows has no confidence, and what a file of the user's own would make of it is not known
        kept = tuple(name for name in task.metrics if name in HUB_METRICS or name in METRICS)
        kept = tuple(name for name in kept if name not in METRICS or not METRICS[name].takes_probabilities)
        compute = self.compute_metrics(task.model_copy(update={"metrics": kept}), labels)
        return Baseline(predictor, compute(EvalPrediction(np.tile(logits, (len(wanted), 1)), wanted)))

    def row_predictions(self, prediction: EvalPrediction) -> Predictions:
        import numpy as np

        logits = prediction.predictions
        logits = np.asarray(logits[0] if isinstance(logits, tuple) else logits, dtype=np.float32)
        references: Any = prediction.label_ids
        # one output is a regression, because a task of classes has at least two
        if logits.shape[-1] == 1:
            return Predictions("regression", {"reference": references.reshape(-1), "prediction": logits.reshape(-1)})
        confidence = _probabilities(logits).max(-1)
        columns = {"reference": references, "prediction": logits.argmax(-1), "confidence": confidence}
        return Predictions("classification", columns)

    def records(self, logits: Any, model: Any) -> list[Record]:
        """Records of logits (n, labels); a regression's score is the value itself."""
        if model.config.problem_type == "regression":
            return [{"label": model.config.id2label[0], "score": value} for value in logits.squeeze(-1).tolist()]
        # in float32, because bfloat16 would leave two or three digits of a probability
        scores, indices = logits.float().softmax(-1).max(-1)
        pairs = zip(indices.tolist(), scores.tolist(), strict=True)
        return [{"label": model.config.id2label[index], "score": score} for index, score in pairs]

    def batches(
        self, model: Any, inputs: Sequence[Any], encode: Callable[[Sequence[Any]], Any], size: int
    ) -> list[Record]:
        """Run the model over encoded batches and return its records.

        It runs in evaluation mode, and its own mode is put back.
        """
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
    """Results of a metric as plain numbers.

    Raises `TaskError` for anything else, because no table could show it.
    """
    found = {}
    for key, value in results.items():
        try:
            found[key] = float(value)
        except (TypeError, ValueError) as error:
            raise TaskError(
                f'Metric "{name}" returns {type(value).__name__} for "{key}"; it must be a number.'
            ) from error
    return found


def padding_side(model: Any) -> str:
    """Side at which the rows of a batch are padded, whatever the tokenizer's own side is.

    It is the right one: most backbones number tokens from the left edge of the batch, and the heads of encoders read
    the first place. Only a head that reads the last place (XLNet) needs padding at the left.
    """
    return "left" if getattr(getattr(model, "config", None), "summary_type", None) == "last" else "right"


def padding_tokenizer(tokenizer: Any, model: Any) -> Any:
    """Copy of a tokenizer that pads at the model's `padding_side`, for a collator; the original keeps its own."""
    padding = copy.copy(tokenizer)
    padding.padding_side = padding_side(model)
    return padding


def length_limit(task: Task, default: int, tokenizer: Any, model: Any, reserve: int = 0) -> int:
    """Number of tokens that a row may have.

    It is the task's, or the default, but at most what tokenizer and model take, less `reserve`.
    """
    return int(min(task.max_length or default, _most_tokens(tokenizer, model) - reserve))


def longer_rows(limit: int, tokenizer: Any, model: Any, reserve: int = 0) -> str:
    """Mend for rows that are longer than the limit on their tokens."""
    if limit < _most_tokens(tokenizer, model) - reserve:
        return f'the limit is {limit} tokens: raise "max_length" in the task file'
    if reserve:
        return (
            f"the model takes no more than {limit} tokens beside the {reserve} that it may write: shorten the texts, "
            'or lower "max_new_tokens"'
        )
    return f"the model takes no more than {limit} tokens: shorten the texts"


def _most_tokens(tokenizer: Any, model: Any) -> float:
    """Number of tokens that tokenizer and model take."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None else None
    # models with relative positions, such as T5, state no limit
    positions = getattr(text, "max_position_embeddings", None) or math.inf
    return min(tokenizer.model_max_length or math.inf, positions)
