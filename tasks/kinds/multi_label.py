"""Multi-label classification: any number of labels for a text, a pair of texts or an image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peft_lab.data import label_lists
from peft_lab.data.classification_kind import Record, plain_results
from peft_lab.data.profile import ColumnProfile, DataProfile, Proposal
from peft_lab.data.row_checks import RowFault
from peft_lab.data.text_or_image import TextOrImageKind
from peft_lab.data.usual_columns import text_or_image_columns
from peft_lab.errors import TaskError, did_you_mean
from peft_lab.metrics import HUB_METRICS, METRICS, load_metric
from peft_lab.metrics.baselines import Baseline
from peft_lab.metrics.predictions import Predictions
from peft_lab.registry import KindInfo
from peft_lab.utils.mappings import without

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import EvalPrediction

    from peft_lab.data.task_schema import Task

#: Probability from which a label is predicted, unless the task says otherwise.
THRESHOLD = 0.5
#: Value of `thresholds` that asks for the best ones on the validation rows.
TUNE = "tune"

#: Usual names of the column of labels, and what stands between names in one cell.
_LABELS = ("labels", "tags", "topics", "categories", "genres", "label", "classes")
_SEPARATORS = (";", "|", ",")
#: Characters of a cell, on average, over which it is a text and no list of names.
_LONGEST_NAMES = 80

KIND = KindInfo(
    name="multi_label",
    title="text, pair of texts or image -> any number of labels",
    runtime="MultiLabel",
    columns={"text": False, "text_pair": False, "image": False, "labels": True},
    one_of=("text", "image"),
    answers=("labels",),
    settings=("labels", "max_length", "image_size"),
    options={"label_separator": "", "thresholds": None},
    problem_type="multi_label_classification",
    metrics=("f1_micro", "f1_macro", "map", "accuracy"),
    task_type="SEQ_CLS",
    pipeline_tag="text-classification",
)


class MultiLabel(TextOrImageKind):
    """`text`, `text` + `text_pair` or `image` -> the names in `labels`; a head of one output for each label.

    A row may have no label at all. A label is predicted where its probability reaches its threshold; `map` needs none,
    and `accuracy` is the share of rows whose set of labels is exactly right.
    """

    info = KIND
    ranks_labels = True

    def propose(self, profile: DataProfile) -> Proposal | None:
        lists = profile.find("labels", _LABELS, _holds_label_lists)
        joined = None if lists else profile.find("labels", _LABELS, lambda column: bool(_separator(profile, column)))
        labels = lists or joined
        inputs = text_or_image_columns(profile, [labels.name]) if labels else {}
        if labels is None or not inputs or _goes_with_words(profile, labels):
            return None
        usual = "labels" in profile.given or labels.name.lower() in _LABELS
        settings = {"label_separator": _separator(profile, joined)} if joined else {}
        doubts = (f'the names in "{labels.name}" are parted at "{settings["label_separator"]}"',) if joined else ()
        # before one label a row, which a column of several names joined is not
        confidence = 0.95 if usual else 0.6
        return Proposal(self.name, confidence, {**inputs, "labels": labels.name}, settings, KIND.metrics[:2], doubts)

    def check(self, task: Task) -> None:
        super().check(task)
        given = task.options["thresholds"]
        if given in (None, TUNE):
            return
        values = given if isinstance(given, Mapping) else {"": given}
        for name, value in values.items():
            of = f' of label "{name}"' if name else ""
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
                raise TaskError(
                    f'the threshold{of} must be a number between 0 and 1, not {value!r}; "thresholds" is one for all '
                    f'labels, a mapping of labels to numbers, or "{TUNE}".'
                )
        if isinstance(given, Mapping) and task.labels:
            _check_names(given, task.labels)

    def tunes(self, task: Task) -> bool:
        return bool(task.options["thresholds"] == TUNE)

    def tune(self, task: Task, labels: Sequence[str] | None, prediction: EvalPrediction) -> dict[str, Any]:
        """Thresholds with the best F1 of each label."""
        from peft_lab.metrics.multi_label import best_thresholds

        if not self.tunes(task):
            return {}
        found = best_thresholds(_references(prediction), _probabilities(prediction.predictions), THRESHOLD)
        return {"thresholds": dict(zip(labels or (), found.tolist(), strict=True))}

    def cast(self, dataset: Dataset, task: Task) -> Dataset:
        return label_lists.cast(super().cast(dataset, task), task, task.options["label_separator"])

    def row_faults(self, dataset: Dataset, task: Task) -> list[RowFault]:
        # the answers have faults of their own
        inputs = dataset.remove_columns(label_lists.COLUMN)
        return [*super().row_faults(inputs, task), *label_lists.faults(dataset, task)]

    def class_names(self, task: Task, train: Dataset, skip: Collection[int] = ()) -> tuple[str, ...]:
        return label_lists.names_of(task, train, skip)

    def encode_labels(
        self, task: Task, split: str, dataset: Dataset, labels: tuple[str, ...] | None, skip: Collection[int]
    ) -> Dataset:
        return label_lists.encode(task, split, dataset, labels or (), skip)

    def preprocess(self, dataset: Dataset, processor: Any, task: Task, model: Any) -> Dataset:
        return self.inputs_of(task).preprocess(dataset, processor, task, model)

    def data_collator(self, processor: Any, task: Task, model: Any) -> Any:
        return _Collator(super().data_collator(processor, task, model), len(model.config.id2label))

    def compute_metrics(
        self, task: Task, labels: Sequence[str] | None, rows: Dataset | None = None
    ) -> Callable[[EvalPrediction], dict[str, float]]:
        metrics = {name: load_metric(name) for name in task.metrics}
        takes_probabilities = {name for name in task.metrics if name in METRICS and METRICS[name].takes_probabilities}
        least = _thresholds(task, labels or ())

        def compute(prediction: EvalPrediction) -> dict[str, float]:
            scores, references = _probabilities(prediction.predictions), _references(prediction)
            predicted = (scores >= least).astype(int)
            found: dict[str, float] = {}
            for name, metric in metrics.items():
                given = scores if name in takes_probabilities else predicted
                found |= plain_results(name, metric.compute(predictions=given, references=references))
            return found

        return compute

    def row_predictions(self, prediction: EvalPrediction, task: Task, rows: Dataset | None = None) -> Predictions:
        """Counts of labels for each row.

        Metrics that are no sums over rows have two columns: the value over all rows, and without each row. So their
        number does not grow with that of the labels.
        """
        import numpy as np

        from peft_lab.metrics.multi_label import f1_macro, mean_average_precision

        scores, references = _probabilities(prediction.predictions), _references(prediction)
        labels = rows.features[label_lists.COLUMN].feature.names if rows is not None else ()
        predicted = (scores >= _thresholds(task, labels)).astype(int)
        columns = {
            "true": references.sum(1),
            "found": predicted.sum(1),
            "hits": (references * predicted).sum(1),
            "exact": (references == predicted).all(1).astype(int),
        }
        for name, function, given in (("f1_macro", f1_macro, predicted), ("map", mean_average_precision, scores)):
            if name in task.metrics:
                value, without = function(references, given)
                columns |= {f"{name}_all_rows": np.full(len(without), value), f"{name}_without_row": without}
        return Predictions(self.name, columns)

    def baseline(self, task: Task, labels: Sequence[str] | None, train: Dataset, rows: Dataset) -> Baseline:
        """Scores of the most frequent set of labels; the mean average precision is that of constant scores."""
        import numpy as np
        from transformers import EvalPrediction

        known, wanted = (part[label_lists.COLUMN][:] for part in (train, rows))
        answer = label_lists.most_frequent(known)
        logits = np.full(len(labels or ()), -1.0)
        logits[list(answer)] = 1.0
        kept = tuple(name for name in task.metrics if name in HUB_METRICS or name in METRICS)
        # its answer is given, and not compared with thresholds
        plain = task.with_options({"thresholds": None}).model_copy(update={"metrics": kept})
        compute = self.compute_metrics(plain, labels)
        references = _multi_hot(wanted, len(logits))
        found = compute(EvalPrediction(np.tile(logits, (len(wanted), 1)), references))
        if "map" in found:
            # a score that is the same for all rows, because what differs between rows is not seen
            found |= METRICS["map"].compute(np.zeros_like(references), references)
        return Baseline("the most frequent set of labels of the training rows", found)

    def records(self, logits: Any, model: Any) -> list[Record]:
        """Probability of each label, by name."""
        names = [model.config.id2label[index] for index in range(logits.shape[-1])]
        return [dict(zip(names, row, strict=True)) for row in logits.float().sigmoid().tolist()]

    def predict(
        self,
        model: Any,
        processor: Any,
        inputs: Sequence[Any],
        task: Task,
        batch_size: int = 32,
        top_k: int | None = None,
    ) -> list[Record]:
        """Labels of each input with their probabilities, `{"labels": [{"label": ..., "score": ...}, ...]}`.

        The most probable one stands first; a list may be empty. With `top_k`, the answer has so many labels besides,
        whatever their thresholds.
        """
        encode = self.inputs_of(task).encoder(inputs, processor, task, model)
        found = self.batches(model, range(len(inputs)), encode, batch_size)
        least = dict(zip(found[0], _thresholds(task, list(found[0])), strict=True)) if found else {}
        answers = []
        for scores in found:
            entries = [{"label": name, "score": score} for name, score in scores.items()]
            ranked = sorted(entries, key=lambda entry: -entry["score"])
            answer = {"labels": [entry for entry in ranked if entry["score"] >= least[entry["label"]]]}
            answers.append(answer if top_k is None else {**answer, "top_k": ranked[:top_k]})
        return answers


class _Collator:
    """Collator of the inputs that makes the lists of labels an array of 0 and 1, float32 (n, labels)."""

    def __init__(self, inputs: Callable[[list[dict[str, Any]]], dict[str, Any]], labels: int) -> None:
        self.inputs, self.labels = inputs, labels

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Batch of rows."""
        import torch

        others = [without(row, label_lists.COLUMN) for row in rows]
        answers = _multi_hot([row[label_lists.COLUMN] for row in rows], self.labels)
        batch = self.inputs(others)
        batch["labels"] = torch.from_numpy(answers)
        return batch


def _multi_hot(lists: Sequence[Sequence[int]], labels: int) -> Any:
    """Lists of numbers of labels as 0 and 1, float32 (n, labels)."""
    import numpy as np

    found = np.zeros((len(lists), labels), dtype=np.float32)
    for row, numbers in enumerate(lists):
        found[row, list(numbers)] = 1.0
    return found


def _probabilities(predictions: Any) -> Any:
    """Probability of each label on its own, float32 (n, labels)."""
    import numpy as np
    from scipy.special import expit

    # some models return hidden states beside the logits
    logits = predictions[0] if isinstance(predictions, tuple) else predictions
    return expit(np.asarray(logits, dtype=np.float32))


def _references(prediction: EvalPrediction) -> Any:
    """True labels, int64 (n, labels)."""
    import numpy as np

    return np.asarray(prediction.label_ids).round().astype(int)


def _thresholds(task: Task, labels: Sequence[str]) -> Any:
    """Thresholds of the labels, float64 (labels,).

    Those that a run has chosen stand in its task by now; without a run `tune` is the default.
    """
    import numpy as np

    given = task.options["thresholds"]
    if isinstance(given, Mapping):
        _check_names(given, labels)
        return np.array([given.get(label, THRESHOLD) for label in labels])
    return np.full(len(labels), given if isinstance(given, (int, float)) else THRESHOLD)


def _check_names(given: Mapping[str, Any], labels: Sequence[str]) -> None:
    unknown = next((str(name) for name in given if name not in labels), None)
    if unknown is not None:
        raise TaskError(f'"thresholds" names "{unknown}", which is no label.{did_you_mean(unknown, labels)}')


def _holds_label_lists(column: ColumnProfile) -> bool:
    """Test whether a column holds lists of a few different names or numbers."""
    entries = column.entries
    return entries is not None and (entries.holds_classes or bool(entries.class_names))


def _separator(profile: DataProfile, column: ColumnProfile) -> str:
    """Separator of a column of texts that join names; "" for any other column."""
    if column.type != "text" or column.mean_length > _LONGEST_NAMES:
        return ""
    cells = [str(row.get(column.name) or "") for row in profile.rows]
    for separator in _SEPARATORS:
        uses: Counter[str] = Counter()
        for cell in set(cells):
            uses.update({name.strip() for name in cell.split(separator)})
        joined = [cell for cell in cells if separator in cell]
        if joined and profile.given.get("labels") == column.name:
            return separator
        # each name of a joined cell stands in other cells too
        if len(joined) > 1 and all(uses[name.strip()] > 1 for cell in joined for name in cell.split(separator)):
            return separator
    return ""


def _goes_with_words(profile: DataProfile, labels: ColumnProfile) -> bool:
    """Test whether another column has a list of the same length in each row, whose entries the labels tag."""
    if labels.type != "list":
        return False
    for column in profile.columns.values():
        pairs = [(row.get(labels.name) or (), row.get(column.name) or ()) for row in profile.rows]
        if column.type == "list" and column.name != labels.name and all(len(a) == len(b) for a, b in pairs):
            return True
    return False
