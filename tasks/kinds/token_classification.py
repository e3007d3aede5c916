"""Token classification: a tag for each word of a text, such as the named entities in it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from peft_lab.data.classification_kind import LabelledKind, plain_results
from peft_lab.data.profile import ColumnProfile, DataProfile, Proposal
from peft_lab.data.tag_columns import encode_tags, tag_names
from peft_lab.data.text_inputs import virtual_tokens
from peft_lab.data.word_inputs import IGNORED, WordInputs, batches_of
from peft_lab.data.words import Word
from peft_lab.errors import TaskError
from peft_lab.metrics import load_metric
from peft_lab.metrics.baselines import Baseline
from peft_lab.metrics.entities import (
    ENTITY_SCORES,
    OUTSIDE,
    check_seqeval,
    entities,
    entity_counts,
    entity_scores,
)
from peft_lab.metrics.predictions import Predictions
from peft_lab.registry import KindInfo

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import EvalPrediction

    from peft_lab.data.task_schema import Task

KIND = KindInfo(
    name="token_classification",
    title="words of a text -> tag of each",
    runtime="TokenClassification",
    columns={"tokens": False, "tags": False, "text": False, "spans": False},
    one_of=("tokens", "text"),
    answers=("tags", "spans"),
    settings=("labels", "max_length"),
    metrics=("seqeval_f1", "seqeval_precision", "seqeval_recall", "token_accuracy"),
    task_type="TOKEN_CLS",
    pipeline_tag="token-classification",
)

#: Usual names of the columns.
_TOKENS, _TAGS = ("tokens", "words"), ("ner_tags", "tags", "labels", "pos_tags", "slots", "ner")
_TEXTS, _SPANS = ("text", "sentence"), ("spans", "entities", "labels", "annotations")

#: Names of the tags of a row's words.
_Tags = list[str]


class TokenClassification(LabelledKind):
    """`tokens` -> `tags`, or `text` -> `spans`; AutoModelForTokenClassification.

    The first token of a word stands for it. Words behind the limit are tagged `O`. Entities are those of seqeval, see
    `peft_lab.metrics.entities`; `token_accuracy` is the share of words with the right tag.
    """

    info = KIND
    inputs = WordInputs()
    raw_baseline = True

    def check(self, task: Task) -> None:
        given = {name for name in task.columns if name in KIND.columns}
        if given not in ({"tokens", "tags"}, {"text", "spans"}):
            raise TaskError('"columns" must name "tokens" and "tags", or "text" and "spans".')
        # a path is a metric of the user's own, which gets lists of tags
        unfit = [name for name in task.metrics if name not in KIND.metrics and "/" not in name]
        if unfit:
            known = ", ".join(KIND.metrics)
            raise TaskError(f'metric "{unfit[0]}" does not fit this kind of task; fitting: {known}.')

    def propose(self, profile: DataProfile) -> Proposal | None:
        tokens = profile.named("tokens", _TOKENS, _holds_lists)
        tags = profile.named("tags", _TAGS, _holds_lists) if tokens else None
        if tokens and tags:
            return Proposal(self.name, 0.9, {"tokens": tokens.name, "tags": tags.name}, metrics=KIND.metrics)
        spans = profile.named("spans", _SPANS, _holds_spans)
        text = profile.longest_text("text", _TEXTS, [spans.name]) if spans else None
        if spans and text:
            return Proposal(self.name, 0.9, {"text": text.name, "spans": spans.name}, metrics=KIND.metrics)
        return None

    def class_names(self, task: Task, train: Dataset, skip: Collection[int] = ()) -> tuple[str, ...]:
        return tag_names(task, train, skip)

    def encode_labels(
        self, task: Task, split: str, dataset: Dataset, labels: tuple[str, ...] | None, skip: Collection[int]
    ) -> Dataset:
        return encode_tags(task, split, dataset, labels or (), skip)

    def preprocess(self, dataset: Dataset, processor: Any, task: Task, model: Any) -> Dataset:
        return self.inputs.preprocess(dataset, processor, task, model)

    @staticmethod
    def preprocess_logits_for_metrics(logits: Any, labels: Any) -> Any:
        """Predicted classes, (n, t), of logits (n, t, classes)."""
        # Trainer hands on a tuple where a model returns more than logits, such as hidden states
        return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)

    def compute_metrics(
        self, task: Task, labels: Sequence[str] | None, rows: Dataset | None = None
    ) -> Callable[[EvalPrediction], dict[str, float]]:
        if _scores_entities(task):
            check_seqeval()  # a missing package is found before the training and not after it
        own = {name: load_metric(name) for name in task.metrics if name not in KIND.metrics}
        names = list(labels or ())

        def compute(prediction: EvalPrediction) -> dict[str, float]:
            return _scores(task, list(_tags(prediction, names, rows)), own)

        return compute

    def row_predictions(
        self, prediction: EvalPrediction, task: Task, rows: Dataset | None = None
    ) -> Predictions | None:
        import numpy as np

        if rows is None:
            return None
        pairs = list(_tags(prediction, rows.features["tags"].feature.names, rows))
        columns: dict[str, Any] = {"tokens": [len(tags) for tags, _ in pairs], "hits": [_hits(*pair) for pair in pairs]}
        if _scores_entities(task):
            counts = zip(*(entity_counts(*pair) for pair in pairs), strict=True)
            columns |= dict(zip(("true_entities", "predicted_entities", "correct_entities"), counts, strict=True))
        return Predictions(self.name, {name: np.asarray(values, dtype=float) for name, values in columns.items()})

    def baseline(self, task: Task, labels: Sequence[str] | None, train: Dataset, rows: Dataset) -> Baseline:
        """Scores of each word's most frequent training tag, without any context.

        Words that the training rows do not have get the most frequent tag of all.
        """
        names = list(labels or ())
        known: defaultdict[str, Counter[int]] = defaultdict(Counter)
        total: Counter[int] = Counter()
        for words, tags in zip(train["tokens"][:], train["tags"][:], strict=True):
            total.update(tags)
            for word, tag in zip(words, tags, strict=True):
                known[word][tag] += 1
        best = {word: names[counts.most_common(1)[0][0]] for word, counts in known.items()}
        usual = names[total.most_common(1)[0][0]]
        pairs = []
        for words, tags in zip(rows["tokens"][:], rows["tags"][:], strict=True):
            pairs.append(([names[tag] for tag in tags], [best.get(word, usual) for word in words]))
        return Baseline("the most frequent training tag of each word", _scores(task, pairs, {}))

    def records(self, logits: Any, model: Any) -> list[Any]:
        """Classes and probabilities at each token, without those of virtual tokens."""
        scores, classes = logits[:, virtual_tokens(model) :].float().softmax(-1).max(-1)
        return list(zip(classes.tolist(), scores.tolist(), strict=True))

    def predict(
        self, model: Any, processor: Any, inputs: Sequence[Any], task: Task, batch_size: int = 32
    ) -> list[list[dict[str, Any]]]:
        """Entities of each input, in order: label, score, text, and places of its characters.

        Inputs are texts or lists of words. The score is the mean probability of the tags of its words.
        """
        check_seqeval()
        words, encoded = self.inputs.encode_inputs(inputs, processor, task, model)
        # records of tokens are pairs of lists, and no mappings
        found: list[Any] = self.batches(model, range(len(words)), batches_of(encoded, processor), batch_size)
        names: dict[int, str] = model.config.id2label
        answers = []
        for value, row, tokens, (classes, scores) in zip(inputs, words, encoded, found, strict=True):
            text = value if isinstance(value, str) else " ".join(value)
            tags = [names[classes[place]] for place in tokens.first]
            answers.append(_entity_records(text, row, tags, [scores[place] for place in tokens.first]))
        return answers


def _tags(prediction: EvalPrediction, names: Sequence[str], rows: Dataset | None) -> Iterator[tuple[_Tags, _Tags]]:
    """True and predicted tags of each row's words; words behind the limit are predicted as `O`."""
    predicted: Any = prediction.predictions
    wanted: Any = prediction.label_ids
    true = None if rows is None else rows["tags"][:]
    for row, (found, labels) in enumerate(zip(predicted, wanted, strict=True)):
        # Trainer pads shorter batches with -100, in predictions as in labels
        seen = labels != IGNORED
        references = [names[tag] for tag in (labels[seen] if true is None else true[row])]
        answers = [names[tag] for tag in found[seen]]
        yield references, answers + [OUTSIDE] * (len(references) - len(answers))


def _hits(references: _Tags, answers: _Tags) -> int:
    """Number of words with the right tag."""
    return sum(reference == answer for reference, answer in zip(references, answers, strict=True))


def _scores(task: Task, pairs: Sequence[tuple[_Tags, _Tags]], own: dict[str, Any]) -> dict[str, float]:
    """Metrics of the task from true and predicted tags; `own` are the user's."""
    found: dict[str, float] = {}
    if _scores_entities(task):
        counts = [entity_counts(*pair) for pair in pairs]
        scores = entity_scores(*(sum(values) for values in zip(*counts, strict=True)))
        found = {name: score for name, score in scores.items() if name in task.metrics}
    if "token_accuracy" in task.metrics:
        found["token_accuracy"] = sum(_hits(*pair) for pair in pairs) / sum(len(tags) for tags, _ in pairs)
    for name, metric in own.items():
        references, answers = (list(tags) for tags in zip(*pairs, strict=True))
        found |= plain_results(name, metric.compute(predictions=answers, references=references))
    return found


def _scores_entities(task: Task) -> bool:
    return bool(set(task.metrics) & set(ENTITY_SCORES))


def _entity_records(text: str, words: Sequence[Word], tags: _Tags, scores: Sequence[float]) -> list[dict[str, Any]]:
    """Records of the entities that tags make of words."""
    found = []
    for label, first, last in entities(tags):
        inside, start, end = scores[first : last + 1], words[first].start, words[last].end
        score = sum(inside) / len(inside)
        found.append({"label": label, "score": score, "text": text[start:end], "start": start, "end": end})
    return found


def _holds_lists(column: ColumnProfile) -> bool:
    """Test for lists of texts or numbers, as many in each row as there are words."""
    return column.type == "list" and column.entries is not None and column.entries.type in ("text", "number")


def _holds_spans(column: ColumnProfile) -> bool:
    entries = column.entries if column.type == "list" else None
    return entries is not None and {"start", "end", "label"} <= set(entries.keys)
