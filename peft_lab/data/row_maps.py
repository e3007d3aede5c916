"""Functions on all rows of a data set, whose results are kept on the disk and found again by a later run."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class MapOptions:
    """Options of all functions on rows.

    Attributes:
        processes: that work at the same time; None for this one alone.
        overwrite: compute anew what is kept already.
    """

    processes: int | None = None
    overwrite: bool = False


_DEFAULT = MapOptions()
_OPTIONS: ContextVar[MapOptions] = ContextVar("peft_lab_map_options", default=_DEFAULT)

_READS: ContextVar[list[Any] | None] = ContextVar("peft_lab_reads", default=None)


@contextmanager
def map_options(processes: int | None, overwrite: bool) -> Iterator[None]:
    """Set the options of `map_rows` within the block."""
    token = _OPTIONS.set(MapOptions(processes, overwrite))
    try:
        yield
    finally:
        _OPTIONS.reset(token)


@contextmanager
def recorded_reads() -> Iterator[list[Any]]:
    """Record what the functions on rows read beside them, within the block."""
    found: list[Any] = []
    token = _READS.set(found)
    try:
        yield found
    finally:
        _READS.reset(token)


def map_rows(dataset: Dataset, function: Callable[..., Any], reads: Any, **options: Any) -> Dataset:
    """Apply a function to all rows, by `Dataset.map`.

    The result is kept under a fingerprint of the rows, of `reads`, of the function's own code and of the versions of
    the libraries. `datasets` would take one of everything that the function refers to, and a tokenizer changes in use.

    Args:
        dataset: the rows.
        function: as for `Dataset.map`.
        reads: what the result depends on beside the rows, as JSON can hold it.
        options: further arguments of `Dataset.map`; a `num_proc` among them goes before that of `map_options`.
    """
    settings = _OPTIONS.get()
    recorded = _READS.get()
    if recorded is not None and reads not in recorded:
        recorded.append(reads)
    # rows in memory, as a stream has them, are not kept
    fingerprint = _fingerprint(dataset, function, reads) if dataset.cache_files else uuid.uuid4().hex
    if settings.overwrite:
        options["load_from_cache_file"] = False
    if settings.processes is not None and dataset.cache_files and "num_proc" not in options:
        options["num_proc"] = settings.processes
    return dataset.map(function, new_fingerprint=fingerprint, **options)


def identity_of_tokenizer(tokenizer: Any) -> str:
    """Hash of all of a tokenizer that its tokens depend on; how it was used last does not count."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        from datasets.fingerprint import Hasher

        return Hasher.hash(tokenizer)
    values = json.loads(backend.to_str())
    # a call with a limit leaves it here
    values["truncation"] = values["padding"] = None
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    made_by = [type(tokenizer).__name__, importlib.metadata.version("tokenizers")]
    return _digest([values, special, str(tokenizer.chat_template), made_by])


def _fingerprint(dataset: Dataset, function: Any, reads: Any) -> str:
    # here, because it imports torch, which checking a task file does without
    from peft_lab.utils.versions import versions

    code = function.__code__
    own = [f"{function.__module__}.{function.__qualname__}", code.co_code.hex(), [str(name) for name in code.co_names]]
    return _digest([dataset._fingerprint, own, reads, versions()])


def _digest(values: Any) -> str:
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
