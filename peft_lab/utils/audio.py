"""Sound files as training and prediction read them: samples between -1 and 1, one channel.

`soundfile` reads them; `datasets` would need torchcodec.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_lab.errors import TaskError

if TYPE_CHECKING:
    import numpy as np

#: Endings of the files that soundfile reads.
SOUND_ENDINGS = (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif")

#: Keys of a sound in memory, as `datasets` holds a decoded one.
_DECODED = {"array", "sampling_rate"}


@dataclass(frozen=True)
class Sound:
    """Samples of a sound.

    Attributes:
        samples: float32 (samples, channels).
        rate: samples in a second.
    """

    samples: np.ndarray
    rate: int

    def mono(self, rate: int) -> np.ndarray:
        """Mean of the channels at another rate, float32 (samples,).

        The rate is changed by a polyphase filter of scipy.
        """
        import numpy as np
        from scipy.signal import resample_poly

        samples = self.samples.mean(1, dtype=np.float32)
        if self.rate == rate or not len(samples):
            return samples
        divisor = gcd(self.rate, rate)
        return resample_poly(samples, rate // divisor, self.rate // divisor).astype(np.float32)


def check_soundfile() -> None:
    """Raise `TaskError` if the package that reads sound files is not installed."""
    if importlib.util.find_spec("soundfile") is None:
        raise TaskError('Sound files are read by the package soundfile: pip install "peft-lab[audio]".')


def open_sound(value: Any, rate: int, name: str | None = None) -> Sound:
    """Read a sound.

    Args:
        value: path, open file, an array (samples,) or (samples, channels), or a mapping of `array` and `sampling_rate`
            or of `bytes` and `path`.
        rate: that of an array, which says none itself.
        name: the name that messages give to it; its path by default.

    Raises:
        TaskError: it is no sound, or cannot be read; or soundfile is not installed.
    """
    import numpy as np

    if isinstance(value, Mapping) and value.keys() >= _DECODED:
        value, rate = value["array"], int(value["sampling_rate"])
    if isinstance(value, Mapping) and value.keys() == {"bytes", "path"}:
        name = name or value["path"]
        value = value["path"] if value["bytes"] is None else BytesIO(value["bytes"])
    if isinstance(value, np.ndarray | list | tuple):
        return Sound(_as_samples(value, name), rate)
    check_soundfile()
    import soundfile

    try:
        source = str(Path(value).expanduser()) if isinstance(value, str | Path) else value
        samples, found = soundfile.read(source, dtype="float32", always_2d=True)
    # soundfile raises its own errors, which are RuntimeErrors, TypeErrors for what is no file
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        shown = name or (str(value) if isinstance(value, str | Path) else f"a sound of type {type(value).__name__}")
        reason = " ".join(str(error).split()).rstrip(".")
        raise TaskError(f'"{shown}" cannot be read as a sound: {reason}.') from error
    return Sound(samples, found)


def _as_samples(value: Any, name: str | None) -> np.ndarray:
    import numpy as np

    try:
        samples = np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise TaskError(f'"{name or "a list"}" is no sound: {error}.') from error
    if samples.ndim not in (1, 2) or np.asarray(value).dtype.kind not in "f":
        raise TaskError(
            f"a sound in memory is an array of fractional samples between -1 and 1, (samples,) or (samples, channels), "
            f"not {np.asarray(value).dtype} {samples.shape}."
        )
    return samples[:, None] if samples.ndim == 1 else samples
