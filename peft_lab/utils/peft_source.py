"""Tuners of the installed peft, read from its source without importing it.

They are cached on disk, because parsing takes time.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from peft_lab.errors import WriteError
from peft_lab.utils import source_reader
from peft_lab.utils.atomic_files import write_text
from peft_lab.utils.cache import cache_dir

logger = logging.getLogger("peft_lab")


class PeftTuner(NamedTuple):
    """One tuner of peft.

    Attributes:
        name: its peft type in lower case.
        folder: its folder below `peft/tuners`.
        config: name of its config class, in `config.py` of that folder.
    """

    name: str
    folder: str
    config: str

    @property
    def path(self) -> Path:
        """The file of the config class."""
        return _root() / "tuners" / self.folder / "config.py"

    @property
    def module(self) -> str:
        """The dotted module of the config class."""
        return f"peft.tuners.{self.folder}.config"


@lru_cache(maxsize=1)
def tuners() -> dict[str, PeftTuner]:
    """Tuners of the installed peft by name; empty without peft."""
    if importlib.util.find_spec("peft") is None:
        return {}
    found = _read_cache()
    if found is None:
        found = [tuner for file in sorted(_root().glob("tuners/*/config.py")) for tuner in _tuners_of(file)]
        _write_cache(found)
    return {tuner.name: tuner for tuner in found}


@lru_cache(maxsize=1)
def config_files() -> dict[str, Path]:
    """Config class of peft, base classes included -> its file."""
    if importlib.util.find_spec("peft") is None:
        return {}
    bases = dict.fromkeys(("PeftConfig", "PeftConfigMixin", "PromptLearningConfig"), _root() / "config.py")
    bases["LycorisConfig"] = _root() / "tuners" / "lycoris_utils.py"
    return bases | {tuner.config: tuner.path for tuner in tuners().values()}


@lru_cache(maxsize=1)
def _root() -> Path:
    spec = importlib.util.find_spec("peft")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("peft is not installed")
    return Path(spec.origin).parent


def _tuners_of(file: Path) -> list[PeftTuner]:
    """Tuners whose config classes in a file set `self.peft_type`."""
    found = []
    for name, node in source_reader.classes(file).items():
        peft_type = _peft_type(node)
        if name.endswith("Config") and peft_type:
            found.append(PeftTuner(peft_type.lower(), file.parent.name, name))
    return found


def _peft_type(node: ast.ClassDef) -> str:
    """Member of `PeftType` that a class assigns to `self.peft_type`, or ""."""
    for line in ast.walk(node):
        if not isinstance(line, ast.Assign) or ast.unparse(line.targets[0]) != "self.peft_type":
            continue
        for part in ast.walk(line.value):
            if isinstance(part, ast.Attribute) and ast.unparse(part.value) == "PeftType":
                return part.attr
    return ""


def _cache_file() -> tuple[Path, list[str]]:
    """Cache file of the installed peft, and its valid key."""
    # a tuner that is added to an editable peft changes the folder, but not the version
    changed = (_root() / "tuners").stat().st_mtime_ns
    key = [importlib.metadata.version("peft"), str(_root()), str(changed)]
    # environments that share a home may each have a peft of their own
    digest = hashlib.blake2b(key[1].encode(), digest_size=6).hexdigest()
    return cache_dir(f"peft_tuners_{key[0]}_{digest}.json"), key


def _read_cache() -> list[PeftTuner] | None:
    """Tuners in the cache; None if there is no usable cache."""
    file, key = _cache_file()
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values["key"] != key:
            return None
        return [PeftTuner(str(name), str(folder), str(config)) for name, folder, config in values["tuners"]]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.debug("The cache %s is not readable and is written anew: %s", file, error)
        return None


def _write_cache(found: list[PeftTuner]) -> None:
    file, key = _cache_file()
    try:
        write_text(file, json.dumps({"key": key, "tuners": found}))
    except (WriteError, OSError) as error:  # a home that cannot be written costs time and nothing else
        logger.debug("The cache %s cannot be written: %s", file, error)
