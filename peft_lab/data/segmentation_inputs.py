"""Images for segmentation: stretched to one size, so that a mask of the same size fits them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft_lab.data.file_column import as_files
from peft_lab.data.image_inputs import ImageInputs
from peft_lab.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from transformers import PreTrainedModel

    from peft_lab.data.task_schema import Task

#: What an image processor may do beside resizing, after which a mask would lie elsewhere.
_OTHER_STEPS = {"do_center_crop": False, "do_pad": False, "keep_aspect_ratio": False, "do_reduce_labels": False}
#: Least share of the pixels of a test image that lie where stretching puts them; bilinear edges take the rest.
_LEAST_SHARE = 0.95


class SegmentationInputs(ImageInputs):
    """Column `image`, also by names of files; an image processor that stretches images to one size."""

    def cast(self, dataset: Dataset, task: Task) -> Dataset:
        from peft_lab.data.image_column import RgbImage

        return as_files(dataset, task, "image", "images", "maskfolder").cast_column("image", RgbImage())

    def auto_class(self) -> Any:
        from transformers import AutoModelForSemanticSegmentation

        return AutoModelForSemanticSegmentation

    def load_processor(self, model_name_or_path: str, task: Task, **hub_kwargs: Any) -> Any:
        """Image processor of a backbone, without crops and borders."""
        processor = super().load_processor(model_name_or_path, task, **hub_kwargs)
        height, width = processed_size(processor)
        for name, value in _OTHER_STEPS.items():
            if hasattr(processor, name):
                setattr(processor, name, value)
        # ConvNeXt's processor takes a side alone, and stretches to a square from 384 pixels on
        if not hasattr(processor, "crop_pct"):
            processor.size = {"height": height, "width": width}
            processor.do_resize = True
        return processor

    def check_processor(self, processor: Any, model: PreTrainedModel) -> None:
        super().check_processor(processor, model)
        if _share_in_place(processor) < _LEAST_SHARE:
            raise ConfigError(
                f'The image processor of "{model.name_or_path}" ({type(processor).__name__}) crops or pads images, and '
                'masks would not lie on them; set "image_size" in the task to 384 or more, or choose another backbone.'
            )


def processed_size(processor: Any) -> tuple[int, int]:
    """Height and width of the images that an image processor makes, found by using it."""
    from PIL import Image

    height, width = processor([Image.new("RGB", (64, 64))], return_tensors="pt")["pixel_values"].shape[-2:]
    return height, width


def resized_mask(classes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Mask of another size, by the nearest pixel, which makes no new classes."""
    import numpy as np
    from PIL import Image

    if classes.shape == (height, width):
        return classes
    return np.asarray(Image.fromarray(classes).resize((width, height), Image.Resampling.NEAREST))


def _share_in_place(processor: Any) -> float:
    """Share of the pixels of an uneven pattern that lie where stretching puts them."""
    import numpy as np
    from PIL import Image

    pattern = np.zeros((60, 90), dtype=np.uint8)
    pattern[:20, :30] = pattern[30:, 60:] = 255
    image = Image.fromarray(np.repeat(pattern[:, :, None], 3, axis=2))
    pixels = processor([image], return_tensors="np")["pixel_values"][0][0]
    bright = pixels > (pixels.min() + pixels.max()) / 2
    return float((bright == (resized_mask(pattern, *pixels.shape) > 0)).mean())
