"""Base of the kinds whose model writes texts, and metrics of these: a value or counts for each row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peft_lab.data.task_schema import PROMPT_IDS
from peft_lab.data.token_kind import TokenKind
from peft_lab.errors import TaskError
from peft_lab.metrics import bleu, load_metric

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import EvalPrediction

    from peft_lab.data.decoder_rows import RowForm
    from peft_lab.data.task_schema import Task

#: Metrics of what a model writes by itself.
WRITTEN = ("exact_match", "rouge_l", "bleu", "coverage")


class WritingKind(TokenKind):
    """Base of the kinds whose model writes a text by itself, beside the tokens that it predicts."""

    def form(self, task: Task, dataset: Dataset) -> RowForm:
        """Form of the rows of a data set with canonical columns."""
        raise NotImplementedError

    def compute_metrics(
        self, task: Task, labels: Sequence[str] | None, rows: Dataset | None = None
    ) -> Callable[[EvalPrediction], dict[str, float]]:
        # a missing package is found before the training and not after it
        for name in wanted(task):
            if name != "coverage":
                load_metric(name)
        return super().compute_metrics(task, labels, rows)

    def generation_scores(
        self, model: Any, processor: Any, dataset: Dataset, task: Task, batch_size: int = 16
    ) -> dict[str, list[float]]:
        if not wanted(task):
            return {}
        form, rows = self.form(task, dataset), list(dataset)
        # rows may share a prompt, and with it what is written
        keys = [(form.row_prompt(row), row.get(PROMPT_IDS)) for row in rows]
        once = dict(zip(keys, [form.row_input(row) for row in rows], strict=True))
        ids = [number for _, number in once] if PROMPT_IDS in dataset.column_names else None
        answers = self.predict_with_prompts(model, processor, list(once.values()), task, batch_size, ids)
        texts = dict(zip(once, answers, strict=True))
        return scores(task, form, rows, [texts[key] for key in keys])


def wanted(task: Task) -> list[str]:
    """Metrics of written texts that a task names."""
    return [name for name in WRITTEN if name in task.metrics]


def check_metrics(task: Task, known: Sequence[str]) -> None:
    """Raise `TaskError` for metrics that a kind of written text does not have, or in an order that cannot be."""
    unfit = [name for name in task.metrics if name not in known]
    if unfit:
        raise TaskError(f'metric "{unfit[0]}" does not fit this kind of task; fitting: {", ".join(known)}.')
    if task.metrics[0] in WRITTEN:
        first = task.metrics[0]
        raise TaskError(f'the first metric is taken after every epoch, so it cannot be "{first}"; put it last.')
    if bool(task.template and task.template.required) != ("coverage" in task.metrics):
        raise TaskError('the metric "coverage" and the key "required" of the template go together; give both.')


def scores(
    task: Task, form: RowForm, rows: Sequence[Mapping[str, Any]], texts: Sequence[str]
) -> dict[str, list[float]]:
    """Columns of the task's metrics of written texts, with a number for each row.

    A metric that is a mean over rows has one column, which bears its name; BLEU, which is none, has its counts.

    Args:
        task, form: the task, and the form of its rows.
        rows: the rows that were answered.
        texts: what was written for each.
    """
    found: dict[str, list[float]] = {}
    for name in wanted(task):
        if name == "exact_match":
            pairs = [(form.found(text), form.target(row)) for text, row in zip(texts, rows, strict=True)]
            found[name] = _of_each(name, pairs)
        elif name == "coverage":
            found[name] = [form.coverage(row, text) for text, row in zip(texts, rows, strict=True)]
        elif name == "bleu":
            table = bleu.counts(texts, [form.answer(row) for row in rows])
            found |= dict(zip(bleu.COLUMNS, table.T.tolist(), strict=True))
        else:
            found[name] = _of_each(name, [(text, form.answer(row)) for text, row in zip(texts, rows, strict=True)])
    return found


def _of_each(name: str, pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Metric of ours on each pair of (written, wanted) text."""
    metric = load_metric(name)
    return [metric.compute(predictions=[found], references=[wanted])[name] for found, wanted in pairs]


def batches(lengths: Sequence[int], size: int, mixed: bool) -> Iterator[list[int]]:
    """Row numbers in batches of at most `size`, each of rows of one length unless `mixed`."""
    groups: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        groups.setdefault(0 if mixed else length, []).append(row)
    for rows in groups.values():
        for start in range(0, len(rows), size):
            yield rows[start : start + size]
