"""Images as the inputs of a model: RGB, decoded and resized when they are used."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from peft_lab.backbones.from_pretrained import load_checkpoint
from peft_lab.data.model_inputs import ModelInputs
from peft_lab.data.row_checks import RowFault, check_inputs
from peft_lab.errors import ConfigError, TaskError
from peft_lab.utils.images import image_traits, open_image

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedModel

    from peft_lab.data.task_schema import Task

logger = logging.getLogger("peft_lab")


class ImageInputs(ModelInputs):
    """Column `image`; an image processor."""

    columns = ("image",)
    files: tuple[str, ...] = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
    pipeline_tag = "image-classification"

    def auto_class(self) -> Any:
        from transformers import AutoModelForImageClassification

        return AutoModelForImageClassification

    def cast(self, dataset: Dataset, task: Task) -> Dataset:
        from datasets import Value

        from peft_lab.data.image_column import RgbImage

        feature = dataset.features["image"]
        # datasets would cast texts too, and open them as paths to files
        if isinstance(feature, Value):
            raise TaskError(
                f'Task "{task.name}": the column "{task.columns["image"]}" holds {feature.dtype}, not images; '
                "use the builder imagefolder for image files."
            )
        # files may be grey, of 16 bits or have a palette, and backbones take three channels of 8 bits
        return dataset.cast_column("image", RgbImage())

    def row_faults(self, dataset: Dataset, task: Task) -> list[RowFault]:
        from peft_lab.data.image_column import image_faults

        return image_faults(dataset)

    def load_processor(self, model_name_or_path: str, task: Task, **hub_kwargs: Any) -> Any:
        """Image processor of a backbone.

        `image_size` of the task replaces its size if the backbone takes any size.
        """
        from transformers import AutoImageProcessor

        # one backend on every machine: torchvision resizes to slightly different pixels
        processor = AutoImageProcessor.from_pretrained(
            model_name_or_path, backend="pil", trust_remote_code=False, **hub_kwargs
        )
        if task.image_size is None:
            return processor
        if _has_fixed_grid(model_name_or_path, hub_kwargs):
            logger.warning('"%s" has a fixed grid of patches and keeps its own image size.', model_name_or_path)
            return processor
        # ConvNeXt's processor enlarges images and crops them by crop_pct, which would cut off the border
        if hasattr(processor, "crop_pct"):
            processor.size, processor.crop_pct = {"shortest_edge": task.image_size}, 1.0
        else:
            processor.size = {"height": task.image_size, "width": task.image_size}
            # a crop to the backbone's own size would follow, and change the size again
            processor.do_center_crop = False
        return processor

    def load_classifier(self, model_name_or_path: str, task: Task, **hub_kwargs: Any) -> PreTrainedModel:
        hub_kwargs.setdefault("dtype", "float32")
        model, info = load_checkpoint(
            self.auto_class(), model_name_or_path, problem_type=task.problem_type, **hub_kwargs
        )
        missing = sorted(info.get("missing_keys", ()))
        if missing:
            raise ConfigError(
                f'"{model_name_or_path}" brings no trained head ({missing[0]} is not in its weights), and the method '
                "keeps the head; choose a backbone that was trained to classify."
            )
        return model

    def check_processor(self, processor: Any, model: PreTrainedModel) -> None:
        from PIL import Image

        # models of text and images keep the size in the config of their image part
        own = getattr(getattr(model.config, "vision_config", model.config), "image_size", None)
        own = tuple(own) if isinstance(own, (list, tuple)) else (own, own)
        # a wide image too, because a processor that keeps the ratio makes another size of it
        for shape in ((64, 64), (96, 64)):
            pixels = processor([Image.new("RGB", shape)], return_tensors="pt")["pixel_values"]
            height, width = pixels.shape[-2:]
            if (height, width) != own:
                _try_size(model, pixels)

    def adapter_settings(self, processor: Any) -> dict[str, Any]:
        return _pixel_statistics(processor)

    def preprocess(self, dataset: Dataset, processor: Any, task: Task, model: Any) -> Dataset:
        # a name of the model's forward, so that Trainer leaves the column in place for the transform
        dataset = dataset.rename_column("image", "pixel_values")

        def transform(batch: dict[str, list[Any]]) -> dict[str, Any]:
            # a read of the labels alone comes through here without images
            if "pixel_values" in batch:
                batch["pixel_values"] = processor(batch["pixel_values"], return_tensors="pt")["pixel_values"]
            return batch

        # map would store the float pixels of every image
        return dataset.with_transform(transform)

    def data_collator(self, processor: Any, model: Any) -> Any:
        from transformers import DefaultDataCollator

        return DefaultDataCollator()

    def encoder(self, inputs: Sequence[Any], processor: Any, task: Task, model: Any) -> Callable[[Sequence[int]], Any]:
        """Check paths, open files or PIL images, and encode them."""
        from peft_lab.data.image_column import trait_faults

        inputs = list(inputs)
        traits: dict[str, list[int]] = {"animated": [], "transparent": []}
        for row, value in enumerate(inputs):
            for trait in image_traits(value):
                traits[trait].append(row)
        check_inputs(task, trait_faults(traits))

        def encode(rows: Sequence[int]) -> Any:
            return processor([open_image(inputs[row]) for row in rows], return_tensors="pt")

        return encode


def _pixel_statistics(processor: Any) -> dict[str, Any]:
    """Statistics of an image processor, found by using it.

    Mean and standard deviation by channel that it normalises by, in units of white, and the side of the images that it
    makes, where these are always the same square.
    """
    from PIL import Image

    # normalising is linear, so that the values of black and white give mean and deviation
    images = [Image.new("RGB", (64, 64), (level,) * 3) for level in (0, 255)]
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    black, white = pixels.flatten(2).double().quantile(0.5, dim=2)
    mean, std = -black / (white - black), 1 / (white - black)
    other = processor([Image.new("RGB", (96, 96))], return_tensors="pt")["pixel_values"]
    height, width = pixels.shape[-2:]
    fixed = height == width and other.shape[-2:] == pixels.shape[-2:]
    return {"image_mean": mean.tolist(), "image_std": std.tolist(), **({"image_size": width} if fixed else {})}


def _try_size(model: PreTrainedModel, pixels: torch.Tensor) -> None:
    """Raise `ConfigError` if a model refuses images of another size.

    Many take sizes that differ from the one in their config, so the model is tried.
    """
    import torch

    try:
        with torch.no_grad():
            model(pixel_values=pixels.to(model.device, model.dtype))
    except (ValueError, RuntimeError) as error:
        (height, width), why = pixels.shape[-2:], str(error).partition("\n")[0].rstrip(".")
        raise ConfigError(
            f'"{model.name_or_path}" takes no images of {height} x {width} pixels, as its image processor makes them '
            f"({why}); correct the size in its preprocessor_config.json."
        ) from error


def _has_fixed_grid(model_name_or_path: str, hub_kwargs: dict[str, Any]) -> bool:
    """Test whether a backbone has position embeddings for one image size.

    It refuses others unless it is told to interpolate them.
    """
    from transformers import AutoConfig, AutoModelForImageClassification

    config = AutoConfig.from_pretrained(model_name_or_path, trust_remote_code=False, **hub_kwargs)
    model_class: Any = AutoModelForImageClassification._model_mapping[type(config)]
    return "interpolate_pos_encoding" in inspect.signature(model_class.forward).parameters
