"""Bases of the kinds of task with a head over label names: any answers, and one label a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from peft_lab.backbones.from_pretrained import load_with_head
from peft_lab.data.kind import Kind
from peft_lab.data.model_inputs import ModelInputs
from peft_lab.data.row_checks import RowFault
from peft_lab.errors import TaskError
from peft_lab.metrics import HUB_METRICS, METRICS, load_metric
from peft_lab.metrics.baselines import CHANCE, Baseline
from peft_lab.metrics.predictions import Predictions
from peft_lab.utils.batch_progress import advance

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import EvalPrediction, PreTrainedModel

    from peft_lab.data.task_schema import Task

#: Prediction records of a classifier: `{"label": name, "score": probability}`, with `top_k` a list of these besides.
Record = dict[str, Any]


class LabelledKind(Kind):
    """Base of the kinds whose head has an output for each label name.

    A subclass sets `inputs`, or `inputs_of` where the task decides what the model reads; both answer for columns,
    processor and collator.

    Attributes:
        inputs: what the model reads.
    """

    labelled = True
    inputs: ClassVar[ModelInputs]

    def inputs_of(self, task: Task) -> ModelInputs:
        """What the model of a task reads."""
        return self.inputs

    def reads_texts(self, task: Task) -> bool:
        return self.inputs_of(task).texts

    def input_files(self, task: Task) -> tuple[str, ...]:
        return self.inputs_of(task).files

    def cast(self, dataset: Dataset, task: Task) -> Dataset:
        return self.inputs_of(task).cast(dataset, task)

    def row_faults(self, dataset: Dataset, task: Task) -> list[RowFault]:
        return self.inputs_of(task).row_faults(dataset, task)

    def auto_class(self, task: Task) -> Any:
        return self.inputs_of(task).auto_class()

    def load_processor(self, model_name_or_path: str, task: Task, **hub_kwargs: Any) -> Any:
        return self.inputs_of(task).load_processor(model_name_or_path, task, **hub_kwargs)

    def load_classifier(self, model_name_or_path: str, task: Task, **hub_kwargs: Any) -> PreTrainedModel:
        return self.inputs_of(task).load_classifier(model_name_or_path, task, **hub_kwargs)

    def backbone_class(self, model_name_or_path: str, task: Task, **hub_kwargs: Any) -> Any:
        """Class that loads a backbone with a head; by default `auto_class`, whatever the backbone."""
        return self.auto_class(task)

    def load_model(
        self, model_name_or_path: str, task: Task, labels: Sequence[str] | None, **hub_kwargs: Any
    ) -> PreTrainedModel:
        """Backbone with a head of `len(labels)` outputs (one for regression).

        Raises:
            TaskError: the checkpoint has weights of other shapes below the head, which would start at random.
        """
        names = list(labels) if labels is not None else ["score"]
        hub_kwargs.setdefault("dtype", self.info.default_dtype)
        model = load_with_head(
            self.backbone_class(model_name_or_path, task, **_of_hub(hub_kwargs)),
            model_name_or_path,
            num_labels=len(names),  # the config of timm's models reads no number from the labels
            id2label=dict(enumerate(names)),
            label2id={name: index for index, name in enumerate(names)},
            problem_type=task.problem_type,
            **hub_kwargs,
        )
        self.inputs_of(task).prepare_model(model)
        return model

    def check_processor(self, processor: Any, task: Task, model: PreTrainedModel) -> None:
        self.inputs_of(task).check_processor(processor, model)

    def adapter_settings(self, processor: Any, task: Task, labels: Sequence[str] | None) -> dict[str, Any]:
        found = {"labels": list(labels)} if labels is not None else {}
        return found | self.inputs_of(task).adapter_settings(processor)

    def data_collator(self, processor: Any, task: Task, model: Any) -> Any:
        return self.inputs_of(task).data_collator(processor, model)

    def records(self, logits: Any, model: Any) -> list[Record]:
        """Records of the logits of a batch, in order."""
        raise NotImplementedError

    def ranked_records(self, logits: Any, model: Any, top_k: int) -> list[Record]:
        """Records that hold `top_k` labels each, for kinds that `ranks_labels`."""
        raise NotImplementedError

    def batches(
        self,
        model: Any,
        inputs: Sequence[Any],
        encode: Callable[[Sequence[Any]], Any],
        size: int,
        top_k: int | None = None,
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
                    logits = model(**batch).logits
                    found += self.records(logits, model) if top_k is None else self.ranked_records(logits, model, top_k)
                    advance(len(inputs[start : start + size]))
        finally:
            model.train(training)
        return found


class ClassificationKind(LabelledKind):
    """Base of the kinds with one label or one value a row, in the column `label`."""

    ranks_labels = True

    def predict(
        self,
        model: Any,
        processor: Any,
        inputs: Sequence[Any],
        task: Task,
        batch_size: int = 32,
        top_k: int | None = None,
    ) -> list[Record]:
        """Record of each input, with `top_k` labels in each; inputs are what `inputs_of` takes."""
        encode = self.inputs_of(task).encoder(inputs, processor, task, model)
        return self.batches(model, range(len(inputs)), encode, batch_size, top_k)

    def preprocess(self, dataset: Dataset, processor: Any, task: Task, model: Any) -> Dataset:
        # the name of the argument that a model's forward computes its loss with
        return self.inputs_of(task).preprocess(dataset.rename_column("label", "labels"), processor, task, model)

    def compute_metrics(
        self, task: Task, labels: Sequence[str] | None, rows: Dataset | None = None
    ) -> Callable[[EvalPrediction], dict[str, float]]:
        metrics = {name: load_metric(name) for name in task.metrics}
        takes_probabilities = {name for name in task.metrics if name in METRICS and METRICS[name].takes_probabilities}
        options = _metric_options(labels)

        def compute(prediction: EvalPrediction) -> dict[str, float]:
            logits = prediction.predictions
            # some models return hidden states beside the logits
            logits = logits[0] if isinstance(logits, tuple) else logits
            predicted = logits.squeeze(-1) if labels is None else logits.argmax(-1)
            found: dict[str, float] = {}
            for name, metric in metrics.items():
                given = probabilities(logits) if name in takes_probabilities else predicted
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

    def chance(self, task: Task, labels: Sequence[str] | None, rows: Dataset) -> Baseline | None:
        """Scores of guessing each class alike; None for regression.

        They are those of the expected number of rows of each class with each guess, not of one draw.
        """
        import numpy as np

        if labels is None:
            return None
        count = len(labels)
        references, guesses = np.repeat(np.arange(count), count), np.tile(np.arange(count), count)
        wanted = np.bincount(np.asarray(rows["labels"][:]), minlength=count)
        weights = np.repeat(wanted / count, count)
        found: dict[str, float] = {}
        for name in task.metrics:
            if name in METRICS and METRICS[name].takes_weights:
                options = _metric_options(labels).get(name, {})
                found |= METRICS[name].compute(
                    predictions=guesses, references=references, sample_weight=weights, **options
                )
        return Baseline(CHANCE, found)

    def row_predictions(self, prediction: EvalPrediction, task: Task, rows: Dataset | None = None) -> Predictions:
        import numpy as np

        logits = prediction.predictions
        logits = np.asarray(logits[0] if isinstance(logits, tuple) else logits, dtype=np.float32)
        references: Any = prediction.label_ids
        # one output is a regression, because a task of classes has at least two
        if logits.shape[-1] == 1:
            return Predictions("regression", {"reference": references.reshape(-1), "prediction": logits.reshape(-1)})
        confidence = probabilities(logits).max(-1)
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

    def ranked_records(self, logits: Any, model: Any, top_k: int) -> list[Record]:
        """Records of logits (n, labels) with the `top_k` best labels, the best one first and beside the list."""
        # sorted in a stable way, so that of equal scores the label that argmax takes comes first
        scores, indices = logits.float().softmax(-1).sort(dim=-1, descending=True, stable=True)
        found = []
        for places, values in zip(indices[:, :top_k].tolist(), scores[:, :top_k].tolist(), strict=True):
            names = [model.config.id2label[place] for place in places]
            ranked = [{"label": name, "score": value} for name, value in zip(names, values, strict=True)]
            found.append({**ranked[0], "top_k": ranked})
        return found


def _metric_options(labels: Sequence[str] | None) -> dict[str, dict[str, Any]]:
    """Options of our metrics, by name, for a task of these labels."""
    # over all labels, because classes that are absent from an evaluation count too
    average = "binary" if labels is not None and len(labels) == 2 else "macro"
    return {"f1": {"average": average, "labels": list(range(len(labels or ())))}}


def _of_hub(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a load that choose the files of the Hub."""
    return {name: options[name] for name in ("revision",) if name in options}


def probabilities(logits: Any) -> Any:
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
