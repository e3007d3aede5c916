"""Image classification: one image to one of several labels."""

from __future__ import annotations

from peft_lab.data.classification_kind import ClassificationKind
from peft_lab.data.image_inputs import ImageInputs
from peft_lab.data.profile import DataProfile, Proposal
from peft_lab.data.usual_columns import image_column
from peft_lab.registry import KindInfo

#: Usual names of the columns.
_LABELS = ("label", "labels", "class", "category", "fine_label", "target", "species")

KIND = KindInfo(
    name="image_classification",
    title="one image -> label",
    runtime="ImageClassification",
    columns={"image": True, "label": True},
    settings=("labels", "image_size"),
    metrics=("accuracy", "f1", "matthews_correlation", "ece"),
    pipeline_tag="image-classification",
)


class ImageClassification(ClassificationKind):
    """`image` -> `label`; AutoModelForImageClassification."""

    info = KIND
    inputs = ImageInputs()

    def propose(self, profile: DataProfile) -> Proposal | None:
        image = image_column(profile)
        label = profile.classes("label", _LABELS)
        if not image or label is None:
            return None
        columns = {**image, "label": label.name}
        usual = "label" in profile.given or label.name.lower() in _LABELS
        return Proposal(
            self.name, 0.9 if usual else 0.6, columns, metrics=KIND.metrics[:2], doubts=tuple(label.class_doubts())
        )
