"""Multiple choice: a question, with a context or without, to one of the choices of its row."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MethodType
from typing import TYPE_CHECKING, Any

from peft_lab.backbones.from_pretrained import load_with_head
from peft_lab.data import choices as choice_column
from peft_lab.data.classification_kind import Record, plain_results
from peft_lab.data.kind import Kind
from peft_lab.data.profile import DataProfile, Proposal
from peft_lab.data.row_checks import RowFault, check_inputs, column_faults, warn_of_cut
from peft_lab.data.row_maps import identity_of_tokenizer, map_rows
from peft_lab.data.text_inputs import (
    WHOLE_LENGTH,
    cast_texts,
    encode_texts,
    load_tokenizer,
    longer_rows,
    padding_tokenizer,
    token_limit,
)
from peft_lab.errors import TaskError
from peft_lab.metrics import HUB_METRICS, METRICS, load_metric
from peft_lab.metrics.baselines import CHANCE, Baseline
from peft_lab.metrics.predictions import Predictions
from peft_lab.registry import KindInfo
from peft_lab.utils.batch_progress import advance

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from torch import nn
    from transformers import EvalPrediction, PreTrainedModel

    from peft_lab.data.task_schema import Task

#: Tokens of context, question and one choice.
MAX_LENGTH = 256
#: Argument of the forward with the number of choices of each row, where rows of a batch differ.
COUNTS = "choice_counts"
_CUT = "are longer than the limit with one of their choices, and lose the end of the longer text"

#: Usual names of the columns; choices in several columns have a number or a letter behind the name.
_QUESTIONS = ("question", "question_stem", "startphrase", "sent2", "goal", "query", "text", "request", "sentence")
_CONTEXTS = ("context", "article", "passage", "premise", "sent1", "story")
_CHOICES = ("choices", "options", "endings", "answers", "candidates")
_ANSWERS = ("answer", "label", "answerkey", "answer_key", "correct", "gold", "target")
_IN_COLUMNS = re.compile(r"(ending|choice|option|answer|sol|candidate|)[ _]?([0-9]|[a-h])", re.IGNORECASE)

KIND = KindInfo(
    name="multiple_choice",
    title="question, with or without context -> one of its choices",
    runtime="MultipleChoice",
    columns={"context": False, "question": True, "choices": True, "answer": True},
    several=("choices",),
    answers=("answer",),
    settings=("max_length",),
    options={"first_choice": 0},
    metrics=("accuracy", "ece"),
    pipeline_tag="multiple-choice",
)


class MultipleChoice(Kind):
    """`question` (and `context`) with `choices` -> the position in `answer`; AutoModelForMultipleChoice.

    A choice is read in a pair of texts: (question, choice) without a context, (context, question and choice) with one.
    The model gives each pair one logit. Rows may have different numbers of choices.
    """

    info = KIND
    ranks_labels = True
    text_columns = ("context", "question")

    def propose(self, profile: DataProfile) -> Proposal | None:
        choices = _choices(profile)
        answer = profile.named("answer", _ANSWERS, lambda column: column.type in ("text", "number"))
        taken = [*choices.values(), *([answer.name] if answer else [])]
        question = profile.longest_text("question", _QUESTIONS, taken)
        if not choices or answer is None or question is None:
            return None
        columns = {"question": question.name, **choices, "answer": answer.name}
        context = profile.named("context", _CONTEXTS, lambda column: column.type == "text")
        if context and context.name not in columns.values():
            columns = {"context": context.name, **columns}
        return Proposal(self.name, 0.9, columns, metrics=KIND.metrics)

    def check(self, task: Task) -> None:
        if task.options["first_choice"] not in (0, 1):
            raise TaskError(
                f'"first_choice" is the number that answers give the first choice, 0 or 1, not '
                f"{task.options['first_choice']}."
            )

    def reads_texts(self, task: Task) -> bool:
        return True

    def smooths_labels(self, task: Task) -> bool:
        return False

    def auto_class(self, task: Task) -> Any:
        from transformers import AutoModelForMultipleChoice

        return AutoModelForMultipleChoice

    def load_processor(self, model_name_or_path: str, task: Task, **hub_kwargs: Any) -> Any:
        return load_tokenizer(model_name_or_path, **hub_kwargs)

    def load_model(
        self, model_name_or_path: str, task: Task, labels: Sequence[str] | None, **hub_kwargs: Any
    ) -> PreTrainedModel:
        hub_kwargs.setdefault("dtype", self.info.default_dtype)
        model = load_with_head(self.auto_class(task), model_name_or_path, **hub_kwargs)
        model.forward = _WithCounts(model)
        return model

    def cast(self, dataset: Dataset, task: Task) -> Dataset:
        return choice_column.cast(cast_texts(dataset, task, self.text_columns), task)

    def row_faults(self, dataset: Dataset, task: Task) -> list[RowFault]:
        return [*column_faults(dataset, task, self.text_columns), *choice_column.faults(dataset, task)]

    def class_names(self, task: Task, train: Dataset, skip: Collection[int] = ()) -> None:
        return None

    def encode_labels(
        self, task: Task, split: str, dataset: Dataset, labels: tuple[str, ...] | None, skip: Collection[int]
    ) -> Dataset:
        return choice_column.encode(task, split, dataset, skip, task.options["first_choice"])

    def preprocess(self, dataset: Dataset, processor: Any, task: Task, model: Any) -> Dataset:
        """Data set with lists of the model's arguments, one for each choice, and the right position in `labels`."""
        limit = token_limit(task, MAX_LENGTH, processor, model, pair=True)
        texts = [name for name in self.text_columns if name in dataset.column_names]
        names = [*texts, choice_column.CHOICES]

        def tokenise(*columns: list[Any]) -> dict[str, Any]:
            cells = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
            return _encoded(processor, cells, limit)

        reads = [identity_of_tokenizer(processor), names, limit]
        options = {"input_columns": names, "batched": True, "remove_columns": names, "desc": "Tokenising"}
        rows = map_rows(dataset, tokenise, reads, **options)
        cut = {_CUT: [row for row, counts in enumerate(rows[WHOLE_LENGTH][:]) if max(counts) > limit]}
        warn_of_cut(task, dataset, cut, longer_rows(limit, processor, model))
        return rows.remove_columns(WHOLE_LENGTH).rename_column(choice_column.ANSWER, "labels")

    def data_collator(self, processor: Any, task: Task, model: Any) -> Any:
        return _Collator(padding_tokenizer(processor, model))

    def compute_metrics(
        self, task: Task, labels: Sequence[str] | None, rows: Dataset | None = None
    ) -> Callable[[EvalPrediction], dict[str, float]]:
        metrics = {name: load_metric(name) for name in task.metrics}
        takes_probabilities = {name for name in task.metrics if name in METRICS and METRICS[name].takes_probabilities}

        def compute(prediction: EvalPrediction) -> dict[str, float]:
            probabilities = _probabilities(prediction, rows)
            found: dict[str, float] = {}
            for name, metric in metrics.items():
                given = probabilities if name in takes_probabilities else probabilities.argmax(-1)
                found |= plain_results(name, metric.compute(predictions=given, references=prediction.label_ids))
            return found

        return compute

    def row_predictions(self, prediction: EvalPrediction, task: Task, rows: Dataset | None = None) -> Predictions:
        import numpy as np

        probabilities = _probabilities(prediction, rows)
        columns = {
            "reference": np.asarray(prediction.label_ids),
            "prediction": probabilities.argmax(-1),
            "confidence": probabilities.max(-1),
        }
        return Predictions(self.name, columns)

    def baseline(self, task: Task, labels: Sequence[str] | None, train: Dataset, rows: Dataset) -> Baseline:
        """Scores of the position that is right most often; of rows that lack it, the most frequent one they have."""
        import numpy as np

        counts = np.bincount(np.asarray(train["labels"][:]))
        by_frequency = np.argsort(-counts, kind="stable")
        answers = []
        for lists in rows["input_ids"][:]:
            answers.append(next((place for place in by_frequency if place < len(lists)), 0))
        found: dict[str, float] = {}
        for name in task.metrics:
            known = name in HUB_METRICS or name in METRICS
            if known and not (name in METRICS and METRICS[name].takes_probabilities):
                found |= plain_results(
                    name, load_metric(name).compute(predictions=answers, references=rows["labels"][:])
                )
        return Baseline("the position of the right choice in most training rows", found)

    def chance(self, task: Task, labels: Sequence[str] | None, rows: Dataset) -> Baseline | None:
        """Expected accuracy of guessing each choice of a row alike."""
        if "accuracy" not in task.metrics:
            return None
        shares = [1 / len(choices) for choices in rows["input_ids"][:]]
        return Baseline(CHANCE, {"accuracy": sum(shares) / len(shares)})

    def predict(
        self,
        model: Any,
        processor: Any,
        inputs: Sequence[Any],
        task: Task,
        batch_size: int = 32,
        top_k: int | None = None,
    ) -> list[Record]:
        """Chosen texts with their probabilities; with `top_k`, the best ones besides.

        Inputs are mappings of `question`, `choices` and, if the task has one, `context`.
        """
        import torch

        limit = token_limit(task, MAX_LENGTH, processor, model, pair=True)
        rows = [_row(value, task, number) for number, value in enumerate(inputs, start=1)]
        blank = [number for number, row in enumerate(rows) if _has_blank(row, task)]
        check_inputs(task, [RowFault("have an empty text", blank, "empty")])
        encoded = _encoded(processor, rows, limit)
        cut = {_CUT: [row for row, counts in enumerate(encoded.pop(WHOLE_LENGTH, [])) if max(counts) > limit]}
        warn_of_cut(task, None, cut, longer_rows(limit, processor, model))
        collate, found = self.data_collator(processor, task, model), []
        training = model.training
        model.eval()
        try:
            for start in range(0, len(rows), batch_size):
                chosen = range(start, min(start + batch_size, len(rows)))
                batch = collate([_part(encoded, row) for row in chosen])
                with torch.no_grad():
                    logits = model(**{name: value.to(model.device) for name, value in batch.items()}).logits
                for row, scores in zip(chosen, logits.float().softmax(-1).tolist(), strict=True):
                    found.append(_record(rows[row][choice_column.CHOICES], scores, top_k))
                advance(len(chosen))
        finally:
            model.train(training)
        return found


def _choices(profile: DataProfile) -> dict[str, str]:
    """Columns of the choices, by their canonical names: one of lists, or several of texts; empty without any."""
    name = choice_column.CHOICES
    lists = profile.named(name, _CHOICES, lambda column: column.type in ("list", "mapping"))
    if lists is not None:
        return {name: lists.name}
    groups: dict[str, list[str]] = {}
    for column in profile.columns.values():
        found = _IN_COLUMNS.fullmatch(column.name)
        if found and column.type in ("text", "number") and column.name not in profile.given.values():
            groups.setdefault(found[1].lower(), []).append(column.name)
    several = max(groups.values(), key=len, default=[])
    return {f"{name}[{number}]": source for number, source in enumerate(several)} if len(several) > 1 else {}


class _Collator:
    """Collator of rows of choices: arrays (batch, choices, tokens).

    A row with fewer choices than another is filled with copies of its first one, which `COUNTS` tells the model to
    leave out: an empty row would have no token that it could attend to.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Batch of rows."""
        import torch

        names = [name for name in self.tokenizer.model_input_names if name in rows[0]]
        counts = [len(row["input_ids"]) for row in rows]
        most = max(counts)
        flat: dict[str, list[Any]] = {name: [] for name in names}
        for row, count in zip(rows, counts, strict=True):
            for name in names:
                flat[name] += [*row[name], *row[name][:1] * (most - count)]
        padded = self.tokenizer.pad(flat, return_tensors="pt")
        batch = {name: value.reshape(len(rows), most, -1) for name, value in padded.items()}
        for name in rows[0].keys() - batch.keys():
            batch[name] = torch.tensor([row[name] for row in rows])
        if min(counts) < most:
            batch[COUNTS] = torch.tensor(counts)
        return batch


class _WithCounts:
    """Forward of one model that takes rows with different numbers of choices.

    It stands in the instance's `forward`, so that the loss is right wherever the model is called. A deep copy or a
    pickle of the model takes its own along.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.__name__ = "forward"
        self.__doc__ = type(module).forward.__doc__

    @property
    def __signature__(self) -> inspect.Signature:
        """Signature of the model's own forward with the numbers of choices."""
        own = inspect.signature(MethodType(type(self.module).forward, self.module))
        known = list(own.parameters.values())
        at = len(known) - sum(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known)
        extra = inspect.Parameter(COUNTS, inspect.Parameter.KEYWORD_ONLY, default=None)
        return own.replace(parameters=[*known[:at], extra, *known[at:]])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] is self.module:  # accelerate binds what it unwraps to the module once more
            args = args[1:]
        forward = MethodType(type(self.module).forward, self.module)
        counts: torch.Tensor | None = kwargs.pop(COUNTS, None)
        if counts is None:
            return forward(*args, **kwargs)
        labels = kwargs.pop("labels", None)
        output = forward(*args, **kwargs)
        import torch

        places = torch.arange(output.logits.shape[-1], device=counts.device)
        output.logits = output.logits.masked_fill(places >= counts[:, None], torch.finfo(output.logits.dtype).min)
        if labels is not None:
            output.loss = torch.nn.functional.cross_entropy(output.logits.float(), labels)
        return output


def _record(choices: Sequence[str], scores: Sequence[float], top_k: int | None) -> Record:
    """Best choice with its probability, and the `top_k` best ones beside it if they are asked for."""
    # of equal scores the first one; scores of slots that the row does not have stand behind those of its choices
    entries: list[Record] = [{"label": text, "score": score} for text, score in zip(choices, scores, strict=False)]
    ranked = sorted(entries, key=lambda entry: -float(entry["score"]))
    return ranked[0] if top_k is None else {**ranked[0], "top_k": ranked[:top_k]}


def _part(encoded: Mapping[str, Sequence[Any]], row: int) -> dict[str, Any]:
    return {name: values[row] for name, values in encoded.items()}


def _encoded(processor: Any, rows: Sequence[Mapping[str, Any]], limit: int) -> dict[str, Any]:
    """Arguments of the model as lists of lists, one for each choice, and their lengths before they were cut."""
    firsts: list[str] = []
    seconds: list[str] = []
    counts: list[int] = []
    for row in rows:
        for choice in row[choice_column.CHOICES]:
            with_context = "context" in row
            firsts.append(row["context"] if with_context else row["question"])
            seconds.append(f"{row['question']} {choice}" if with_context else choice)
        counts.append(len(row[choice_column.CHOICES]))
    flat, start = encode_texts(processor, [firsts, seconds], limit) if firsts else {}, 0
    found: dict[str, Any] = {}
    for count in counts:
        for name, values in flat.items():
            found.setdefault(name, []).append(values[start : start + count])
        start += count
    return found


def _probabilities(prediction: EvalPrediction, rows: Dataset | None) -> Any:
    """Probabilities of the choices, float32 (n, most choices), 0 for those that a row does not have."""
    import numpy as np
    from scipy.special import softmax

    logits = prediction.predictions
    logits = np.array(logits[0] if isinstance(logits, tuple) else logits, dtype=np.float32)
    if rows is not None:
        # Trainer pads shorter batches with -100, which may be more than a logit
        counts = np.array([len(choices) for choices in rows[choice_column.CHOICES][:]])
        logits[np.arange(logits.shape[1]) >= counts[:, None]] = -np.inf
    return softmax(logits, -1)


def _read(task: Task) -> list[str]:
    return [name for name in ("context", "question") if name in task.columns]


def _has_blank(row: Mapping[str, Any], task: Task) -> bool:
    return any(not row[name].strip() for name in _read(task))


def _row(value: Any, task: Task, number: int) -> dict[str, Any]:
    """Columns of an input of a prediction."""
    names = _read(task)
    choices: Any = None
    if isinstance(value, Mapping):
        cells = [value[name] for name in task.columns if name.startswith(f"{choice_column.CHOICES}[") and name in value]
        choices = value.get(choice_column.CHOICES, choice_column.filled(cells))
    good = isinstance(choices, (list, tuple)) and len(choices) > 1 and all(str(choice).strip() for choice in choices)
    if not good or not all(isinstance(value.get(name), str) for name in names):
        raise TaskError(
            f"an input of this task is a mapping of {', '.join(names)} to texts, and of choices to a list of at least "
            f"two texts, not {value!r} (input {number})."
        )
    return {**{name: value[name] for name in names}, choice_column.CHOICES: [str(choice) for choice in choices]}
