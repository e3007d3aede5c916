"""Files in the folder of a run. Imports nothing heavy.

adapter_config.json, adapter_model.safetensors   the adapter, as peft writes it
config.json, model.safetensors                   instead of these for full fine-tuning: a whole model
tokenizer or image processor files               as transformers writes them
labels.json    class index -> name               run.yaml     the options; `peft-lab train run.yaml` repeats the run
metrics.json   what was measured, and on what    README.md    the model card
base_fingerprint.json   which base weights an adapter of peft's own tuners belongs to
pruning.json, pruning.safetensors   how the base of an adapter is pruned, and the masks
task.yaml      a copy of your own task file      checkpoint-*  Trainer's checkpoints
items.csv      what was found for each test row  trainer_state.json  Trainer's log of losses and evaluations
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from peft_lab.adapter_files import safe_files
from peft_lab.adapter_files.names import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE_RECORD,
    MODEL_CONFIG,
    MODEL_WEIGHTS,
    PRUNING,
    PRUNING_MASKS,
    write_json,
)
from peft_lab.backbones.pypi_weights import check_name, public_name
from peft_lab.backbones.quantized_loading import FORMS
from peft_lab.data.task_registry import validate_task
from peft_lab.data.task_schema import MAX_LABELS, Task, check_classes
from peft_lab.errors import ConfigError, did_you_mean
from peft_lab.metrics.predictions import PREDICTIONS
from peft_lab.registry import MethodInfo
from peft_lab.runs.metrics_schema import check_form
from peft_lab.runs.run_config import DTYPES, RunConfig, dump_yaml, read_run_file
from peft_lab.utils.atomic_files import check_can_be_made, write_text

State = Literal["new", "started", "finished"]

RUN, METRICS, LABELS, TASK, CARD = "run.yaml", "metrics.json", "labels.json", "task.yaml", "README.md"
HISTORY = "trainer_state.json"

#: What `remove_run` removes: a run that follows may write a different set of files.
_OF_A_RUN = (
    *(RUN, METRICS, LABELS, TASK, CARD, PREDICTIONS, HISTORY),
    *(ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE_RECORD, MODEL_CONFIG, "model*.safetensors*", "ood_scores.safetensors"),
    *(PRUNING, PRUNING_MASKS),
)


def check_run(config: RunConfig) -> tuple[MethodInfo, Task, State]:
    """Check all of a run that can be known without torch.

    These are options, method, task with its files, and output folder.

    Returns:
        The method's card, the task, and what stands in the output folder.

    Raises:
        ConfigError, TaskError: what is wrong.
    """
    info, task = config.check(), validate_task(config.task)
    check_name(config.model_name_or_path)
    if config.examples_per_class is not None:
        check_classes(task)
    return info, task, check_output_dir(config)


def check_output_dir(config: RunConfig) -> State:
    """State of a run's output folder.

    It holds nothing, a part of this same run, or all of it.

    Raises:
        ConfigError: the folder holds something else, which the run would overwrite.
        WriteError: the folder cannot be made or written.
    """
    folder = Path(config.output_dir).expanduser()
    check_can_be_made(folder / RUN)
    if config.overwrite_output_dir or not folder.is_dir() or not any(folder.iterdir()):
        return "new"
    mend = "choose another --output_dir, or pass --overwrite_output_dir to replace it"
    if not (folder / RUN).is_file():
        raise ConfigError(f'output_dir "{config.output_dir}" is not empty and holds no run of peft-lab; {mend}.')
    # a run writes this file last, so without it the run was interrupted
    finished = (folder / METRICS).is_file()
    there, here = RunConfig.from_mapping(read_run_file(folder / RUN), str(folder / RUN)).identity(), config.identity()
    differing = [key for key in sorted({*there, *here}) if there.get(key) != here.get(key)]
    if differing:
        changes = "; ".join(
            f"{key}: {there.get(key, 'unset')} there, {here.get(key, 'unset')} here" for key in differing
        )
        state = "a finished" if finished else "an unfinished"
        raise ConfigError(f'output_dir "{config.output_dir}" holds {state} run with other options ({changes}); {mend}.')
    return "finished" if finished else "started"


def remove_run(folder: Path) -> None:
    """Remove the files of an earlier run, checkpoints included, and nothing else."""
    for pattern in (*_OF_A_RUN, "checkpoint-*"):
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def remove_results(folder: Path) -> None:
    """Remove what a run writes at its end, and leave its options and checkpoints."""
    for pattern in _OF_A_RUN:
        for path in folder.glob(pattern):
            if path.name != RUN:
                path.unlink()


def write_run(config: RunConfig, folder: Path) -> None:
    """Write the options of a run, without a token among them."""
    # run.yaml repeats the run, and must not replace a folder that nobody asked to replace
    values = {key: value for key, value in config.to_dict().items() if key not in ("hub_token", "overwrite_output_dir")}
    write_text(folder / RUN, dump_yaml(values))


def read_metrics(folder: Path) -> dict[str, Any]:
    """Content of metrics.json; empty for an adapter from elsewhere.

    Raises:
        ConfigError: the file is not a JSON mapping, or not of the form of a run's metrics.
    """
    metrics = safe_files.read_json(folder / METRICS)
    check_form(metrics, f'"{folder / METRICS}"')
    return metrics


def read_origin(folder: Path) -> dict[str, str]:
    """Origin of a saved adapter, as far as it is known.

    Keys: `task`, `task_file` (the digest of the user's own), `model_name_or_path`, `model_revision`, `dtype`,
    `quantization`. Paths are those of run.yaml, because metrics.json holds none of this machine.

    Raises:
        ConfigError: a value is not what it should be; a folder may come from anywhere.
    """
    metrics = read_metrics(folder)
    run, data = metrics.get("run", {}), metrics.get("data", {})
    names = ("task", "model_name_or_path", "model_revision", "dtype", "quantization")
    found = {name: run[name] for name in names if run.get(name) is not None}
    found |= _typed_names(folder, found)
    if data.get("task_file") is not None:
        found["task_file"] = data["task_file"]
    if found.get("dtype", "auto") not in DTYPES:
        raise ConfigError(f'"{folder / METRICS}" names {found["dtype"]!r} as dtype, which cannot be.')
    if found.get("quantization", "nf4") not in FORMS:
        raise ConfigError(f'"{folder / METRICS}" names {found["quantization"]!r} as quantization, which cannot be.')
    return found


def read_labels(folder: Path) -> list[str] | None:
    """Label names in the order of the model's outputs; None without any.

    Raises:
        ConfigError: the file is not the label map that `write_labels` wrote.
    """
    id2label = safe_files.read_json(folder / LABELS).get("id2label")
    if id2label is None:
        return None
    if not isinstance(id2label, dict) or sorted(id2label) != sorted(str(i) for i in range(len(id2label))):
        raise ConfigError(f'"{folder / LABELS}" must map 0, 1, ... to class names under "id2label".')
    labels = [id2label[str(index)] for index in range(len(id2label))]
    if len(labels) > MAX_LABELS or not all(isinstance(label, str) for label in labels):
        raise ConfigError(f'"{folder / LABELS}" must hold at most {MAX_LABELS:,} class names, which are texts.')
    return labels


def read_tuned(folder: Path) -> dict[str, Any]:
    """Options of the task that a run has chosen on its validation rows; empty without any.

    Raises:
        ConfigError: they are no mapping; a folder may come from anywhere.
    """
    found = safe_files.read_json(folder / LABELS).get("tuned", {})
    if not isinstance(found, dict):
        raise ConfigError(f'"{folder / LABELS}" must hold a mapping under "tuned".')
    return found


def write_labels(folder: Path, labels: list[str], tuned: Mapping[str, Any] | None = None) -> None:
    """Write the label map in both directions, with options of the task that were chosen on validation rows."""
    id2label = {str(index): label for index, label in enumerate(labels)}
    values: dict[str, Any] = {"id2label": id2label, "label2id": {label: i for i, label in enumerate(labels)}}
    write_json(folder / LABELS, values | ({"tuned": dict(tuned)} if tuned else {}))


def weights_bytes(folder: Path) -> int:
    """Size of the weights that a run saved, in bytes.

    That is the adapter file, with the masks of a pruned base if there are some, or the whole model of full fine-tuning.
    """
    adapter = folder / ADAPTER_WEIGHTS
    # transformers splits a large model over several files
    files = [adapter, *folder.glob(PRUNING_MASKS)] if adapter.is_file() else list(folder.glob("model*.safetensors"))
    return sum(file.stat().st_size for file in files)


def find_adapter(name: str | Path, revision: str | None = None) -> Path:
    """Local folder of a trained adapter or model.

    A Hub id is downloaded, at a branch, tag or commit if one is given.

    Raises:
        ConfigError: there is no such folder, it holds no safetensors weights, or something that `safe_files` refuses.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if not _may_be_hub_id(str(name)):
            near = (
                did_you_mean(folder.name, [p.name for p in folder.parent.glob("*/")]) if folder.parent.is_dir() else ""
            )
            raise ConfigError(f'There is no adapter folder "{name}".{near}')
        folder = _download(str(name), revision)
    # before any file is opened, because links in a foreign folder may lead out of it
    safe_files.check_folder(folder)
    for config, weights in ((ADAPTER_CONFIG, ADAPTER_WEIGHTS), (MODEL_CONFIG, MODEL_WEIGHTS)):
        if (folder / config).is_file():
            if (folder / weights).is_file() or (config == MODEL_CONFIG and list(folder.glob("model-*.safetensors"))):
                return folder
            raise ConfigError(f'"{name}" has {config} but no {weights}; only safetensors files are read.')
    raise ConfigError(f'"{name}" is not an adapter folder: it has no {ADAPTER_CONFIG}.')


def refuse_filled(folder: Path) -> None:
    """Raise an error if `folder` is a file, holds something, or cannot be made.

    Raises:
        ConfigError: it is a file, or already holds something.
        WriteError: it cannot be made or written.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ConfigError(f'"{folder}" already exists and is not empty; name a new folder.')
    check_can_be_made(folder)


def _may_be_hub_id(name: str) -> bool:
    parts = name.split("/")
    # a name below a folder that exists is a misspelt path
    return len(parts) == 2 and all(parts) and parts[0] not in (".", "..", "~") and not Path(parts[0]).is_dir()


def is_download(name: str | Path) -> bool:
    """Test whether an adapter comes from the Hub or its cache.

    No value in it may then point to files of this machine.
    """
    folder = Path(name).expanduser()
    # the cache of the Hub keeps each commit in a folder of `snapshots`
    return not folder.is_dir() or folder.resolve().parent.name == "snapshots"


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        # neither pickles nor Python files, because both can run code
        patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.yaml", "*.jinja"]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f'There is no folder "{name}", and the Hub gave no adapter of that name: {reason}') from error


def _typed_names(folder: Path, found: Mapping[str, str]) -> dict[str, str]:
    """Task and base as run.yaml has them, where they are those that metrics.json means."""
    if not found or not (folder / RUN).is_file():
        return {}
    typed = read_run_file(folder / RUN)
    named = {}
    for name in ("task", "model_name_or_path"):
        value = typed.get(name)
        # a file that was changed after the run tells of another run
        if isinstance(value, str) and name in found and shared_options({name: value}) == {name: found[name]}:
            named[name] = value
    return named


def shared_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a run as files that are shared hold them, without absolute paths.

    A backbone has the name by which others can load it, else `./` and the last part of its path, which no one can take
    for a Hub id.
    """
    found = {key: without_paths(value) for key, value in options.items()}
    base = options.get("model_name_or_path")
    if base is not None and found["model_name_or_path"] != base:
        found["model_name_or_path"] = public_name(base) or f"./{found['model_name_or_path']}"
    return found


def without_paths(value: Any) -> Any:
    """Values without absolute paths, of which the last part is left."""
    if isinstance(value, Mapping):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    # pathlib would not see the paths of a run from Windows on another system
    if isinstance(value, str) and re.match(r"(/|~/|[A-Za-z]:[\\/]).", value):
        return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    return value
