"""Images as training and prediction see them.

They are turned upright by their EXIF data, and in RGB with 8 bits.
"""

from __future__ import annotations

import struct
from typing import Any

from peft_lab.errors import TaskError

#: Formats whose grey values of 32-bit mode "I" fill the range of 16 bits; of others the range is not known.
_SIXTEEN_BITS = ("PNG", "PPM")


def open_image(value: Any, name: str | None = None) -> Any:
    """Open an upright RGB image from a file or a PIL image.

    Grey values of 16 bits are scaled to 8, from black to white.

    Args:
        value: path, open file or PIL image.
        name: the name that messages give to it; its path by default.

    Raises:
        TaskError: the file is no image, cannot be read, has more pixels than Pillow takes for harmless, or has values
            of unknown range.
    """
    return _read(value, name, _upright_rgb)


def image_traits(value: Any, name: str | None = None) -> set[str]:
    """Traits of an image that RGB does not keep: "animated" and "transparent".

    Pixels are read only where there may be transparent ones.

    Raises:
        TaskError: as `open_image`, of a file whose pixels are read.
    """
    return _read(value, name, _traits)


def _read(value: Any, name: str | None, use: Any) -> Any:
    from PIL import Image

    try:
        if isinstance(value, Image.Image):
            return use(value)
        with Image.open(value) as image:
            return use(image)
    # PIL's UnidentifiedImageError is an OSError; its readers raise the others for damaged files
    except (OSError, ValueError, SyntaxError, IndexError, struct.error, Image.DecompressionBombError) as error:
        shown = name or (f"a PIL image of mode {value.mode}" if isinstance(value, Image.Image) else str(value))
        reason = " ".join(str(error).split()).rstrip(".")
        raise TaskError(f'"{shown}" cannot be read as an image: {reason}.') from error


def _check_mode(image: Any) -> None:
    from PIL import Image

    if image.mode == "F" or (image.mode == "I" and image.format not in _SIXTEEN_BITS):
        raise ValueError(
            f"its values are of mode {image.mode}, whose range from black to white is not known; save it with 8 or 16 "
            "bits"
        )
    if not _is_of_16_bits(image):
        # raises where Pillow knows no way to RGB; the pixels themselves are read later
        Image.new(image.mode, (1, 1)).convert("RGB")


def _is_of_16_bits(image: Any) -> bool:
    return image.mode == "I" or image.mode.startswith("I;16")


def _upright_rgb(image: Any) -> Any:
    from PIL import ImageOps

    _check_mode(image)
    sixteen = _is_of_16_bits(image)
    image = ImageOps.exif_transpose(image)
    # Pillow would cut off all values above 255
    return (_eight_bits(image) if sixteen else image).convert("RGB")


def _eight_bits(image: Any) -> Any:
    """Grey image of 8 bits from one of 16; 65,535 becomes 255."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image).astype(np.int64).clip(0, 65535)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _traits(image: Any) -> set[str]:
    _check_mode(image)
    found = set()
    if getattr(image, "is_animated", False):
        found.add("animated")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        least, _ = image.convert("RGBA").getchannel("A").getextrema()
        if least < 255:
            found.add("transparent")
    return found
