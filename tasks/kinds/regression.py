"""Regression: a text, a pair of texts or an image to a number."""

from __future__ import annotations

from peft_lab.data.classification_kind import ClassificationKind
from peft_lab.data.text_or_image import TextOrImageKind
from peft_lab.registry import KindInfo

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
