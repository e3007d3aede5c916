"""Regression: a text, a pair of texts or an image to a number."""

from __future__ import annotations

from peft_lab.data.classification_kind import ClassificationKind
from peft_lab.data.profile import DataProfile, Proposal
from peft_lab.data.text_or_image import TextOrImageKind
from peft_lab.data.usual_columns import text_or_image_columns
from peft_lab.registry import KindInfo

#: Usual names of the column of numbers, and so many whole numbers that they may be classes and nothing else.
_NUMBERS = ("label", "score", "rating", "similarity", "value", "target", "price", "stars", "age", "y")
_MOST_CLASSES = 10

KIND = KindInfo(
    name="regression",
    title="text, pair of texts or image -> number",
    runtime="Regression",
    columns={"text": False, "text_pair": False, "image": False, "label": True},
    one_of=("text", "image"),
    settings=("max_length", "image_size"),
    problem_type="regression",
    regression_metrics=("pearsonr", "spearmanr", "mae", "rmse", "r2"),
    task_type="SEQ_CLS",
    pipeline_tag="text-classification",
)


class Regression(TextOrImageKind, ClassificationKind):
    """`text`, `text` + `text_pair` or `image` -> the number in `label`; a head of one output.

    Loaded by AutoModelForSequenceClassification or AutoModelForImageClassification.
    """

    info = KIND

    def propose(self, profile: DataProfile) -> Proposal | None:
        number = profile.named("label", _NUMBERS, lambda column: column.type == "number")
        inputs = text_or_image_columns(profile, [number.name]) if number else {}
        if number is None or not inputs or (number.holds_classes and number.distinct <= _MOST_CLASSES):
            return None
        # whole numbers that rows share may be classes
        confidence = 0.3 if number.holds_classes else 0.9 if number.is_fractional or profile.given else 0.6
        return Proposal(self.name, confidence, {**inputs, "label": number.name}, metrics=KIND.regression_metrics[:2])
