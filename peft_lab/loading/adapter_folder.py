"""Folder of a saved adapter, read once.

Its config, weights' header, record of the base, origin and labels.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from peft import PeftConfig

from peft_lab import registry
from peft_lab.adapter_files import base_fingerprint, safe_files
from peft_lab.adapter_files.name_patterns import pattern_fields
from peft_lab.adapter_files.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from peft_lab.backbones.pypi_weights import BACKBONES, reachable_name
from peft_lab.errors import ConfigError
from peft_lab.loading.config_files import parse_config, plain_values
from peft_lab.loading.pruned_base import SavedPruning, read_pruning
from peft_lab.runs import run_folder
from peft_lab.tuners.registration import has_trait


@dataclass(frozen=True)
class AdapterFolder:
    """Folder of a trained adapter or of a whole model.

    Full fine-tuning leaves the latter.

    Its files are checked and read on first use, and not again: pass it on.

    Attributes:
        path: the folder on this machine.
        is_download: True if it comes from the Hub: nothing in it may then point to files of this machine.
    """

    path: Path
    is_download: bool = False

    @classmethod
    def find(cls, name: str | Path, revision: str | None = None) -> AdapterFolder:
        """Find the folder of a run, adapter or Hub id.

        A Hub id is downloaded at a branch, tag or commit.

        Raises:
            ConfigError: there is no such adapter, or a file in it is not what it should be.
        """
        return cls(run_folder.find_adapter(name, revision), run_folder.is_download(name))

    @property
    def has_adapter(self) -> bool:
        """True if there is an adapter; False for a whole model."""
        return (self.path / ADAPTER_CONFIG).is_file()

    @property
    def weights(self) -> Path:
        """The file with the adapter's weights."""
        return self.path / ADAPTER_WEIGHTS

    @cached_property
    def values(self) -> dict[str, Any]:
        """The content of adapter_config.json; {} for a whole model."""
        return safe_files.read_json(self.path / ADAPTER_CONFIG)

    @cached_property
    def header(self) -> dict[str, tuple[str, list[int]]]:
        """Dtype and shape of each entry of the weights."""
        return safe_files.read_header(self.weights)

    def check_weights(self, most: int) -> None:
        """Check size and header of the weights.

        They may have at most `most` bytes.

        Raises:
            ConfigError: there are none, or they are damaged.
        """
        if not self.weights.is_file():
            raise ConfigError(f'"{self.path}" is no adapter: it has no {ADAPTER_WEIGHTS}.')
        safe_files.check_size(self.weights, most)
        # A frozen dataclass refuses the assignment, and `cached_property` keeps its value here.
        self.__dict__["header"] = safe_files.read_header(self.weights)

    @cached_property
    def record(self) -> dict[str, dict[str, Any]]:
        """The base record of an adapter of peft's own tuners.

        {} without one.
        """
        return base_fingerprint.read_record(self.path)

    @cached_property
    def pruning(self) -> SavedPruning | None:
        """How the base of the adapter is pruned; None for a dense one."""
        return read_pruning(self.path)

    @cached_property
    def plain_values(self) -> dict[str, Any]:
        """The content of adapter_config.json with module names in the place of regexes."""
        # The weights are looked at only where a regex asks for it.
        header = self.header if pattern_fields(self.values) else {}
        return plain_values(self.values, header, str(self.path / ADAPTER_CONFIG))

    @cached_property
    def config(self) -> PeftConfig:
        """The config of the adapter, checked."""
        return parse_config(self.plain_values, str(self.path / ADAPTER_CONFIG))

    @cached_property
    def origin(self) -> dict[str, str]:
        """Task, base, revision and dtype of the run, where known."""
        return run_folder.read_origin(self.path)

    @cached_property
    def labels(self) -> list[str] | None:
        """Class names in the order of the outputs.

        None if none were saved.
        """
        return run_folder.read_labels(self.path)

    @property
    def uses_source_head(self) -> bool:
        """True if the base keeps the head it was trained with."""
        # peft writes its types in upper case, the registry has lower case.
        info = registry.list_methods().get(str(self.values.get("peft_type", "")).lower())
        return info is not None and has_trait(info, "uses_source_head")

    def base_name(self) -> str:
        """Return the base that the folder names.

        It is that of its run, else that of its adapter_config.json.

        Raises:
            ConfigError: it names none or one in itself, or a download names a folder of this machine.
        """
        if not self.has_adapter:
            return str(self.path)
        named, known = self.origin.get("model_name_or_path"), self.values.get("base_model_name_or_path")
        # of a base that is a folder metrics.json has no path, and adapter_config.json has it where run.yaml is gone
        if not named or (named.startswith("./") and known and not Path(named).is_dir()):
            named = known
        if not named or not isinstance(named, str):
            raise ConfigError(f'"{self.path}" does not name its base; pass model_name_or_path.')
        named = reachable_name(named)
        # from within the folder even a name on the Hub would mean what lies there
        place = os.path.expanduser(named)
        if os.path.exists(place) and Path(place).resolve().is_relative_to(self.path.resolve()):
            raise ConfigError(
                f'"{self.path}" names "{named}" as its base, which lies in the folder itself; pass '
                "--model_name_or_path with a base that you trust."
            )
        if self.is_download and not _is_public(named):
            raise ConfigError(
                f'The download names "{named}" as its base, which is not a name on the Hub; pass --model_name_or_path '
                "with a base that you trust."
            )
        return named


def _is_public(name: str) -> bool:
    """Test whether a name can only mean a public backbone.

    That is one of ours, or one on the Hub.
    """
    # transformers prefers a folder to a Hub id of the same name, so no such folder may exist.
    return name in BACKBONES or (bool(re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name)) and not os.path.exists(name))
