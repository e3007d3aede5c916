"""Headers of safetensors files of anybody, read within limits. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path

from peft_lab.errors import ConfigError
from peft_lab.utils.bounded_files import first_line

MAX_DIMS = 8
_MAX_HEADER_BYTES = 16 * 2**20
_MAX_TENSORS = 100_000
_MAX_NAME = 1_000


def read_header(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Return dtype and shape of every tensor of a safetensors file.

    No tensor is read.

    safetensors itself refuses a header that does not describe exactly the bytes of the file.

    Raises:
        ConfigError: it does, or there are more tensors, longer names or more dimensions than an adapter has.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, tuple[str, list[int]]] = {}
    try:
        with path.open("rb") as start:
            # a false length would be allocated, and a true one of this size takes a gigabyte to parse
            length = int.from_bytes(start.read(8), "little")
        if length > _MAX_HEADER_BYTES:
            raise ConfigError(
                f'"{path}" is no safetensors file that can be read: its header would have {length:,} bytes.'
            )
        # The reader for numpy needs no torch.
        with safe_open(path, framework="np") as file:
            names = list(file.keys())
            if len(names) > _MAX_TENSORS:
                raise ConfigError(f'"{path}" declares {len(names):,} tensors; at most {_MAX_TENSORS:,} are read.')
            for name in names:
                part = file.get_slice(name)
                found[name] = (str(part.get_dtype()), list(part.get_shape()))
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f'"{path}" is no safetensors file that can be read: it is damaged, cut short or too long '
            f"({first_line(error)})."
        ) from error
    for name, (_, shape) in found.items():
        if len(name) > _MAX_NAME or len(shape) > MAX_DIMS:
            raise ConfigError(f'"{path}" has a tensor "{name[:_MAX_NAME]}" of a name or shape that no adapter has.')
    return found
