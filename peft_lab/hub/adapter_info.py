"""Facts on a saved adapter, read from its JSON files and the headers of its weights.

Imports nothing heavy: no tensor is read, and neither the base nor the task's data are looked for.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_lab import registry
from peft_lab.adapter_files.names import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE_RECORD,
    MODEL_CONFIG,
    PRUNED_BASE,
    PRUNING,
    is_head_alone,
)
from peft_lab.backbones.pypi_weights import BACKBONES
from peft_lab.errors import ConfigError, PeftLabError
from peft_lab.hub import usage
from peft_lab.metrics.baselines import baselines_of, beside_baselines
from peft_lab.registry import MethodInfo
from peft_lab.runs import run_folder
from peft_lab.runs.pruning import read_record
from peft_lab.runs.trained_task import trained_task
from peft_lab.utils import source_reader
from peft_lab.utils.bounded_files import read_json
from peft_lab.utils.safetensors_header import read_header

#: Keys of adapter_config.json that are told elsewhere, or that say what peft is and not what the adapter is.
_NOT_ARGUMENTS = frozenset(
    (
        *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", PRUNED_BASE, "fingerprints", "requires", "megatron_core", "runtime_config"),
    )
)


def adapter_info(name: str | Path, revision: str | None = None) -> dict[str, Any]:
    """Facts on an adapter or a whole model, as plain values; None for what its files do not say.

    Args:
        name: folder of a run, any folder of a peft adapter, or a Hub id.
        revision: branch, tag or commit on the Hub.

    Raises:
        ConfigError: there is no such adapter, or a file in it is not what it should be.
    """
    folder = run_folder.find_adapter(name, revision)
    metrics, config = run_folder.read_metrics(folder), read_json(folder / ADAPTER_CONFIG)
    method = _method(folder, config, metrics)
    origin, pruning = run_folder.read_origin(folder), read_record(folder)
    return {
        "adapter": str(name),
        "folder": str(folder),
        "trained_by_peft_lab": bool(metrics),
        "method": _of_method(method, config, metrics),
        "base_model": {**_base(config, origin, metrics), "pruned": None if pruning is None else pruning.in_words()},
        "fingerprint": _fingerprint(folder, config),
        "size_bytes": run_folder.weights_bytes(folder),
        "parameters": _parameters(folder, metrics),
        "task": _task(folder, name, config, origin, metrics),
        "score": _score(metrics),
        "versions": dict(metrics.get("versions", {})) or _peft_version(config),
        "device": metrics.get("device"),
        "merges": _can(method, "merge"),
        "mixed_batch": _can(method, "mixed_batch"),
        "load": _usage(folder, name, method, config, origin, metrics).lines,
    }


def _method(folder: Path, config: Mapping[str, Any], metrics: Mapping[str, Any]) -> MethodInfo | None:
    """Card of the method: the run's, else the one of the peft type; None for a whole model or a head of anybody."""
    # a run that was converted has the name of the original method, and the files of a LoRA adapter
    named = None if "lora_export" in metrics else metrics.get("run", {}).get("method")
    if named is not None:
        return registry.method(named)
    if not config or is_head_alone(config):
        return None
    peft_type = config.get("peft_type")
    if not isinstance(peft_type, str):
        raise ConfigError(f'"{folder / ADAPTER_CONFIG}" has no peft_type, so its method is not known.')
    return registry.method(peft_type.lower())


def _of_method(info: MethodInfo | None, config: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
    if info is None:
        title = "head alone" if config else "whole model"
        return {"name": None, "title": title, "paper": None, "arguments": {}, "converted_from": None}
    defaults = {field.name: field.default for field in registry.config_fields(info.name).values()}
    arguments = {}
    for key, value in config.items():
        # what stands at its default is left out, and so is what is empty
        if key not in _NOT_ARGUMENTS and value not in (None, {}, [], "", False) and value != defaults.get(key):
            arguments[key] = value
    export = metrics.get("lora_export")
    return {
        "name": info.name,
        "title": info.title,
        "paper": info.paper or None,
        "arguments": arguments,
        "converted_from": export.get("title") if export else None,
    }


def _base(config: Mapping[str, Any], origin: Mapping[str, str], metrics: Mapping[str, Any]) -> dict[str, Any]:
    named = origin.get("model_name_or_path") or config.get("base_model_name_or_path")
    revision = metrics.get("base_revision") or origin.get("model_revision") or config.get("revision")
    return {
        "name": named if isinstance(named, str) and named else None,
        "revision": revision if isinstance(revision, str) else None,
        "dtype": origin.get("dtype"),
        "quantization": origin.get("quantization"),
    }


def _fingerprint(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Number of base weights that are recorded, and one digest of all of them; None if there is no record."""
    # adapters of ours keep the record in their config, those of peft's tuners in a file beside it
    recorded = config.get("fingerprints") or read_json(folder / BASE_RECORD).get("modules")
    if not isinstance(recorded, dict) or not all(isinstance(entry, dict) for entry in recorded.values()):
        return None
    lines = [f"{name} {entry.get('sha256')}" for name, entry in sorted(recorded.items())]
    return {"weights": len(lines), "sha256": hashlib.sha256("\n".join(lines).encode()).hexdigest()}


def _parameters(folder: Path, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters in the files, their dtypes, and those that the run counted."""
    adapter = folder / ADAPTER_WEIGHTS
    entries: dict[str, tuple[str, list[int]]] = {}
    for file in [adapter] if adapter.is_file() else sorted(folder.glob("model*.safetensors")):
        entries |= read_header(file)
    counted = metrics.get("parameters", {})
    return {
        "saved": sum(math.prod(shape) for _, shape in entries.values()),
        "dtypes": sorted({dtype for dtype, _ in entries.values()}),
        "trained": counted.get("trainable"),
        "total": counted.get("total"),
    }


def _task(
    folder: Path, name: str | Path, config: Mapping[str, Any], origin: Mapping[str, str], metrics: Mapping[str, Any]
) -> dict[str, Any]:
    data, labels = metrics.get("data", {}), run_folder.read_labels(folder)
    found: dict[str, Any] = {
        "name": data.get("task") or origin.get("task"),
        "kind": None,
        "task_type": config.get("task_type") if isinstance(config.get("task_type"), str) else None,
        "labels": labels,
        "rows": dict(data.get("rows", {})),
        "data_fingerprint": data.get("fingerprint") or None,
        "licence": None,
    }
    try:
        task = trained_task(folder, origin, None, run_folder.is_download(name))
    except PeftLabError:
        # an adapter from elsewhere names no task, and the file of one's own may have gone
        return found
    return {**found, "name": task.name, "kind": task.kind, "licence": task.licence or None}


def _score(metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """Main metric beside its baselines, on the test rows if they were scored; None without one."""
    scores, metric = metrics.get("metrics", {}), metrics.get("main_metric")
    split = next((each for each in ("test", "validation", *scores) if metric in scores.get(each, {})), None)
    if split is None or metric is None:
        return None
    return {
        "metric": metric,
        "split": split,
        "value": scores[split][metric],
        "baselines": dict(baselines_of(metrics, split, metric)),
        "beats_baseline": metrics.get("beats_baseline"),
        "sentence": beside_baselines(metrics),
    }


def _peft_version(config: Mapping[str, Any]) -> dict[str, str]:
    version = config.get("peft_version")
    return {"peft": version} if isinstance(version, str) and version else {}


def _can(info: MethodInfo | None, capability: str) -> bool | None:
    """Test whether a method declares a capability; None without a card, as for most tuners of peft."""
    return None if info is None or info.place == "peft" else info.can(capability)


def _usage(
    folder: Path,
    name: str | Path,
    info: MethodInfo | None,
    config: Mapping[str, Any],
    origin: Mapping[str, str],
    metrics: Mapping[str, Any],
) -> usage.Usage:
    source = str(name)
    if not config:
        classes = read_json(folder / MODEL_CONFIG).get("architectures")
        is_named = isinstance(classes, list) and bool(classes) and str(classes[0]).isidentifier()
        return usage.of_model(source, str(classes[0]) if is_named and classes else "AutoModel")
    task_type = config.get("task_type") if isinstance(config.get("task_type"), str) else None
    if not metrics or info is None:
        return usage.of_foreign_adapter(source, info, task_type, usage.head_outputs(folder))
    base = str(config.get("base_model_name_or_path") or "")
    # peft would load a quantised base unquantised and a pruned one dense, and knows no short name
    if origin.get("quantization") or (folder / PRUNING).is_file() or base in BACKBONES:
        return usage.by_peft_lab(source)
    keeps_head = info.path is not None and source_reader.sets_attribute(info.path, "uses_source_head")
    return usage.of_adapter(source, info, task_type, metrics.get("data", {}).get("labels"), keeps_head)
