"""Text classification and regression, of one text or a pair of texts."""

from __future__ import annotations

from peft_lab.data.classification_kind import ClassificationKind
from peft_lab.data.text_inputs import TextInputs
from peft_lab.registry import KindInfo

KIND = KindInfo(
    name="text_classification",
    title="one text or a pair -> label or number",
    runtime="TextClassification",
    columns={"text": True, "text_pair": False, "label": True},
    settings=("labels", "problem_type", "max_length"),
    metrics=("accuracy", "f1", "matthews_correlation", "ece"),
    regression_metrics=("pearsonr", "spearmanr"),
    task_type="SEQ_CLS",
    pipeline_tag="text-classification",
)


class TextClassification(ClassificationKind):
    """`text` or `text` + `text_pair` -> `label`; AutoModelForSequenceClassification."""

    info = KIND
    inputs = TextInputs()
