"""Put things together in memory: a backbone for a task, a method on a backbone, a saved adapter on its base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel, get_peft_model
from torch import nn

from peft_lab import registry, roles, run_folder
from peft_lab.backbones import BACKBONES, reachable_name, resolve_model
from peft_lab.data import load_splits
from peft_lab.errors import AdapterMismatchError, ConfigError, PeftLabError, TaskError, did_you_mean
from peft_lab.registry import MethodInfo
from peft_lab.task import kind as task_kind
from peft_lab.task import load_task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peft_lab.kind import Kind
    from peft_lab.task_schema import Task


def load_base(
    kind: Any, task: Task, labels: Any, name: str, revision: str | None = None, dtype: str | None = None
) -> tuple[Any, PreTrainedModel]:
    """Processor and model of a backbone for a task.

    Raises:
        ConfigError: there is no such backbone, or it does not fit the kind of task.
    """
    path = resolve_model(name)
    hub: dict[str, Any] = {"revision": revision} if revision else {}
    try:
        processor = kind.load_processor(path, task, **hub)
        model = kind.load_model(path, task, labels, **hub, **({"dtype": dtype} if dtype else {}))
    except PeftLabError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(_why_not(name, kind, error)) from error
    return processor, model


def _why_not(name: str, kind: Any, error: Exception) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f'Backbone "{name}" cannot be loaded for kind "{kind.name}".{did_you_mean(name, BACKBONES)} {first}'


def adapt(
    model: PreTrainedModel, info: MethodInfo, args: Mapping[str, Any], task_type: str | None = None
) -> PreTrainedModel | PeftModel:
    """Put a method on a model, or for a baseline choose which of the model's own weights are trained.

    A baseline trains the modules that play its `roles`, or everything if it names none.

    Raises:
        ConfigError: nothing would be trained.
    """
    if info.kind != "baseline":
        config = registry.make_config(info.name, args, model=model, task_type=task_type)
        try:
            return get_peft_model(model, config)
        except PeftLabError:
            raise
        except (ValueError, TypeError, NotImplementedError) as error:
            raise ConfigError(
                f'Method "{info.name}" with {dict(args)} does not fit this model: {" ".join(str(error).split())}'
            ) from error
    if info.roles:
        model.requires_grad_(False)
        paths = [path for role in info.roles for path in roles.modules_by_role(model, role)]
        for path in paths:
            model.get_submodule(path).requires_grad_(True)
        if not paths:
            raise ConfigError(f'Baseline "{info.name}" finds no {" or ".join(info.roles)} in {type(model).__name__}.')
    return model


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Trainable and total parameters; what peft keeps twice (a saved head and its original) counts twice."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


@dataclass
class Loaded:
    """A trained adapter (or baseline) ready to use.

    Attributes:
        model: in evaluation mode, with the task head and its label names.
        processor: the tokenizer or image processor that it was trained with.
        task, kind: what it was trained for.
        labels: class names in the order of the outputs; None for regression and generation.
        folder: where it was loaded from.
    """

    model: PreTrainedModel | PeftModel
    processor: Any
    task: Task
    kind: Kind
    labels: list[str] | None
    folder: Path


def load(
    adapter: str | Path, task: str | Task | None = None, model_name_or_path: str | None = None, dtype: str | None = None
) -> Loaded:
    """Load an adapter on its base, with the head, the labels and the processor it was trained with.

    Args:
        adapter: folder of a run, any folder of a peft adapter, or a Hub id.
        task: the task whose kind and labels apply, if the folder does not say it.
        model_name_or_path: the base to load instead of the one that was trained on.
        dtype: dtype of the base; the one of the training by default.

    Raises:
        ConfigError: no such adapter or base, or the task is not known.
        AdapterMismatchError: the adapter does not fit this base.
    """
    folder = run_folder.find_adapter(adapter)
    run = run_folder.read_origin(folder)
    found = trained_task(folder, run, task)
    kind, labels = task_kind(found.kind), run_folder.read_labels(folder)
    if labels is None:
        labels = list(found.labels) or _labels_of_data(found)
    dtype = dtype or run.get("dtype")
    revision = run.get("model_revision") if model_name_or_path is None else None
    base = model_name_or_path or base_of(folder, run)
    processor, bare = load_base(kind, found, labels, base, revision, dtype)
    adapted = (folder / run_folder.ADAPTER_CONFIG).is_file()
    model = _put_on(bare, folder, base) if adapted else bare
    return Loaded(model.eval(), processor, found, kind, labels, folder)


def _labels_of_data(task: Task) -> list[str] | None:
    """The labels of a task that reads them from its rows; None for regression and generation."""
    if "label" not in task.columns or task.problem_type == "regression":
        return None
    return list(load_splits(task).labels or ()) or None


def base_of(folder: Path, run: dict[str, str]) -> str:
    """The base that an adapter's folder names: that of its run, else that of its adapter_config.json.

    Raises:
        ConfigError: it names none.
    """
    config_file = folder / run_folder.ADAPTER_CONFIG
    if not config_file.is_file():
        return str(folder)
    named = run.get("model_name_or_path") or json.loads(config_file.read_text(encoding="utf-8")).get(
        "base_model_name_or_path"
    )
    if not named:
        raise ConfigError(f'"{folder}" does not name its base; pass model_name_or_path.')
    return reachable_name(str(named))


def trained_task(folder: Path, run: dict[str, str], task: str | Task | None = None) -> Task:
    """The task asked for, else the one of the run: by its name or file, else by the copy in the folder.

    Raises:
        ConfigError: neither is there.
    """
    if task is not None:
        return load_task(task)
    named, copy = run.get("task"), folder / run_folder.TASK
    if named:
        try:
            return load_task(named)
        except TaskError:
            if not copy.is_file():
                raise
    if copy.is_file():
        return load_task(copy)
    raise ConfigError(f'"{folder}" does not say which task it was trained on; name one.')


def _put_on(model: PreTrainedModel, folder: Path, base: str) -> PeftModel:
    try:
        return PeftModel.from_pretrained(model, str(folder))
    except PeftLabError:
        raise
    except (RuntimeError, ValueError, KeyError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        shown = next((line for line in lines if "size mismatch" in line), lines[0] if lines else type(error).__name__)
        raise AdapterMismatchError(f'The adapter in "{folder}" does not fit base "{base}": {shown}') from error
