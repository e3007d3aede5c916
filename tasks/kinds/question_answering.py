"""Extractive question answering: the part of a context that answers a question."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from peft_lab.backbones.from_pretrained import load_with_head
from peft_lab.data.answer_columns import answer_faults, cast_answers
from peft_lab.data.classification_kind import plain_results
from peft_lab.data.context_windows import FoundAnswer, Window, WindowedRow, Windows, answer_places, best_answer
from peft_lab.data.kind import Kind
from peft_lab.data.profile import ColumnProfile, DataProfile, Proposal
from peft_lab.data.row_checks import RowFault, check_inputs, numbered, source_rows, warn_of_cut
from peft_lab.data.row_maps import identity_of_tokenizer, map_rows
from peft_lab.data.task_schema import PROMPT_IDS
from peft_lab.data.text_inputs import TextInputs, load_fast_tokenizer, right_padding, virtual_tokens
from peft_lab.errors import TaskError
from peft_lab.metrics import load_metric, squad
from peft_lab.metrics.baselines import Baseline
from peft_lab.metrics.predictions import Predictions
from peft_lab.registry import KindInfo

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import EvalPrediction, PreTrainedModel

    from peft_lab.data.task_schema import Task

KIND = KindInfo(
    name="question_answering",
    title="question and context -> part of the context",
    runtime="QuestionAnswering",
    columns={"question": True, "context": True, "answers": False, "answer": False, "answer_start": False},
    one_of=("answers", "answer"),
    answers=("answers", "answer", "answer_start"),
    settings=("max_length",),
    options={"doc_stride": 128, "max_answer_length": 30},
    metrics=("f1", "exact_match"),
    task_type="QUESTION_ANS",
    pipeline_tag="question-answering",
)

_SCORES = {"f1": squad.f1, "exact_match": squad.exact_match}

#: Column of scored rows that holds their windows.
_WINDOWS = "windows"
#: Columns of preprocessed rows: the row of a window, and whether it loses something.
_ROW, _CUT, _UNSEEN, _LONG, _EMPTY = "row_number", "cut_question", "unseen_answer", "long_answer", "empty_context"


class QuestionAnswering(Kind):
    """`question` + `context` -> `answers`; AutoModelForQuestionAnswering.

    A long context gives several windows, whose best answer is taken. `f1` and `exact_match` are those of SQuAD, from 0
    to 1. With `empty_rows: keep` a question may have no answer, as in SQuAD 2.0; then a prediction may be none too.
    """

    info = KIND
    trainer_labels = ("start_positions", "end_positions")
    raw_baseline = True

    def check(self, task: Task) -> None:
        if ("answer" in task.columns) != ("answer_start" in task.columns):
            raise TaskError('"answer" and "answer_start" of "columns" go together; name both, or "answers".')
        for name, least in (("doc_stride", 0), ("max_answer_length", 1)):
            if task.options[name] < least:
                raise TaskError(f'"{name}" must be at least {least}, not {task.options[name]}.')
        # a path is a metric of the user's own, which gets texts and lists of texts
        unfit = [name for name in task.metrics if name not in KIND.metrics and "/" not in name]
        if unfit:
            known = ", ".join(KIND.metrics)
            raise TaskError(f'metric "{unfit[0]}" does not fit this kind of task; fitting: {known}.')

    def propose(self, profile: DataProfile) -> Proposal | None:
        question = profile.named("question", ("question", "query"), _is_text)
        context = profile.named("context", ("context", "passage", "paragraph", "document"), _is_text)
        if question is None or context is None:
            return None
        columns = {"question": question.name, "context": context.name}
        answers = profile.named("answers", ("answers",), _holds_answers)
        if answers:
            return Proposal(self.name, 0.9, {**columns, "answers": answers.name}, metrics=KIND.metrics)
        answer = profile.named("answer", ("answer", "answer_text"), _is_text)
        start = profile.named("answer_start", ("answer_start", "start"), lambda column: column.whole)
        if answer is None or start is None:
            return None
        columns |= {"answer": answer.name, "answer_start": start.name}
        return Proposal(self.name, 0.9, columns, metrics=KIND.metrics)

    def cast(self, dataset: Dataset, task: Task) -> Dataset:
        return cast_answers(dataset, task)

    def row_faults(self, dataset: Dataset, task: Task) -> list[RowFault]:
        return answer_faults(dataset, task)

    def reads_texts(self, task: Task) -> bool:
        return True

    def auto_class(self, task: Task) -> Any:
        from transformers import AutoModelForQuestionAnswering

        return AutoModelForQuestionAnswering

    def load_processor(self, model_name_or_path: str, task: Task, **hub_kwargs: Any) -> Any:
        return load_fast_tokenizer(model_name_or_path, f'kind "{self.name}"', **hub_kwargs)

    def load_model(
        self, model_name_or_path: str, task: Task, labels: Sequence[str] | None, **hub_kwargs: Any
    ) -> PreTrainedModel:
        hub_kwargs.setdefault("dtype", KIND.default_dtype)
        # two outputs at each token, the logits of start and end, whatever labels the checkpoint had
        model = load_with_head(self.auto_class(task), model_name_or_path, num_labels=2, **hub_kwargs)
        TextInputs().prepare_model(model)
        return model

    def preprocess(self, dataset: Dataset, processor: Any, task: Task, model: Any) -> Dataset:
        """Data set of windows: the model's arguments, `start_positions` and `end_positions`.

        A window without the row's first answer has the place of "no answer".
        """
        make, most_tokens = Windows.of(task, processor, model), task.options["max_answer_length"]
        names = ["question", "context", "answers", *([PROMPT_IDS] if PROMPT_IDS in dataset.column_names else [])]

        def encode(*columns: list[Any]) -> dict[str, list[Any]]:
            found: dict[str, list[Any]] = {}
            *texts, numbers = columns
            for row, (question, context, answers, *ids) in zip(numbers, zip(*texts, strict=True), strict=True):
                windowed = make.of_row(question, context)
                for values in _features(windowed, answers, row, most_tokens):
                    for name, value in {**values, **({PROMPT_IDS: ids[0]} if ids else {})}.items():
                        found.setdefault(name, []).append(value)
            return found

        reads = [identity_of_tokenizer(processor), make.limit, make.stride, most_tokens, names]
        options = {"input_columns": names, "with_indices": True, "batched": True, "desc": "Tokenising"}
        rows = map_rows(dataset, encode, reads, remove_columns=dataset.column_names, **options)
        _warn(task, dataset, rows, make)
        return rows.remove_columns([_ROW, _CUT, _UNSEEN, _LONG, _EMPTY])

    def rows_to_score(self, dataset: Dataset, processor: Any, task: Task, model: Any) -> Dataset:
        """Rows with the windows that `preprocess` makes of them, by which answers are found again."""
        make, virtual = Windows.of(task, processor, model), virtual_tokens(model)

        def with_windows(question: str, context: str) -> dict[str, Any]:
            found = []
            for window in make.of_row(question, context).windows:
                # the logits of an evaluation have those of virtual tokens in front
                first, null = window.first + virtual, window.null + virtual
                found.append({"first": first, "starts": window.starts, "ends": window.ends, "null": null})
            return {_WINDOWS: found}

        reads = [identity_of_tokenizer(processor), make.limit, make.stride, virtual]
        options = {"input_columns": ["question", "context"], "desc": "Windows"}
        return map_rows(dataset, with_windows, reads, **options)

    def data_collator(self, processor: Any, task: Task, model: Any) -> Any:
        return WindowCollator(right_padding(processor), virtual_tokens(model))

    @staticmethod
    def preprocess_logits_for_metrics(logits: Any, labels: Any) -> Any:
        """Logits of start and end, without the hidden states that some models return besides."""
        return logits[0], logits[1]

    def compute_metrics(
        self, task: Task, labels: Sequence[str] | None, rows: Dataset | None = None
    ) -> Callable[[EvalPrediction], dict[str, float]]:
        own = {name: load_metric(name) for name in task.metrics if name not in KIND.metrics}

        def compute(prediction: EvalPrediction) -> dict[str, float]:
            pairs = _answers(prediction, task, rows)
            found = {name: sum(values) / len(values) for name, values in _row_scores(task, pairs).items()}
            for name, metric in own.items():
                answers, references = (list(texts) for texts in zip(*pairs, strict=True))
                found |= plain_results(name, metric.compute(predictions=answers, references=references))
            return found

        return compute

    def row_predictions(
        self, prediction: EvalPrediction, task: Task, rows: Dataset | None = None
    ) -> Predictions | None:
        import numpy as np

        scores = _row_scores(task, _answers(prediction, task, rows))
        return Predictions(self.name, {name: np.asarray(values) for name, values in scores.items()}) if scores else None

    def baseline(self, task: Task, labels: Sequence[str] | None, train: Dataset, rows: Dataset) -> Baseline | None:
        """Scores of the whole context, or of the most frequent training answer, whichever is better."""
        if task.metrics[0] not in KIND.metrics:
            return None
        first = [(answers["text"] or [""])[0] for answers in train["answers"][:]]
        usual = Counter(first).most_common(1)[0][0]
        references = [answers["text"] for answers in rows["answers"][:]]
        contexts, found = rows["context"][:], []
        for predictor, answers in (
            ("the whole context as the answer", contexts),
            ("the most frequent training answer", [usual] * len(contexts)),
        ):
            values = _row_scores(task, list(zip(answers, references, strict=True)))
            found.append(Baseline(predictor, {name: sum(each) / len(each) for name, each in values.items()}))
        return max(found, key=lambda baseline: baseline.scores[task.metrics[0]])

    def predict(
        self, model: Any, processor: Any, inputs: Sequence[Any], task: Task, batch_size: int = 32
    ) -> list[dict[str, Any]]:
        """Answer of each input with its score and the places of its characters in the context.

        Inputs are mappings of `question` and `context`. The score is the probability among the best answers of all
        windows; an answer that is none is an empty text.
        """
        return self.predict_with_prompts(model, processor, inputs, task, batch_size, None)

    def predict_with_prompts(
        self,
        model: Any,
        processor: Any,
        inputs: Sequence[Any],
        task: Task,
        batch_size: int,
        ids: Sequence[int] | None,
        **options: Any,
    ) -> list[dict[str, Any]]:
        # numbers of prompts are those of rows, and a row may have several windows
        pairs = [_pair(value, number) for number, value in enumerate(inputs, start=1)]
        blank = [row for row, texts in enumerate(pairs) if not all(map(str.strip, texts))]
        check_inputs(task, [RowFault("have an empty question or context", blank)])
        make = Windows.of(task, processor, model)
        rows = [make.of_row(*pair) for pair in pairs]
        cut = {_cut_questions(make): [row for row, windowed in enumerate(rows) if windowed.cuts_question]}
        warn_of_cut(task, None, cut, 'raise "max_length", or shorten the questions')
        flat: list[Window] = []
        numbers: list[int] | None = None if ids is None else []
        for row, windowed in enumerate(rows):
            flat += windowed.windows
            if ids is not None and numbers is not None:
                numbers += [ids[row]] * len(windowed.windows)
        logits = iter(_logits(model, right_padding(processor), flat, batch_size, numbers))
        answers = []
        for (_, context), windowed in zip(pairs, rows, strict=True):
            starts, ends = zip(*(next(logits) for _ in windowed.windows), strict=True)
            found = _best(task, context, windowed.windows, starts, ends)
            answers.append({"answer": found.text, "score": found.score, "start": found.start, "end": found.end})
        return answers


class WindowCollator:
    """Collator that pads windows at the right.

    Args:
        tokenizer: pads the arguments of the model.
        virtual: number of tokens that an adapter puts before those of a window, which move its answer.
    """

    def __init__(self, tokenizer: Any, virtual: int) -> None:
        self.tokenizer, self.virtual = tokenizer, virtual

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Join windows into a batch."""
        batch = dict(self.tokenizer.pad(rows, return_tensors="pt"))
        for name in QuestionAnswering.trainer_labels:
            if name in batch:
                batch[name] = batch[name] + self.virtual
        return batch


def _features(
    windowed: WindowedRow, answers: Mapping[str, Any], row: int, most_tokens: int
) -> Iterator[dict[str, Any]]:
    """Preprocessed windows of a row, whose first answer they are trained on."""
    places: list[tuple[int, int] | None] = [None] * len(windowed.windows)
    if answers["text"]:
        start = answers["answer_start"][0]
        end = start + len(answers["text"][0])
        places = [answer_places(window, start, end) for window in windowed.windows]
    known = [place for place in places if place is not None]
    marks = {
        _ROW: row,
        _CUT: windowed.cuts_question,
        _UNSEEN: bool(answers["text"]) and not known,
        _LONG: any(last - first >= most_tokens for first, last in known),
        _EMPTY: not any(window.starts for window in windowed.windows),
    }
    for window, place in zip(windowed.windows, places, strict=True):
        first, last = place or (window.null, window.null)
        yield {**window.inputs, "start_positions": first, "end_positions": last, **marks}


def _warn(task: Task, dataset: Dataset, rows: Dataset, make: Windows) -> None:
    """Warn of rows that lose a part of a question or an answer.

    Raises `TaskError` if a context has no token.
    """
    numbers, marked = rows[_ROW][:], {}
    for mark in (_CUT, _UNSEEN, _LONG, _EMPTY):
        values = zip(numbers, rows[mark][:], strict=True)
        marked[mark] = list(dict.fromkeys(row for row, is_marked in values if is_marked))
    if marked[_EMPTY]:
        shown = numbered(source_rows(dataset, marked[_EMPTY]))
        raise TaskError(f'Task "{task.name}": {len(marked[_EMPTY])} rows have a context without a token ({shown}).')
    longest = f"have an answer of more than {task.options['max_answer_length']} tokens, which is never found"
    unseen = "have an answer that stands whole in no window, and is trained as none"
    warn_of_cut(task, dataset, {_cut_questions(make): marked[_CUT]}, 'raise "max_length", or shorten the questions')
    warn_of_cut(task, dataset, {unseen: marked[_UNSEEN]}, 'raise "doc_stride" or "max_length"')
    warn_of_cut(task, dataset, {longest: marked[_LONG]}, 'raise "max_answer_length"')


def _cut_questions(make: Windows) -> str:
    return f"have a question that takes more than half of the {make.limit} tokens, and loses its end"


def _answers(prediction: EvalPrediction, task: Task, rows: Dataset | None) -> list[tuple[str, list[str]]]:
    """Answer and references of each row."""
    if rows is None:
        raise TaskError(f'Task "{task.name}": the answers of a model are texts of the contexts, which are not given.')
    outputs: Any = prediction.predictions
    starts, ends = outputs
    found, at = [], 0
    columns = (rows["context"][:], rows["answers"][:], rows[_WINDOWS][:])
    for context, answers, kept in zip(*columns, strict=True):
        windows = [Window({}, **window) for window in kept]
        own = slice(at, at + len(windows))
        answer = _best(task, context, windows, starts[own], ends[own])
        found.append((answer.text, answers["text"]))
        at += len(windows)
    return found


def _best(task: Task, context: str, windows: Sequence[Window], starts: Sequence[Any], ends: Any) -> FoundAnswer:
    may_be_none = task.empty_rows == "keep"
    return best_answer(context, windows, starts, ends, task.options["max_answer_length"], may_be_none)


def _row_scores(task: Task, pairs: Sequence[tuple[str, list[str]]]) -> dict[str, list[float]]:
    """Our metrics of the task, a value for each answer with its references."""
    found = {}
    for name in [name for name in task.metrics if name in _SCORES]:
        found[name] = [_SCORES[name](*pair) for pair in pairs]
    return found


def _logits(
    model: Any, tokenizer: Any, windows: Sequence[Window], size: int, numbers: Sequence[int] | None
) -> list[tuple[Any, Any]]:
    """Logits of start and end at each window's own tokens, computed in evaluation mode.

    `numbers` are those of the prompts of each window, if the method chooses them by row.
    """
    import torch

    from peft_lab.tuners.forward_context import row_inputs

    virtual, training = virtual_tokens(model), model.training
    found: list[tuple[Any, Any]] = []
    model.eval()
    try:
        for start in range(0, len(windows), size):
            own = slice(start, start + size)
            batch = tokenizer.pad([window.inputs for window in windows[own]], return_tensors="pt").to(model.device)
            prompts = nullcontext() if numbers is None else row_inputs(**{PROMPT_IDS: torch.tensor(numbers[own])})
            with torch.no_grad(), prompts:
                output = model(**batch)
            starts, ends = (
                logits[:, virtual:].float().cpu().numpy() for logits in (output.start_logits, output.end_logits)
            )
            found += zip(starts, ends, strict=True)
    finally:
        model.train(training)
    return found


def _pair(value: Any, number: int) -> tuple[str, str]:
    """Question and context of an input."""
    if isinstance(value, Mapping):
        value = [value[name] for name in ("question", "context") if name in value]
    if not isinstance(value, (list, tuple)) or len(value) != 2 or not all(isinstance(text, str) for text in value):
        raise TaskError(f"an input of this task is a mapping of question and context, not {value!r} (input {number}).")
    return value[0], value[1]


def _is_text(column: ColumnProfile) -> bool:
    return column.type == "text"


def _holds_answers(column: ColumnProfile) -> bool:
    return column.type == "mapping" and {"text", "answer_start"} <= set(column.keys)
