"""Point cloud classification: one cloud of points in space to one of several labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from peft_lab.data.classification_kind import ClassificationKind
from peft_lab.data.point_inputs import PointCollator, PointInputs, check_options
from peft_lab.data.profile import ColumnProfile, DataProfile, Proposal, is_number
from peft_lab.registry import KindInfo
from peft_lab.utils.point_clouds import CLOUD_ENDINGS

if TYPE_CHECKING:
    from datasets import Dataset

    from peft_lab.data.task_schema import Task

#: Usual names of the columns.
_CLOUDS = ("points", "point_cloud", "cloud", "xyz", "pos", "file", "file_name", "path")
_LABELS = ("label", "labels", "class", "category", "object", "shape", "type", "target")

KIND = KindInfo(
    name="point_cloud_classification",
    title="one point cloud -> label",
    runtime="PointCloudClassification",
    columns={"points": True, "label": True},
    settings=("labels", "image_size"),
    options={"num_points": 1024, "random_rotation": 0.0, "up_axis": "y"},
    metrics=("accuracy", "f1", "matthews_correlation", "ece"),
)


class PointCloudClassification(ClassificationKind):
    """`points` -> `label`; AutoModelForImageClassification.

    A method that draws its own pictures of points is given the points; a model without one sees their depth.
    """

    info = KIND
    inputs = PointInputs()

    def check(self, task: Task) -> None:
        check_options(task)

    def adapter_settings(self, processor: Any, task: Task, labels: Sequence[str] | None) -> dict[str, Any]:
        return super().adapter_settings(processor, task, labels) | {"up_axis": task.options["up_axis"]}

    def evaluation_rows(self, rows: Dataset, processor: Any, task: Task) -> Dataset:
        return self.inputs.evaluation_rows(rows, processor, task)

    def data_collator(self, processor: Any, task: Task, model: Any) -> PointCollator:
        return PointCollator(processor, task)

    def propose(self, profile: DataProfile) -> Proposal | None:
        cloud = profile.find("points", _CLOUDS, _holds_clouds)
        label = profile.find("label", _LABELS, lambda column: column.holds_classes)
        if cloud is None or label is None or cloud.name == label.name:
            return None
        columns = {"points": cloud.name, "label": label.name}
        usual = "label" in profile.given or label.name.lower() in _LABELS
        return Proposal(
            self.name,
            0.9 if usual else 0.6,
            columns,
            settings=_fewer_points([row[cloud.name] for row in profile.rows]),
            metrics=KIND.metrics[:2],
            doubts=tuple(label.class_doubts()),
        )


def _fewer_points(cells: Sequence[Any]) -> dict[str, int]:
    """Setting of the number of points, a power of two, where a cloud of the data has fewer than the default."""
    counts = [len(cell.splitlines()) if isinstance(cell, str) else len(cell) for cell in cells if cell]
    inline = [count for count in counts if count > 1]
    most = min(inline, default=KIND.options["num_points"])
    return {"num_points": 2 ** int(math.log2(most))} if most < KIND.options["num_points"] else {}


def _holds_clouds(column: ColumnProfile) -> bool:
    """Test whether a column holds lists of x y z, texts of such lines, or names of files of clouds."""
    entries = column.entries
    if column.type == "list":
        numbers = entries.entries if entries is not None and entries.mean_length == 3 else None
        return numbers is not None and numbers.type == "number"
    return column.type == "text" and all(_is_cloud(str(value)) for value in column.examples)


def _is_cloud(text: str) -> bool:
    if text.lower().endswith(CLOUD_ENDINGS):
        return True
    first = text.strip().splitlines()[:1]
    return "\n" in text.strip() and len(first[0].split()) == 3 and all(map(is_number, first[0].split()))
