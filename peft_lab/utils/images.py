"""Images as `datasets` decodes them for training.

They are turned upright by their EXIF data, and in RGB.
"""

from __future__ import annotations

from typing import Any

from peft_lab.errors import TaskError


def open_image(value: Any) -> Any:
    """Open an upright RGB image from a file or a PIL image.

    Raises:
        TaskError: the file is no image, cannot be read, or has more pixels than Pillow takes for harmless.
    """
    from PIL import Image, ImageOps

    if isinstance(value, Image.Image):
        return ImageOps.exif_transpose(value).convert("RGB")
    try:
        with Image.open(value) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:  # PIL's UnidentifiedImageError is an OSError
        raise TaskError(f'"{value}" cannot be read as an image: {str(error).rstrip(".")}.') from error
