"""Text classification and regression, of one text or a pair of texts."""

from __future__ import annotations

from peft_lab.data.classification_kind import ClassificationKind
from peft_lab.data.profile import ColumnProfile, DataProfile, Proposal
from peft_lab.data.text_inputs import TextInputs
from peft_lab.data.usual_columns import LABELS, has_files, text_columns
from peft_lab.registry import KindInfo

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
        texts = text_columns(profile, [label.name]) if label else {}
        if label is None or not texts:
            return None
        columns = {**texts, "label": label.name}
        if has_files(profile):
            return Proposal(self.name, 0.3, columns, metrics=KIND.metrics[:2])
        usual = "label" in profile.given or label.name.lower() in LABELS
        confidence = 0.9 if usual else 0.6
        return Proposal(self.name, confidence, columns, metrics=KIND.metrics[:2], doubts=tuple(label.class_doubts()))


def _label(profile: DataProfile) -> ColumnProfile | None:
    """Column of the labels: the one that the user named, else one of classes."""
    if "label" not in profile.given:
        return profile.classes("label", LABELS)
    # a named column of texts is one of classes, however many there are
    return profile.find("label", (), lambda column: column.holds_classes or column.type in ("text", "boolean"))
