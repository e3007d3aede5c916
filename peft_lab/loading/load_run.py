"""Put things together in memory: a backbone for a task, a method on a backbone, a saved adapter on its base."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError
from torch import nn

from peft_lab import registry
from peft_lab.adapter_files import base_fingerprint, module_matching, safe_files
from peft_lab.adapter_files.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from peft_lab.backbones import module_roles
from peft_lab.backbones.from_pretrained import load_checkpoint
from peft_lab.backbones.pypi_weights import BACKBONES, reachable_name, resolve_model
from peft_lab.data.splits import load_splits
from peft_lab.data.task_registry import kind as task_kind
from peft_lab.data.task_registry import list_tasks, load_task
from peft_lab.errors import AdapterMismatchError, ConfigError, PeftLabError, TaskError, did_you_mean
from peft_lab.loading import config_files
from peft_lab.registry import MethodInfo
from peft_lab.runs import run_folder
from peft_lab.tuners.config import AdapterConfig
from peft_lab.tuners.registration import has_trait, make_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peft_lab.data.task_schema import Task
    from peft_lab.tasks.kinds._base import Kind


def load_base(
    kind: Any,
    task: Task,
    labels: Any,
    name: str,
    revision: str | None = None,
    dtype: str | None = None,
    keep_head: bool = False,
) -> tuple[Any, PreTrainedModel]:
    """Processor and model of a backbone for a task, with a head for its labels or the one it was trained with.

    Raises:
        ConfigError: there is no such backbone, or it does not fit the kind of task.
    """
    path = resolve_model(name)
    hub: dict[str, Any] = {"revision": revision} if revision else {}
    try:
        processor = kind.load_processor(path, task, **hub)
        options = {**hub, **({"dtype": dtype} if dtype else {})}
        if keep_head:
            model = kind.load_classifier(path, task, **options)
        else:
            model = kind.load_model(path, task, labels, **options)
    except PeftLabError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(_why_not(name, kind, error)) from error
    return processor, model


def _why_not(name: str, kind: Any, error: Exception) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f'Backbone "{name}" cannot be loaded for kind "{kind.name}".{did_you_mean(name, BACKBONES)} {first}'


def adapt(
    model: PreTrainedModel,
    info: MethodInfo,
    args: Mapping[str, Any],
    task_type: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> PreTrainedModel | PeftModel:
    """Put a method on a model, or for a baseline choose which of the model's own weights are trained.

    A baseline with the role "head" trains the task head alone, as an adapter (`peft_config.of_head`); one without roles
    trains everything. `settings` are values for those config fields that the method has of them, such as
    `Kind.adapter_settings` gives; `args` come first.

    Raises:
        ConfigError: nothing would be trained.
    """
    if info.place != "baseline":
        config = make_config(info.name, args, model=model, task_type=task_type, **settings or {})
        try:
            adapted = get_peft_model(model, config)
        except PeftLabError:
            raise
        except (ValueError, TypeError, NotImplementedError) as error:
            raise ConfigError(
                f'Method "{info.name}" with {dict(args)} does not fit this model: {" ".join(str(error).split())}'
            ) from error
        if not any(parameter.requires_grad for parameter in adapted.parameters()):
            raise ConfigError(
                f'Method "{info.name}" with {dict(args)} leaves nothing to train in {type(model).__name__}; name what '
                "to train in modules_to_save."
            )
        return adapted
    if "head" not in info.roles:
        return model
    if not module_roles.head_modules(model):
        raise ConfigError(
            f'Baseline "{info.name}" finds no task head in {type(model).__name__}, which it could train alone.'
        )
    return get_peft_model(model, config_files.of_head(model, task_type))


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
    adapter: str | Path,
    task: str | Task | None = None,
    model_name_or_path: str | None = None,
    dtype: str | None = None,
    *,
    allow_other_base: bool = False,
    revision: str | None = None,
) -> Loaded:
    """Load an adapter on its base, with the head, the labels and the processor it was trained with.

    Args:
        adapter: folder of a run, any folder of a peft adapter, or a Hub id.
        task: the task whose kind and labels apply, if the folder does not say it.
        model_name_or_path: the base to load instead of the one that was trained on.
        dtype: dtype of the base; the one of the training by default.
        allow_other_base: warn instead of refusing where the base's weights differ from those trained on.
        revision: branch, tag or commit of the adapter on the Hub.

    Raises:
        ConfigError: no such adapter or base, the task is not known, or a file of the folder is not what it should be.
        AdapterMismatchError: the adapter does not fit this base.
    """
    folder = run_folder.find_adapter(adapter, revision)
    run, download = run_folder.read_origin(folder), run_folder.is_download(adapter)
    found = trained_task(folder, run, task, download)
    kind, labels = task_kind(found.kind), run_folder.read_labels(folder)
    if labels is None:
        labels = list(found.labels) or _labels_of_data(found)
    dtype = dtype or run.get("dtype")
    revision = run.get("model_revision") if model_name_or_path is None else None
    base = model_name_or_path or base_of(folder, run, download)
    processor, bare = load_base(kind, found, labels, base, revision, dtype, keeps_head(folder))
    model: Any = bare
    if (folder / ADAPTER_CONFIG).is_file():
        model = load_adapter(bare, folder, allow_other_base=allow_other_base)
    return Loaded(model.eval(), processor, found, kind, labels, folder)


def load_image_classifier(
    adapter: str | Path, model_name_or_path: str | None = None, *, allow_other_base: bool = False
) -> tuple[PeftModel, Any]:
    """An adapter that names no task on its base, an image classifier, and the base's image processor.

    The labels are those saved with the adapter, else those of the base.

    Raises:
        ConfigError, AdapterMismatchError: as `load`.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

    folder = run_folder.find_adapter(adapter)
    run, download = run_folder.read_origin(folder), run_folder.is_download(adapter)
    name = model_name_or_path or base_of(folder, run, download)
    path = resolve_model(name)
    try:
        labels = run_folder.read_labels(folder) or [*AutoConfig.from_pretrained(path).id2label.values()]
        processor = AutoImageProcessor.from_pretrained(path, backend="pil")
        base, _ = load_checkpoint(
            AutoModelForImageClassification,
            path,
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
            ignore_mismatched_sizes=True,  # a head for other labels
        )
    except (OSError, ValueError, ImportError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f'Backbone "{name}" cannot be loaded as an image classifier: {first}') from error
    return load_adapter(base, folder, allow_other_base=allow_other_base).eval(), processor


def load_adapter(
    model: Any,
    adapter: str | Path,
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
    allow_other_base: bool = False,
    revision: str | None = None,
) -> PeftModel:
    """Put a saved adapter of any method on a model, under whatever names the model has its modules.

    Does what `PeftModel.from_pretrained` does, and more: every file is checked before it is read, modules are found
    under the names of other versions and with or without a head, the base is compared with the one trained on, and
    the file must hold exactly the adapter.

    Args:
        model: the base, or a `PeftModel` that gets one more adapter.
        adapter: folder or Hub id.
        adapter_name, is_trainable: as in peft.
        allow_other_base: warn instead of refusing where the base's weights differ from those trained on.
        revision: branch, tag or commit of the adapter on the Hub.

    Raises:
        ConfigError: a file is not what it should be.
        AdapterMismatchError: the adapter does not fit this base.
    """
    folder = run_folder.find_adapter(adapter, revision)
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise ConfigError(f'"{folder}" is no adapter: it has no {ADAPTER_WEIGHTS}.')
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    safe_files.check_size(weights, 4 * sum(p.numel() * p.element_size() for p in base.parameters()) + _SPARE_BYTES)
    safe_files.read_header(weights)
    with tempfile.TemporaryDirectory() as scratch, base_fingerprint.any_base(allow_other_base):
        try:
            return _put_on(model, base, folder, Path(scratch), adapter_name, is_trainable)
        except PeftLabError:
            raise
        except _OF_PEFT as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            shown = next((line for line in lines if "size mismatch" in line), lines[0])
            raise AdapterMismatchError(
                f'The adapter in "{folder}" does not fit {type(base).__name__}: {shown}'
            ) from error


#: An adapter's file may be larger than its base by this much: heads, embeddings of new tokens.
_SPARE_BYTES = 2**26
#: What peft, torch and safetensors raise about an adapter that does not fit.
_OF_PEFT = (
    *(RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError, NotImplementedError, AssertionError),
    *(ArithmeticError, OSError, ImportError, SafetensorError),
)


def _put_on(model: Any, base: Any, folder: Path, scratch: Path, adapter_name: str, is_trainable: bool) -> PeftModel:
    config = config_files.read_config(folder)
    config_files.check_sizes(config, max((size for p in base.parameters() for size in p.shape), default=1))
    own = isinstance(config, AdapterConfig)
    source = folder if own else module_matching.adapt_folder(folder, base, scratch)
    if source != folder:
        config = config_files.read_config(source)
    if not own:
        module_matching.check_record(base, source)
    options: dict[str, Any] = {"is_trainable": is_trainable}
    if not own and not config.is_prompt_learning:
        # Nothing is allocated for what the config asks before it is known to be in the file.
        options["low_cpu_mem_usage"] = True
    if isinstance(model, PeftModel):
        model.load_adapter(str(source), adapter_name, **options)
    else:
        model = PeftModel.from_pretrained(model, str(source), adapter_name, config=config, **options)
    if not own:
        _check_complete(model, safe_files.read_header(source / ADAPTER_WEIGHTS), adapter_name)
    return model


def keeps_head(folder: Path) -> bool:
    """Whether the adapter in a folder is for a base with the head that it was trained with."""
    name = str(safe_files.read_json(folder / ADAPTER_CONFIG).get("peft_type", "")).lower()
    info = registry.list_methods().get(name)
    return info is not None and has_trait(info, "uses_source_head")


def _base_name(base: Any) -> str:
    return getattr(base, "name_or_path", "") or type(base).__name__


def _check_complete(model: PeftModel, header: Mapping[str, Any], adapter_name: str) -> None:
    """peft only warns of entries that a file lacks, and says nothing of those that it ignores."""
    wanted = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    missing, extra = sorted({*wanted} - {*header}), sorted({*header} - {*wanted})
    extra = [key for key in extra if "embed" not in key or "lora" in key]  # resized embeddings come along
    if missing or extra:
        what = f'lacks "{missing[0]}"' if missing else f'has an unknown entry "{extra[0]}"'
        raise ConfigError(
            f"The adapter file {what} ({len(missing)} missing, {len(extra)} unknown entries); it was cut short or "
            "belongs to another model."
        )
    buffers = {buffer.data_ptr() for buffer in model.buffers()}
    for key, value in wanted.items():
        if not value.is_floating_point() and value.data_ptr() in buffers:
            continue
        if not value.is_floating_point() or not bool(value.isfinite().all()):
            raise ConfigError(f'Adapter entry "{key}" holds values that are not finite numbers; train it again.')


def _labels_of_data(task: Task) -> list[str] | None:
    """The labels of a task that reads them from its rows; None for regression and generation."""
    if "label" not in task.columns or task.problem_type == "regression":
        return None
    return list(load_splits(task).labels or ()) or None


def base_of(folder: Path, run: dict[str, str], download: bool = False) -> str:
    """The base that an adapter's folder names: that of its run, else that of its adapter_config.json.

    Raises:
        ConfigError: it names none, or a download names a folder of this machine.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        return str(folder)
    named = run.get("model_name_or_path") or safe_files.read_json(folder / ADAPTER_CONFIG).get(
        "base_model_name_or_path"
    )
    if not named or not isinstance(named, str):
        raise ConfigError(f'"{folder}" does not name its base; pass model_name_or_path.')
    named = reachable_name(named)
    if download and not _is_public(named):
        raise ConfigError(
            f'The download names "{named}" as its base, which is not a name on the Hub; pass --model_name_or_path with '
            "a base that you trust."
        )
    return named


def _is_public(name: str) -> bool:
    """Whether a name can only mean a backbone of ours or one on the Hub."""
    return name in BACKBONES or (bool(re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name)) and not Path(name).exists())


def trained_task(folder: Path, run: dict[str, str], task: str | Task | None = None, download: bool = False) -> Task:
    """The task asked for, else the one of the run: a built-in one by its name, else the copy in the folder.

    A task file of your own is followed to where it was at training time if it still is what the folder has a copy of,
    so that its data are found beside it. Otherwise the copy is taken, and reads only data in the folder itself.

    Raises:
        ConfigError: neither is there.
    """
    if task is not None:
        return load_task(task)
    named, copy = run.get("task"), folder / run_folder.TASK
    if named and named in list_tasks():
        return load_task(named)
    if copy.is_file():
        safe_files.check_size(copy, safe_files.MAX_JSON_BYTES)
        if named and not download and _same_file(Path(named), copy):
            return load_task(Path(named))
        return _confined(load_task(copy))
    if named:
        raise TaskError(f'Unknown task "{named}".{did_you_mean(named, list_tasks())} Name one with --task.')
    raise ConfigError(f'"{folder}" does not say which task it was trained on; name one.')


def _same_file(path: Path, copy: Path) -> bool:
    return path.is_file() and path.stat().st_size == copy.stat().st_size and path.read_bytes() == copy.read_bytes()


def _confined(task: Task) -> Task:
    """The task without data files that lie outside its folder: a folder that came from elsewhere must not open them."""
    names = [name for group in task.data.files.values() for name in group]
    inside = all(not Path(name).is_absolute() and ".." not in Path(name).parts and "$" not in name for name in names)
    code = next(
        (metric for metric in task.metrics if metric.endswith(".py") or "/" in metric or os.sep in metric), None
    )
    if code is not None:
        raise TaskError(f'The task file beside the adapter names a metric to run, "{code}"; name a task with --task.')
    files = task.data.files if inside else {split: (f"{split} data of {task.name}",) for split in task.data.files}
    return task.model_copy(update={"data": task.data.model_copy(update={"files": files})})
