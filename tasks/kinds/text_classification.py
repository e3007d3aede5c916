"""Text classification and regression, of one text or a pair of texts."""

from __future__ import annotations

from itertools import combinations

from peft_lab.data.classification_kind import ClassificationKind
from peft_lab.data.profile import ColumnProfile, DataProfile, Proposal
from peft_lab.data.text_inputs import TextInputs
from peft_lab.registry import KindInfo

#: Usual names of the columns, and of pairs of texts.
_TEXTS = ("text", "sentence", "review", "content", "utterance", "comment", "tweet", "question", "body", "description")
_LABELS = ("label", "labels", "class", "category", "intent", "topic", "sentiment", "type", "target", "gold", "y")
_NUMBERS = ("score", "label", "rating", "similarity", "value", "target", "price", "stars")
_PAIRS = (
    *(("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("text1", "text2")),
    *(("text_a", "text_b"), ("text", "text_pair"), ("question", "sentence"), ("query", "passage")),
)

KIND = KindInfo(
    name="text_classification",
    title="one text or a pair -> label or number",
    runtime="TextClassification",
    columns={"text": True, "text_pair": False, "label": True},
    settings=("labels", "problem_type", "max_length"),
    metrics=("accuracy", "f1", "matthews_correlation", "ece"),
    regression_metrics=("pearsonr", "spearmanr", "mae", "rmse", "r2"),
    task_type="SEQ_CLS",
    pipeline_tag="text-classification",
)


class TextClassification(ClassificationKind):
    """`text` or `text` + `text_pair` -> `label`; AutoModelForSequenceClassification."""

    info = KIND
    inputs = TextInputs()

    def propose(self, profile: DataProfile) -> Proposal | None:
        label = _label(profile)
        if label is None:
            return None
        first, second = _pair(profile)
        text = profile.longest_text("text", (first, *_TEXTS) if first else _TEXTS, [label.name])
        if text is None:
            return None
        columns = {"text": text.name, "label": label.name}
        if second and second not in columns.values():
            columns = {"text": text.name, "text_pair": second, "label": label.name}
        if label.type == "number" and not label.holds_classes:
            return Proposal(self.name, 0.6, columns, {"problem_type": "regression"}, KIND.regression_metrics)
        usual = "label" in profile.given or label.name.lower() in _LABELS
        # a text beside an image or a sound is most often its caption or its source
        if any(column.type in ("image", "audio") for column in profile.columns.values()):
            return Proposal(self.name, 0.3, columns, metrics=KIND.metrics[:2])
        return Proposal(
            self.name, 0.9 if usual else 0.6, columns, metrics=KIND.metrics[:2], doubts=tuple(label.class_doubts())
        )


def _label(profile: DataProfile) -> ColumnProfile | None:
    """Column of the labels: the one that the user named, else one of classes, else a usual one of numbers."""
    if "label" in profile.given:
        return profile.find("label", (), lambda column: column.type in ("text", "boolean", "number"))
    classes = profile.classes("label", _LABELS)
    number = profile.named("label", _NUMBERS, lambda column: column.is_fractional)
    # a column that is called score goes before one of classes that is called otherwise
    return number if number and (classes is None or classes.name.lower() not in _LABELS) else classes


def _pair(profile: DataProfile) -> tuple[str | None, str | None]:
    """Columns of two texts: those that the user named, or with usual names of a pair."""
    if "text_pair" in profile.given:
        return profile.given.get("text"), profile.given["text_pair"]
    texts = [name for name, column in profile.columns.items() if column.type == "text"]
    known = {name.lower(): name for name in texts}
    pair = next((pair for pair in _PAIRS if known.keys() >= set(pair)), None)
    if pair is None:
        pair = next((pair for pair in combinations(known, 2) if _numbered_pair(*pair)), None)
    if pair is None or known[pair[0]] != profile.given.get("text", known[pair[0]]):
        return None, None
    return pair[0], known[pair[1]]


def _numbered_pair(first: str, second: str) -> bool:
    """Test whether two names differ in one character alone, 1 and 2 or a and b."""
    differing = [pair for pair in zip(first, second, strict=False) if pair[0] != pair[1]]
    return len(first) == len(second) and differing in ([("1", "2")], [("a", "b")])
