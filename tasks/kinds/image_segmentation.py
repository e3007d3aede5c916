"""Semantic segmentation: one image to a class for each of its pixels."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from peft_lab.data.classification_kind import LabelledKind
from peft_lab.data.file_column import as_files
from peft_lab.data.mask_column import beyond_classes, classes_in, mask_faults, mask_traits, read_mask
from peft_lab.data.profile import DataProfile, Proposal
from peft_lab.data.row_checks import RowFault
from peft_lab.data.segmentation_inputs import SegmentationInputs, processed_size, resized_mask
from peft_lab.errors import TaskError
from peft_lab.metrics.baselines import Baseline
from peft_lab.metrics.predictions import Predictions
from peft_lab.metrics.segmentation import IGNORED, mean_iou_by_row, mean_iou_of, pixel_accuracy_of
from peft_lab.registry import KindInfo

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from transformers import EvalPrediction, PreTrainedModel

    from peft_lab.data.task_schema import Task

#: Training masks of which the baseline takes the most frequent class.
_BASELINE_ROWS = 1000
#: Masks that are read at a time.
_BATCH = 64
#: Usual names of the columns.
_IMAGES = ("image", "img", "pixel_values", "photo")
_MASKS = ("mask", "label", "annotation", "segmentation", "labels", "semantic_mask", "gt")
#: Metric of the pixels of all masks, by name.
_METRICS: dict[str, Callable[[Any], float]] = {"mean_iou": mean_iou_of, "pixel_accuracy": pixel_accuracy_of}
#: Settings of the heads of transformers that say which value does not count.
_IGNORING = ("semantic_loss_ignore_index", "loss_ignore_index")

KIND = KindInfo(
    name="image_segmentation",
    title="one image -> class of each pixel",
    runtime="ImageSegmentation",
    columns={"image": True, "mask": True},
    answers=("mask",),
    settings=("labels", "image_size"),
    options={"reduce_labels": False},
    metrics=("mean_iou", "pixel_accuracy"),
    pipeline_tag="image-segmentation",
)


class ImageSegmentation(LabelledKind):
    """`image` -> `mask`; AutoModelForSemanticSegmentation, or a linear head over the patches of other backbones.

    Masks are images whose grey values or palette indices are classes; 255 does not count. Images and masks are
    stretched to the size that the model reads, masks by the nearest pixel, and scored at that size.
    """

    info = KIND
    inputs = SegmentationInputs()
    keeps_labels = False
    answer_images = ("mask",)

    def check(self, task: Task) -> None:
        unfit = [name for name in task.metrics if name not in KIND.metrics]
        if unfit:
            known = ", ".join(KIND.metrics)
            raise TaskError(f'metric "{unfit[0]}" does not fit this kind of task; fitting: {known}.')

    def propose(self, profile: DataProfile) -> Proposal | None:
        mask = profile.named("mask", _MASKS, lambda column: column.type == "image")
        image = profile.find("image", _IMAGES, lambda column: column.type == "image", [mask.name if mask else None])
        if image is None or mask is None:
            return None
        doubts = (
            f'the values in the masks of "{mask.name}" are taken for classes: name them in "labels"',
            'set "reduce_labels: true" if 0 means no class',
        )
        return Proposal(self.name, 0.9, {"image": image.name, "mask": mask.name}, metrics=KIND.metrics, doubts=doubts)

    # Rows -----------------------------------------------------------------------------------------------------------

    def cast(self, dataset: Dataset, task: Task) -> Dataset:
        return as_files(super().cast(dataset, task), task, "mask", "masks", "maskfolder")

    def row_faults(self, dataset: Dataset, task: Task) -> list[RowFault]:
        traits = mask_traits(dataset, _reduced(task))
        return [*super().row_faults(dataset, task), *mask_faults(traits, len(task.labels) or None)]

    def class_names(self, task: Task, train: Dataset, skip: Collection[int] = ()) -> tuple[str, ...]:
        """Names of the task, else the values of the training masks as texts, from 0 to the largest one."""
        traits = mask_traits(train, _reduced(task))
        found = classes_in([each for row, each in enumerate(traits) if row not in skip])
        if len(found) < 2:
            raise TaskError(
                f'Task "{task.name}": the training masks hold no other class than {found[0] if found else "none"}; '
                f"{IGNORED} means a pixel that does not count, so give a class another value, such as 1."
            )
        return task.labels or tuple(str(value) for value in range(found[-1] + 1))

    def encode_labels(
        self, task: Task, split: str, dataset: Dataset, labels: tuple[str, ...] | None, skip: Collection[int]
    ) -> Dataset:
        """The rows as they are: masks hold numbers of classes.

        Raises `TaskError` for a value that is none.
        """
        classes = len(labels or ())
        for row, found in enumerate(mask_traits(dataset, _reduced(task))):
            if row not in skip and beyond_classes(found, classes):
                raise TaskError(
                    f'Task "{task.name}": the mask "{found["name"]}" of the {split} rows (row {row + 1}) holds the '
                    f"value {beyond_classes(found, classes)[0]}, and the training rows have the classes 0 to "
                    f'{classes - 1}; name all classes in "labels".'
                )
        return dataset

    def preprocess(self, dataset: Dataset, processor: Any, task: Task, model: Any) -> Dataset:
        height, width = processed_size(processor)
        reduced = _reduced(task)
        # names of the model's forward, so that Trainer leaves the columns in place for the transform
        dataset = dataset.rename_columns({"image": "pixel_values", "mask": "labels"})

        def transform(batch: dict[str, list[Any]]) -> dict[str, Any]:
            import torch

            # a read of the masks alone comes through here without images
            if "pixel_values" in batch:
                batch["pixel_values"] = processor(batch["pixel_values"], return_tensors="pt")["pixel_values"]
            if "labels" in batch:
                masks = [resized_mask(read_mask(value, reduced), height, width) for value in batch["labels"]]
                batch["labels"] = [torch.tensor(mask, dtype=torch.int64) for mask in masks]
            return batch

        return dataset.with_transform(transform)

    # Models ---------------------------------------------------------------------------------------------------------

    def backbone_class(self, model_name_or_path: str, task: Task, **hub_kwargs: Any) -> Any:
        from peft_lab.backbones.token_segmenter import segmenter_class

        return segmenter_class(model_name_or_path, **hub_kwargs)

    def load_model(
        self, model_name_or_path: str, task: Task, labels: Sequence[str] | None, **hub_kwargs: Any
    ) -> PreTrainedModel:
        model = super().load_model(model_name_or_path, task, labels, **hub_kwargs)
        for name in _IGNORING:
            if hasattr(model.config, name):
                setattr(model.config, name, IGNORED)
        return model

    def load_classifier(self, model_name_or_path: str, task: Task, **hub_kwargs: Any) -> PreTrainedModel:
        # that of the images would look for an image classifier
        from peft_lab.data.kind import Kind

        return Kind.load_classifier(self, model_name_or_path, task, **hub_kwargs)

    @staticmethod
    def preprocess_logits_for_metrics(logits: Any, labels: Any) -> Any:
        """Counts of pixels of each row, int64 (n, 3, classes): right, predicted and labelled ones.

        `logits` have the shape (n, classes, height, width), at any size, and `labels` (n, height, width).
        """
        import torch
        from torch.nn import functional

        # Trainer hands on a tuple where a model returns more than logits
        logits = logits[0] if isinstance(logits, tuple) else logits
        classes, found = logits.shape[1], []
        # row by row, because logits of a whole batch at the size of the masks are large
        for row, wanted in zip(logits, labels, strict=True):
            enlarged = functional.interpolate(row[None].float(), size=wanted.shape, mode="bilinear")[0]
            counted = wanted != IGNORED
            predicted, wanted = enlarged.argmax(0)[counted], wanted[counted]
            parts = (predicted[predicted == wanted], predicted, wanted)
            found.append(torch.stack([torch.bincount(part, minlength=classes) for part in parts]))
        return torch.stack(found)

    # Scores ---------------------------------------------------------------------------------------------------------

    def compute_metrics(
        self, task: Task, labels: Sequence[str] | None, rows: Dataset | None = None
    ) -> Callable[[EvalPrediction], dict[str, float]]:
        def compute(prediction: EvalPrediction) -> dict[str, float]:
            counts: Any = prediction.predictions
            return {name: _METRICS[name](counts.sum(0)) for name in task.metrics}

        return compute

    def row_predictions(self, prediction: EvalPrediction, task: Task, rows: Dataset | None = None) -> Predictions:
        counts: Any = prediction.predictions
        columns = {
            "hits": counts[:, 0].sum(1),
            "pixels": counts[:, 2].sum(1),
            "mean_iou": mean_iou_by_row(counts),
        }
        return Predictions(self.name, columns)

    def smooths_labels(self, task: Task) -> bool:
        # the logits of most heads are smaller than the masks
        return False

    def baseline(self, task: Task, labels: Sequence[str] | None, train: Dataset, rows: Dataset) -> Baseline:
        """Scores of the most frequent class, everywhere."""
        import numpy as np

        classes = len(labels or ())
        step = -(-len(train) // _BASELINE_ROWS)
        known = sum(_pixels(train.select(range(0, len(train), step)), classes))
        wanted: Any = sum(_pixels(rows, classes))
        best = int(np.argmax(known))
        found = np.zeros_like(wanted)
        found[best] = wanted.sum()
        counts = np.stack([np.where(np.arange(classes) == best, wanted, 0), found, wanted])
        scores = {name: _METRICS[name](counts) for name in task.metrics}
        return Baseline("the most frequent class of the training pixels", scores)

    def predict(
        self, model: Any, processor: Any, inputs: Sequence[Any], task: Task, batch_size: int = 32
    ) -> list[dict[str, Any]]:
        """Mask of each image and the share of its pixels that each class has.

        Returns:
            `mask`, a PIL image of the size of the image whose palette indices are classes, and `shares`, label -> share
            of the classes in it, the largest first.
        """
        import torch
        from torch.nn import functional

        from peft_lab.utils.images import open_image

        inputs, size = list(inputs), processed_size(processor)
        encode = self.inputs.encoder(inputs, processor, task, model)
        found: list[dict[str, Any]] = []
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                for start in range(0, len(inputs), batch_size):
                    rows = range(start, min(start + batch_size, len(inputs)))
                    logits = model(**encode(rows).to(model.device)).logits
                    for row, each in zip(rows, logits, strict=True):
                        # as it is scored; the size of the image is the nearest pixel's
                        enlarged = functional.interpolate(each[None].float(), size=size, mode="bilinear")[0]
                        width, height = open_image(inputs[row]).size
                        mask = resized_mask(enlarged.argmax(0).byte().cpu().numpy(), height, width)
                        found.append(_record(mask, model.config.id2label))
        finally:
            model.train(training)
        return found


def _reduced(task: Task) -> bool:
    return bool(task.options["reduce_labels"])


def _pixels(rows: Dataset, classes: int) -> Iterator[np.ndarray]:
    """Pixels of each class in preprocessed masks, (classes,), mask by mask."""
    import numpy as np

    for batch in rows.select_columns(["labels"]).iter(batch_size=_BATCH):
        for mask in batch["labels"]:
            labelled = mask[mask != IGNORED].numpy()
            yield np.bincount(labelled, minlength=classes)


def _record(mask: np.ndarray, names: dict[int, str]) -> dict[str, Any]:
    import numpy as np
    from PIL import Image

    pixels = np.bincount(mask.reshape(-1), minlength=len(names)) / mask.size
    order = [int(index) for index in np.argsort(-pixels, kind="stable") if pixels[index]]
    image = Image.fromarray(mask)
    image.putpalette(_palette())
    return {"shares": {names[index]: float(pixels[index]) for index in order}, "mask": image}


def _palette() -> list[int]:
    """Colours of 256 classes, those of PASCAL VOC: the bits of a class spread over red, green and blue."""
    colours = []
    for index in range(256):
        colour = [0, 0, 0]
        for bit in range(8):
            colour[bit % 3] |= (index >> bit & 1) << (7 - bit // 3)
        colours += colour
    return colours
