"""Point clouds as training and prediction read them: float32 (points, 3), without pickles."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from peft_lab.errors import TaskError

if TYPE_CHECKING:
    import numpy as np

#: Endings of the files that are read: arrays of numpy, and texts with x y z in each line.
CLOUD_ENDINGS = (".npz", ".npy", ".xyz", ".txt")
#: Names of the cloud in an .npz file of several arrays, the first that is there.
_ARRAYS = ("points", "xyz", "pos")
#: First bytes of an .npz and of an .npy file.
_NPZ, _NPY = b"PK", b"\x93NUMPY"
#: Points of a cloud that is read; a damaged or hostile header may announce any number.
_MOST = 10_000_000


def open_cloud(value: Any, name: str | None = None) -> np.ndarray:
    """Read a point cloud, float32 (points, 3).

    Args:
        value: path, open file, array or nested list (points, 3), text with x y z in each line, or a mapping of `bytes`
            and `path`.
        name: the name that messages give to it; its path by default.

    Raises:
        TaskError: it is no point cloud, or cannot be read.
    """
    if isinstance(value, Mapping) and value.keys() == {"bytes", "path"}:
        name = name or value["path"]
        value = value["path"] if value["bytes"] is None else BytesIO(value["bytes"])
    shown = name or _shown(value)
    try:
        found = _read(value)
    # numpy and zipfile raise any of these for damaged files
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise TaskError(f'"{shown}" cannot be read as a point cloud: {reason}.') from error
    if found.ndim != 2 or found.shape[1] != 3 or found.dtype.kind not in "fiu":
        raise TaskError(
            f'"{shown}" cannot be read as a point cloud: it holds {found.dtype} {list(found.shape)}, and (points, 3) '
            "numbers were expected."
        )
    return found.astype("float32")


def is_inline(text: str) -> bool:
    """Test whether a text is a cloud itself, with x y z in each line, and no name of a file."""
    return not text.strip().lower().endswith(CLOUD_ENDINGS)


def _shown(value: Any) -> str:
    if isinstance(value, Path) or (isinstance(value, str) and not is_inline(value)):
        return str(value)
    return f"a cloud given as {type(value).__name__}"


def _read(value: Any) -> np.ndarray:
    import numpy as np

    if isinstance(value, str) and is_inline(value):
        return _parsed(value)
    if isinstance(value, str | Path):
        with Path(value).expanduser().open("rb") as file:
            return _read_file(file)
    if hasattr(value, "read"):
        return _read_file(value)
    return np.asarray(value)


def _read_file(file: BinaryIO) -> np.ndarray:
    beginning = file.read(len(_NPY))
    file.seek(0)
    if beginning.startswith(_NPY):
        return _array(file)
    if not beginning.startswith(_NPZ):
        return _parsed(file.read().decode("utf-8"))
    with zipfile.ZipFile(file) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        chosen = names if len(names) == 1 else [name for name in _ARRAYS if name in names]
        if not chosen:
            raise ValueError(f"it holds {', '.join(names) or 'no array'}, and one of {', '.join(_ARRAYS)} was expected")
        with archive.open(f"{chosen[0]}.npy") as member:
            return _array(member)


def _array(file: Any) -> np.ndarray:
    """Array of an .npy file, whose header is checked before memory is taken for it."""
    import numpy as np

    version = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, in_columns, dtype = header(file)
    if dtype.kind not in "fiu" or len(shape) != 2 or shape[1] != 3 or shape[0] > _MOST:
        raise ValueError(f"it holds {dtype} {list(shape)}, and (points, 3) numbers were expected")
    data = file.read(shape[0] * 3 * dtype.itemsize)
    found = np.frombuffer(data, dtype, count=shape[0] * 3)
    return found.reshape(3, -1).T if in_columns else found.reshape(-1, 3)


def _parsed(text: str) -> np.ndarray:
    """Array of a text with x y z in each line, separated by spaces, commas or semicolons; # begins a comment."""
    import numpy as np

    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        cells = line.partition("#")[0].replace(",", " ").replace(";", " ").split()
        if len(cells) not in (0, 3):
            raise ValueError(f"line {number} has {len(cells)} values, and x y z was expected")
        if cells:
            rows.append(cells)
    return np.asarray(rows, dtype=np.float32).reshape(-1, 3)


def unit_sphere(points: np.ndarray) -> np.ndarray:
    """Points moved to their centre and scaled so that the farthest lies at distance 1, float32 (points, 3)."""
    import numpy as np

    centred = points - points.mean(0, dtype=np.float64)
    return (centred / max(float(np.linalg.norm(centred, axis=1).max(initial=0.0)), 1e-12)).astype(np.float32)


def farthest_points(points: np.ndarray, count: int) -> np.ndarray:
    """Farthest point sampling: numbers of `count` points, int64, in the order in which they are taken.

    The first point comes first, and each next one is the farthest from those that are taken (of equal ones the first).
    A beginning of the order is a sample too.
    """
    import numpy as np

    chosen = np.zeros(min(count, len(points)), dtype=np.int64)
    distance = np.full(len(points), np.inf)
    for place in range(1, len(chosen)):
        step = points - points[chosen[place - 1]]
        distance = np.minimum(distance, np.einsum("ij,ij->i", step, step))
        chosen[place] = int(distance.argmax())
    return chosen


def turned(points: np.ndarray, up: str, around: float, towards: float = 0.0) -> np.ndarray:
    """Points turned about the up axis, then tilted towards the viewer, float32 (points, 3).

    Args:
        points: (points, 3).
        up: axis that points upwards, "x", "y" or "z".
        around, towards: angles in radians.

    Returns:
        Coordinates to the right, upwards and towards the viewer.
    """
    import numpy as np

    # a cyclic change of axes keeps left and right
    right, height, near = np.roll(points, 1 - "xyz".index(up), axis=1).T
    right, near = np.cos(around) * right + np.sin(around) * near, np.cos(around) * near - np.sin(around) * right
    height, near = np.cos(towards) * height - np.sin(towards) * near, np.cos(towards) * near + np.sin(towards) * height
    return np.stack([right, height, near], 1).astype(np.float32)


def depth_picture(points: np.ndarray, side: int) -> np.ndarray:
    """Picture of points by their distance, uint8 (side, side): near ones are bright, the ground is black.

    Args:
        points: coordinates to the right, upwards and towards the viewer, as `turned` gives them.
        side: of the picture in pixels; a point covers about a thirtieth of it from 64 on.
    """
    import numpy as np

    radius = side // 64
    low, high = points.min(0), points.max(0)
    cell = max(float((high - low)[:2].max()), 1e-12) / max(side - 1 - 2 * radius, 1)
    steps = np.rint((points - low)[:, :2] / cell).astype(np.int64)
    steps = steps + (side - 1 - steps.max(0)) // 2
    brightness = 64 + 191 * (points[:, 2] - low[2]) / max(float(high[2] - low[2]), 1e-12)
    picture = np.zeros((side, side), dtype=np.uint8)
    for row in range(-radius, radius + 1):
        for column in range(-radius, radius + 1):
            rows = np.clip(side - 1 - steps[:, 1] + row, 0, side - 1)
            columns = np.clip(steps[:, 0] + column, 0, side - 1)
            # the nearest of several points is seen
            np.maximum.at(picture, (rows, columns), brightness.astype(np.uint8))
    return picture
