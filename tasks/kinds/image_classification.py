"""Image classification: one image to one of several labels."""

from __future__ import annotations

from peft_lab.data.classification_kind import ClassificationKind
from peft_lab.data.image_inputs import ImageInputs
from peft_lab.registry import KindInfo

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
