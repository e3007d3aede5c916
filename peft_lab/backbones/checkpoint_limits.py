"""Limits of what the files of a checkpoint may ask for, checked before and while its model is built.

A config states sizes, and weights that its file lacks would be allocated by them.
"""

from __future__ import annotations

import importlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from peft_lab.backbones.family_table import family
from peft_lab.errors import ConfigError
from peft_lab.utils.bounded_files import check_size, read_bytes, read_json
from peft_lab.utils.patterns import may_take_for_ever
from peft_lab.utils.safetensors_header import read_header

_CONFIG, _TOKENIZER, _INDEX = "config.json", "tokenizer.json", "model.safetensors.index.json"
#: Largest size in a config, such as that of a vocabulary or the number of positions, and largest number of parts.
_MAX_SIZE, _MAX_PARTS = 2**28, 2**16
#: Fields that count parts of a model.
_PARTS = re.compile(r"layer|depth|block|stage|expert|repeat")
#: Modules and parameters of a model beyond those that its weights account for: new heads, tied weights.
_SPARE_MODULES, _SPARE_PARAMETERS = 2_000, 2**26
#: Largest files of a tokenizer, and of anything else that transformers reads whole beside the weights.
_MAX_TOKENIZER_BYTES, _MAX_OTHER_BYTES = 64 * 2**20, 32 * 2**20
_READ_WHOLE = ("vocab.*", "merges.txt", "*.model", "chat_template.*")
_SETTINGS = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "preprocessor_config.json"),
    *("processor_config.json", "generation_config.json"),
)
_PATTERN = re.compile(rb'"Regex"\s*:\s*("(?:[^"\\]|\\.)*")')


def check_files(name: str, revision: str | None = None) -> None:
    """Check config and tokenizer of a checkpoint, a folder's or a Hub id's.

    Raises:
        ConfigError: a size that no model has, code from the Hub, a tokenizer's pattern that may take for ever, or a
            package that the model needs is missing.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        for pattern in _READ_WHOLE:
            for path in folder.glob(pattern):
                check_size(path, _MAX_OTHER_BYTES)
        for file in _SETTINGS:
            read_json(folder / file, lenient=True)
    config = _file(name, _CONFIG, revision)
    if config is not None:
        # some models have an infinite limit in their config
        values = read_json(config, lenient=True)
        _check_config(values, str(config))
        _check_library(name, str(values.get("model_type")))
    tokenizer = _file(name, _TOKENIZER, revision)
    if tokenizer is not None:
        for found in _PATTERN.findall(read_bytes(tokenizer, _MAX_TOKENIZER_BYTES)):
            pattern = str(json.loads(found, strict=False))
            if may_take_for_ever(pattern):
                raise ConfigError(
                    f'"{tokenizer}" splits texts by {pattern[:80]!r}, which may take for ever as a regular expression; '
                    "take the tokenizer from a source that you trust."
                )


@contextmanager
def bounded_build(name: str, revision: str | None = None) -> Iterator[None]:
    """Build no more modules and parameters in the block than the weights of a checkpoint account for.

    Raises:
        ConfigError: the config asks for more.
    """
    from torch.nn.modules import module as hooks

    budget, thread = _Budget(name, revision), threading.get_ident()

    # the hooks see every model of the process
    def on_module(owner: Any, key: str, module: Any) -> None:
        if threading.get_ident() == thread and module is not None:
            budget.add(modules=1)

    def on_parameter(owner: Any, key: str, parameter: Any) -> None:
        if threading.get_ident() == thread and parameter is not None:
            budget.add(parameters=parameter.numel())

    handles = [
        hooks.register_module_module_registration_hook(on_module),
        hooks.register_module_parameter_registration_hook(on_parameter),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Budget:
    """Count of what is built, and its limits by the headers of the weights."""

    def __init__(self, name: str, revision: str | None) -> None:
        self.name, self.revision = name, revision
        self.modules = self.parameters = 0

    def add(self, modules: int = 0, parameters: int = 0) -> None:
        """Count, and raise `ConfigError` beyond the limits."""
        self.modules += modules
        self.parameters += parameters
        # the headers are read only where it matters
        if self.modules <= _SPARE_MODULES and self.parameters <= _SPARE_PARAMETERS:
            return
        tensors, elements = self.in_file
        if self.modules > _SPARE_MODULES + 30 * tensors or self.parameters > _SPARE_PARAMETERS + 4 * elements:
            raise ConfigError(
                f'The config of "{self.name}" asks for a model far larger than its weights ({tensors:,} tensors, '
                f"{elements:,} bytes or values); it is damaged or not the config of these weights."
            )

    @cached_property
    def in_file(self) -> tuple[int, int]:
        """Tensors of the checkpoint, and its values; bytes where they may be packed."""
        files = _weights(self.name, self.revision)
        if not files:
            # weights of another format have no header to compare with
            return 10**6, 10**13
        headers = [read_header(file) for file in files]
        values = 0
        for dtype, shape in (entry for header in headers for entry in header.values()):
            # quantised weights hold up to eight values in one integer of 32 bits
            values += prod(shape) * (8 if dtype.startswith(("I", "U")) else 1)
        return sum(map(len, headers)), values


def _weights(name: str, revision: str | None) -> list[Path]:
    index = _file(name, _INDEX, revision)
    parts = read_json(index).get("weight_map") if index is not None else None
    names = sorted({str(part) for part in parts.values()}) if isinstance(parts, Mapping) else ["model.safetensors"]
    found = [_file(name, part, revision) for part in names]
    return [path for path in found if path is not None]


def _file(name: str, file: str, revision: str | None) -> Path | None:
    """Path of a file of a checkpoint; None without one."""
    from transformers.utils import cached_file

    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder / file if (folder / file).exists() else None
    options: dict[str, Any] = {"revision": revision} if revision else {}
    try:
        found = cached_file(name, file, _raise_exceptions_for_missing_entries=False, **options)
    except (OSError, ValueError):
        return None  # loading the model fails for the same reason, and says so
    return Path(found) if found else None


def _check_library(name: str, model_type: str) -> None:
    """Import the package that holds a model.

    Raises:
        ConfigError: it is missing, or does not go with the installed torch.
    """
    known = family(model_type)
    if known is None or not known.library:
        return
    try:
        importlib.import_module(known.library)
    # A build of torchvision for another torch ends by a RuntimeError.
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f'"{name}" is a model of {known.library}, which cannot be imported ({reason}); install {known.library}, '
            "with the torchvision that goes with your torch."
        ) from error


def _check_config(values: Mapping[str, Any], where: str) -> None:
    """Check the sizes of a config, those of its parts included."""
    left: list[tuple[str, Any]] = list(values.items())
    while left:
        key, value = left.pop()
        if key in ("id2label", "label2id"):
            continue
        if isinstance(value, dict):
            left += value.items()
        elif isinstance(value, list):
            left += [(key, part) for part in value]
            # the parts of all stages are counted together
            left.append((key, sum(part for part in value if isinstance(part, int)) if _counts_parts(key) else 0))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            most = _MAX_PARTS if _counts_parts(key) else _MAX_SIZE
            # a base of angles or a limit of times is a float, and allocates nothing
            if abs(value) > most and (isinstance(value, int) or _counts_parts(key)):
                raise ConfigError(
                    f'"{where}" sets {key}={str(value)[:40]}, larger than in any model: at most {most:,}.'
                )
        elif isinstance(value, str) and "attn_implementation" in key and "/" in value:
            raise ConfigError(f'"{where}" names code on the Hub by {key}, which is never run; remove the key.')


def _counts_parts(key: str) -> bool:
    return _PARTS.search(key) is not None and not key.endswith(("size", "id", "ids"))
