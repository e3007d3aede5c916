"""Point clouds as the inputs of a model, or of an image model by pictures of their depth."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from peft_lab.data.file_column import as_files, file_states, is_missing
from peft_lab.data.image_inputs import ImageInputs
from peft_lab.data.row_checks import RowFault, check_inputs
from peft_lab.data.row_maps import map_rows
from peft_lab.errors import TaskError
from peft_lab.utils.mappings import without
from peft_lab.utils.point_clouds import (
    CLOUD_ENDINGS,
    depth_picture,
    farthest_points,
    is_inline,
    open_cloud,
    turned,
    unit_sphere,
)

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

    from peft_lab.data.task_schema import Task

#: Keys of a task file: points of a cloud, degrees of a turn in training, and the axis that points upwards.
OPTIONS = ("num_points", "random_rotation", "up_axis")
#: Argument of the forward of a model that reads points, and of one that reads images.
POINTS, PICTURES = "point_clouds", "pixel_values"
#: Points that training draws from, by the points that a model gets: 4800 for 4096 in P2P (arXiv:2208.02812).
_SPARE = 75 / 64
#: Key of a row whose points are drawn when it is joined with others.
_DRAWN = "is_drawn"
#: Raise it when the same cloud is read otherwise, because what was found in it is kept.
_VERSION = 1
#: Turn and tilt of a plain picture, in radians: from the front, a little from the side and from above.
_AROUND, _TOWARDS = math.radians(-30), math.radians(20)
#: Side of a plain picture whose image processor names none.
_SIDE = 224


class PointInputs(ImageInputs):
    """Column `points`; an image processor.

    A model whose forward takes `point_clouds` gets them, float32 (batch, points, 3), and any other a picture of each.
    Clouds are centred and scaled to the unit sphere, and thinned to `num_points` by farthest point sampling. Training
    draws these from a few more and may turn them; an evaluation always takes the same. A kind that has such inputs
    names the keys of `OPTIONS` in the `options` of its card.
    """

    columns = ("points",)
    files = CLOUD_ENDINGS
    pipeline_tag = ""

    def cast(self, dataset: Dataset, task: Task) -> Dataset:
        from datasets import Value

        feature = dataset.features["points"]
        if not isinstance(feature, Value):
            return dataset
        first = next((text for text in dataset["points"][:] if isinstance(text, str) and text.strip()), "")
        return dataset if first and is_inline(first) else as_files(dataset, task, "points", "point clouds", "parquet")

    def row_faults(self, dataset: Dataset, task: Task) -> list[RowFault]:
        traits = map_rows(
            dataset.select_columns(["points"]),
            _row_traits,
            [_VERSION, _states(dataset)],
            remove_columns=["points"],
            desc="Reading point clouds",
        )
        return _faults(list(traits), task)

    def preprocess(self, dataset: Dataset, processor: Any, task: Task, model: Any) -> Dataset:
        count, reads = task.options["num_points"], [_VERSION, task.options["num_points"], _states(dataset)]
        name = POINTS if reads_points(model) else PICTURES

        def sample(row: Mapping[str, Any]) -> dict[str, Any]:
            return {name: _sample(open_cloud(row["points"]), count)}

        found = map_rows(dataset, sample, [*reads, name], remove_columns=["points"], desc="Sampling point clouds")
        return found.with_transform(partial(_candidates, count=None))

    def evaluation_rows(self, rows: Dataset, processor: Any, task: Task) -> Dataset:
        """Preprocessed rows of which an evaluation always takes the same points."""
        return rows.with_transform(partial(_candidates, count=task.options["num_points"]))

    def encoder(self, inputs: Sequence[Any], processor: Any, task: Task, model: Any) -> Callable[[Sequence[int]], Any]:
        """Check paths, open files, arrays or nested lists (points, 3), and encode them."""
        clouds = [open_cloud(value) for value in inputs]
        check_inputs(task, _faults([_traits(cloud) for cloud in clouds], task))
        name, count = POINTS if reads_points(model) else PICTURES, task.options["num_points"]
        collate = PointCollator(processor, task)

        def encode(rows: Sequence[int]) -> Any:
            from transformers import BatchFeature

            return BatchFeature(collate([{name: _sample(clouds[row], count)[:count]} for row in rows]))

        return encode


def reads_points(model: Any) -> bool:
    """Test whether a model's forward takes `point_clouds`, as an adapter may declare it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    forward = getattr(base, "forward", None)
    return forward is not None and POINTS in inspect.signature(forward).parameters


def check_options(task: Task) -> None:
    """Raise `TaskError` for options of a task that are out of range."""
    count, angle, axis = (task.options[name] for name in OPTIONS)
    if count < 1:
        raise TaskError(f'"num_points" must be at least 1, got {count}.')
    if not 0 <= angle <= 180:
        raise TaskError(f'"random_rotation" is an angle from 0 to 180 degrees, got {angle:g}.')
    if axis not in ("x", "y", "z"):
        raise TaskError(f'"up_axis" must be x, y or z, got "{axis}".')


def _states(dataset: Dataset) -> list[Any]:
    """State of the files of the clouds, where the column holds names of them."""
    feature: Any = dataset.features["points"]
    return file_states(dataset, ["points"]) if hasattr(feature, "keys") and {*feature} == {"bytes", "path"} else []


def _row_traits(row: Mapping[str, Any]) -> dict[str, Any]:
    value = row["points"]
    missing = is_missing(value) if isinstance(value, Mapping) else value is None or value == ""
    none = {"error": "", "points": -1, "finite": True, "extent": 0.0}
    if missing:
        return none
    try:
        return _traits(open_cloud(value))
    except TaskError as error:
        return {**none, "error": str(error).rstrip(".")}


def _traits(cloud: np.ndarray) -> dict[str, Any]:
    import numpy as np

    finite = bool(np.isfinite(cloud).all())
    extent = float(np.ptp(cloud, axis=0).max()) if finite and len(cloud) else 0.0
    return {"error": "", "points": len(cloud), "finite": finite, "extent": extent}


def _faults(traits: Sequence[Mapping[str, Any]], task: Task) -> list[RowFault]:
    """Rows whose cloud is missing, damaged, too small, not finite or one point many times."""
    count = task.options["num_points"]
    unreadable = [row for row, found in enumerate(traits) if found["error"]]
    missing = [row for row, found in enumerate(traits) if found["points"] < 0 and not found["error"]]
    read = [(row, found) for row, found in enumerate(traits) if found["points"] >= 0]
    first = f": {traits[unreadable[0]]['error']}" if unreadable else ""
    few, whole = f'have fewer points than the {count} of "num_points"', [row for row in read if row[1]["finite"]]
    return [
        RowFault("have no point cloud", missing),
        RowFault(f"have a point cloud that is not to be used{first}", unreadable),
        RowFault(few, [row for row, found in read if found["points"] < count]),
        RowFault("have points that are no finite numbers", [row for row, found in read if not found["finite"]]),
        RowFault(
            "have all points at one place", [row for row, found in whole if found["points"] and not found["extent"]]
        ),
    ]


def _sample(cloud: np.ndarray, count: int) -> np.ndarray:
    """Points that are drawn from, on the unit sphere, in the order of farthest point sampling."""
    points = unit_sphere(cloud)
    return points[farthest_points(points, round(count * _SPARE))]


def _candidates(batch: dict[str, Any], count: int | None) -> dict[str, Any]:
    """Rows with their sampled points as arrays: the first `count`, or all of them and the mark of a draw."""
    import numpy as np

    name = POINTS if POINTS in batch else PICTURES
    # a read of the labels alone comes through here without points
    if name not in batch:
        return batch
    clouds = [np.asarray(points, dtype=np.float32)[:count] for points in batch[name]]
    return {**batch, name: clouds} | ({_DRAWN: [True] * len(clouds)} if count is None else {})


class PointCollator:
    """Join rows into a batch: draw and turn the points of training rows, and draw pictures where a model wants them.

    The draws follow from the run's seed, the epoch and the points of a row, so that a resumed run draws as one that was
    not broken off.

    Attributes:
        processor: image processor.
        task: that of the rows.
        seed: seed of the run, by default the one that torch was seeded with.
    """

    def __init__(self, processor: Any, task: Task, seed: int | None = None) -> None:
        import torch

        self.processor, self.task = processor, task
        self.seed = torch.initial_seed() if seed is None else seed
        # in shared memory, because worker processes that live on for the next epoch hold a copy of the collator
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch begins, so that its draws are others."""
        self._epoch.fill_(epoch)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Batch with `point_clouds` (rows, points, 3) or `pixel_values`, float32, and the other columns of the rows."""
        import numpy as np
        import torch
        from transformers import default_data_collator

        name = POINTS if POINTS in rows[0] else PICTURES
        others = [without(row, name, _DRAWN) for row in rows]
        batch = default_data_collator(others) if others[0] else {}
        clouds = [self._drawn(row[name]) if row.get(_DRAWN) else row[name] for row in rows]
        if name == PICTURES:
            pictures = [_picture(points, self.processor, self.task) for points in clouds]
            return {**batch, name: self.processor(pictures, return_tensors="pt")[name]}
        return {**batch, name: torch.from_numpy(np.stack(clouds))}

    def _drawn(self, points: np.ndarray) -> np.ndarray:
        """Points at random, turned at random about the up axis."""
        import numpy as np

        digest = hashlib.blake2b(points.tobytes(), digest_size=8).digest()
        draw = np.random.default_rng([self.seed % 2**63, int(self._epoch), int.from_bytes(digest, "big")])
        chosen = points[draw.permutation(len(points))[: self.task.options["num_points"]]]
        angle = math.radians(self.task.options["random_rotation"])
        return _turned_back(chosen, self.task.options["up_axis"], draw.uniform(-angle, angle)) if angle else chosen


def _turned_back(points: np.ndarray, up: str, angle: float) -> np.ndarray:
    """Points turned about the up axis, in their own axes."""
    import numpy as np

    return np.roll(turned(points, up, angle), "xyz".index(up) - 1, axis=1)


def _picture(points: np.ndarray, processor: Any, task: Task) -> Any:
    """Picture of the depth of a cloud, of the side that the image processor makes."""
    from PIL import Image

    size = dict(getattr(processor, "size", None) or {})
    side = size.get("height") or size.get("shortest_edge") or _SIDE
    view = turned(points, task.options["up_axis"], _AROUND, _TOWARDS)
    return Image.fromarray(depth_picture(view, int(side))).convert("RGB")
