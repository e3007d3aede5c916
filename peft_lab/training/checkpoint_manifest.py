"""Manifest of a checkpoint: checksums, versions and the inputs of the run.

It is written last and in one step, so a checkpoint that has one was complete once, and every later damage is found.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from pydantic import BaseModel, ValidationError
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from peft_lab.adapter_files import safe_files
from peft_lab.adapter_files.names import write_json
from peft_lab.errors import ConfigError
from peft_lab.utils.versions import versions

MANIFEST, STATE = "manifest.json", "trainer_state.json"


class FileRecord(BaseModel):
    """Size and sha256 of a file as it was written."""

    bytes: int
    sha256: str


class Manifest(BaseModel):
    """Content of a manifest; keys of a later version are ignored.

    Attributes:
        step: training steps so far.
        processes: number of processes that train, each with a random state of its own.
        files: path below the checkpoint -> record.
        versions: package -> version.
        options, data, base: what was trained on, as `run_inputs.inputs_of` records it; None if it is not known.
    """

    step: int
    processes: int
    files: dict[str, FileRecord]
    versions: dict[str, str] = {}
    options: dict[str, Any] | None = None
    data: dict[str, str] | None = None
    base: str | None = None


class WriteManifest(TrainerCallback):
    """Callback that completes each checkpoint by its manifest.

    Args:
        inputs: what the run trains on, as `run_inputs.inputs_of` returns it; empty if it is not known.
    """

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        self.inputs = inputs

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the manifest once every process has saved its part."""
        PartialState().wait_for_everyone()
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if args.should_save and folder.is_dir():
            write_manifest(folder, state.global_step, args.world_size, self.inputs)


def write_manifest(folder: Path, step: int, processes: int, inputs: Mapping[str, Any]) -> None:
    """Write the manifest of a complete checkpoint.

    Args:
        folder: the checkpoint.
        step: training steps so far.
        processes: number of processes that train, each with a random state of its own.
        inputs: as for `WriteManifest`.
    """
    files = {}
    # the parts of sharded states lie in folders
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            name = path.relative_to(folder).as_posix()
            files[name] = FileRecord(bytes=path.stat().st_size, sha256=_sha256(path))
    manifest = Manifest(step=step, processes=processes, files=files, versions=versions(), **inputs)
    write_json(folder / MANIFEST, manifest.model_dump())


def read_manifest(folder: Path) -> Manifest | None:
    """Manifest of a checkpoint; None for one that another program wrote.

    Raises:
        ConfigError: it is not readable, or not one that `write_manifest` wrote.
    """
    if not (folder / MANIFEST).is_file():
        return None
    try:
        return Manifest.model_validate(safe_files.read_json(folder / MANIFEST))
    except ValidationError as error:
        raise ConfigError(f'"{folder / MANIFEST}" is no manifest of a checkpoint.') from error


def fault_of(folder: Path, processes: int) -> str:
    """First fault of a checkpoint in words; "" for a whole one.

    Args:
        folder: the checkpoint.
        processes: number of processes that train now.
    """
    try:
        manifest = read_manifest(folder)
    except ConfigError as error:
        return str(error).rstrip(".")
    fault = _file_fault(folder, manifest) if manifest else _foreign_fault(folder)
    return fault or _state_fault(folder) or _process_fault(folder, manifest, processes)


def _file_fault(folder: Path, manifest: Manifest) -> str:
    """First file that is not as it was written, in words."""
    for name, recorded in manifest.files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != recorded.bytes or _sha256(path) != recorded.sha256:
            return f"{name} is not as it was written"
    if _step_of(folder) not in (None, manifest.step):
        return f"it is the one of step {manifest.step}"
    return _missing(manifest.files)


def _foreign_fault(folder: Path) -> str:
    """First thing that a checkpoint without manifest lacks, in words.

    Files of torch are zip files whose directory is written last, so a cut one is recognised.
    """
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    for name in names:
        if name.endswith((".pt", ".pth")) and not zipfile.is_zipfile(folder / name):
            return f"{name} is cut short or damaged"
        if name.endswith(".safetensors") and (fault := _weights_fault(folder / name)):
            return fault
    return _missing(names)


def _missing(names: Any) -> str:
    """First part that a resumable checkpoint lacks, in words."""
    if STATE not in names:
        return f"it has no {STATE}"
    if not any(name.endswith((".safetensors", ".bin", ".distcp")) or "model_states" in name for name in names):
        return "it has no weights"
    # sharded optimizers have files in folders, and DeepSpeed keeps the schedule among them
    if not any("optim" in name for name in names):
        return "it has no optimizer.pt, as with save_only_model"
    if "scheduler.pt" not in names and not any(name.startswith("global_step") for name in names):
        return "it has no scheduler.pt"
    return "" if any(name.startswith("rng_state") for name in names) else "it has no rng_state.pth"


def _weights_fault(path: Path) -> str:
    """Fault of a file of weights, in words."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118, an open file is no mapping
                values = file.get_tensor(name)
                if values.is_floating_point() and not values.isfinite().all():
                    return f"{path.name} holds weights that are not finite"
    except (SafetensorError, OSError):
        return f"{path.name} is cut short or damaged"
    return ""


def _state_fault(folder: Path) -> str:
    """Fault of Trainer's state, in words."""
    state = read_state(folder)
    if not isinstance(state.get("global_step"), int):
        return f"{STATE} is cut short or damaged"
    if _step_of(folder) not in (None, state["global_step"]):
        return f"{STATE} says step {state['global_step']}"
    # at the end of the run its weights may be taken from the best checkpoint
    best = folder.with_name(Path(state.get("best_model_checkpoint") or folder).name)
    try:
        manifest = read_manifest(best) if best != folder else None
    except ConfigError as error:
        return str(error).rstrip(".")
    fault = _file_fault(best, manifest) if manifest else ""
    return f"of {best.name}, which is the best so far, {fault}" if fault else ""


def _process_fault(folder: Path, manifest: Manifest | None, processes: int) -> str:
    states = len([*folder.glob("rng_state*.pth")])
    written = manifest.processes if manifest else states
    if written == processes and states == processes:
        return ""
    return f"{written} processes wrote it, and {processes} train now"


def read_state(folder: Path) -> dict[str, Any]:
    """Trainer's state of a checkpoint; {} if it cannot be read."""
    try:
        # not the strict reader: earlier versions wrote NaN where a gradient overflowed
        values = json.loads((folder / STATE).read_text(encoding="utf-8"))
    # very deep nesting ends the parser itself
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _step_of(folder: Path) -> int | None:
    """Step in the name of a checkpoint's folder; None for another name."""
    prefix, _, number = folder.name.rpartition("-")
    return int(number) if prefix == PREFIX_CHECKPOINT_DIR and number.isdigit() else None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
