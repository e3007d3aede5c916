"""Loading of backbones, of methods onto them, and of trained runs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from peft_lab.backbones import module_roles
from peft_lab.backbones.checkpoint_limits import check_files
from peft_lab.backbones.from_pretrained import load_checkpoint
from peft_lab.backbones.pypi_weights import BACKBONES, resolve_model
from peft_lab.backbones.quantized_weight import count_values, dequantise
from peft_lab.data.splits import load_splits
from peft_lab.data.task_registry import kind as task_kind
from peft_lab.errors import ConfigError, PeftLabError, check_keys, did_you_mean
from peft_lab.loading.adapter_folder import AdapterFolder
from peft_lab.loading.config_files import head_config
from peft_lab.loading.load_adapter import load_folder
from peft_lab.registry import MethodInfo, with_preset
from peft_lab.runs import run_folder
from peft_lab.runs.trained_task import trained_task
from peft_lab.tuners.expert_layer import tell_left_out
from peft_lab.tuners.rank_check import check_rank
from peft_lab.tuners.registration import make_config
from peft_lab.utils.verbosity import without_deprecations_of_peft

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peft_lab.data.kind import Kind
    from peft_lab.data.task_schema import Task

logger = logging.getLogger("peft_lab")


def load_base(
    kind: Any,
    task: Task,
    labels: Any,
    name: str,
    revision: str | None = None,
    dtype: str | None = None,
    keep_head: bool = False,
    quantization: str | None = None,
) -> tuple[Any, PreTrainedModel]:
    """Load processor and model of a backbone for a task.

    The model gets a head for its labels, or keeps the one it was trained with. `quantization` is one of
    `peft_lab.backbones.quantized_loading.FORMS`.

    Raises:
        ConfigError: there is no such backbone, or it does not fit the kind of task.
    """
    path = resolve_model(name)
    # before the tokenizer is read, whose patterns may take for ever
    check_files(path, revision)
    hub: dict[str, Any] = {"revision": revision} if revision else {}
    try:
        processor = kind.load_processor(path, task, **hub)
        given = {"dtype": dtype, "quantization": quantization}
        options = {**hub, **{name: value for name, value in given.items() if value}}
        if keep_head:
            model = kind.load_classifier(path, task, **options)
        else:
            model = kind.load_model(path, task, labels, **options)
    # Our own errors are ValueErrors too, so they must be let through first.
    except PeftLabError:
        raise
    # damaged files end transformers and tokenizers by errors of any type
    except Exception as error:
        raise ConfigError(_why_not(name, path, kind, task, error)) from error
    logger.debug(
        'Backbone "%s" of %s: %s, %s parameters.', name, path, type(model).__name__, count_parameters(model)[1]
    )
    return processor, model


def _why_not(name: str, path: str, kind: Kind, task: Task, error: Exception) -> str:
    other = _other_inputs(path, kind, task)
    if other:
        return f'Backbone "{name}" {other}.'
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    near = "" if name in BACKBONES else did_you_mean(name, BACKBONES)
    return f'Backbone "{name}" cannot be loaded for kind "{kind.name}".{near} {first}'


#: Inputs of a model, by the first argument of its forward.
_READ = {"input_ids": "texts", "pixel_values": "images", "input_values": "sound", "input_features": "sound"}


def _other_inputs(path: str, kind: Kind, task: Task) -> str:
    """Fault of a backbone of a type that the kind of task has no model for; "" if there is one."""
    from transformers import AutoConfig, AutoModel

    try:
        auto_class = kind.auto_class(task)
        found = type(AutoConfig.from_pretrained(path, trust_remote_code=False))
        if found in auto_class._model_mapping:
            return ""
        model_classes: Any = AutoModel._model_mapping[found]
    # a config that cannot be read is the error that is reported already, and a kind may load models in its own way
    except (OSError, ValueError, TypeError, LookupError, AttributeError, ImportError, NotImplementedError):
        return ""
    reads = _READ.get(getattr(model_classes, "main_input_name", ""), "other inputs")
    return (
        f'reads {reads} ({found.model_type}), and kind "{kind.name}" has no model of this type; choose one that '
        f"transformers loads by {auto_class.__name__}"
    )


def adapt(
    model: PreTrainedModel,
    info: MethodInfo,
    args: Mapping[str, Any],
    task_type: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> PreTrainedModel | PeftModel:
    """Put a method on a model.

    For a baseline, choose the weights of the model that are trained.

    A baseline with the role "head" trains the task head alone, as an adapter (`head_config`); one without roles trains
    everything. `settings` are values for those config fields that the method has of them, such as
    `Kind.adapter_settings` gives; `args` come first.

    Raises:
        ConfigError: nothing would be trained.
    """
    if info.place != "baseline":
        config = make_config(info.name, args, model=model, task_type=task_type, **settings or {})
        if task_type is None and getattr(config, "is_prompt_learning", False):
            raise ConfigError(
                f'Method "{info.name}" of peft puts its prompts into models of peft\'s own task types alone, and '
                f"{type(model).__name__} has none of these for this kind of task; take another method."
            )
        try:
            with without_deprecations_of_peft():
                adapted = get_peft_model(model, config)
        except PeftLabError:
            raise
        except (ValueError, TypeError, NotImplementedError) as error:
            raise ConfigError(
                f'Method "{info.name}" with {dict(args)} does not fit this model: {" ".join(str(error).split())}'
            ) from error
        trains = any(parameter.requires_grad for parameter in adapted.parameters())
        if not info.takes_steps and trains:
            raise ConfigError(
                f'Method "{info.name}" is fitted without gradient steps, so that nothing of modules_to_save or '
                "trainable_token_indices would be trained; leave them out."
            )
        if info.takes_steps and not trains:
            raise ConfigError(
                f'Method "{info.name}" with {dict(args)} leaves nothing to train in {type(model).__name__}; name what '
                "to train in modules_to_save."
            )
        if args:
            check_rank(adapted, info, with_preset(info.name, args))
        # A tuner of ours says so itself, whoever adds it.
        logger.debug(
            'Method "%s" with %s: %s of %s parameters are trained.', info.name, dict(args), *count_parameters(adapted)
        )
        if info.module.startswith("peft.") and isinstance(adapted.base_model, BaseTuner):
            tell_left_out(adapted.get_base_model(), info, "default")
        return adapted
    # A baseline: the head alone, or all weights as they are.
    if "head" not in info.roles:
        return model
    if not module_roles.head_modules(model):
        raise ConfigError(
            f'Baseline "{info.name}" finds no task head in {type(model).__name__}, which it could train alone.'
        )
    with without_deprecations_of_peft():
        return get_peft_model(model, head_config(model, task_type))


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Count trainable and all parameters.

    A saved head counts twice, because peft keeps its original. Sharded parameters count whole.
    """
    parameters = [(parameter.requires_grad, count_values(parameter)) for parameter in model.parameters()]
    return sum(count for trained, count in parameters if trained), sum(count for _, count in parameters)


@dataclass
class Loaded:
    """Trained adapter or baseline, ready to use.

    Attributes:
        model: in evaluation mode, with the task head and its label names.
        processor: the tokenizer or image processor that it was trained with.
        task, kind: the task that it was trained for, and its kind.
        labels: class names in the order of the outputs; None for regression and generation.
        folder: the folder that it was loaded from.
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
    quantization: str | None = None,
    dequantised: bool = False,
    allow_other_base: bool = False,
    revision: str | None = None,
) -> Loaded:
    """Load an adapter with its base, head, labels and processor.

    Args:
        adapter: folder of a run, any folder of a peft adapter, or a Hub id.
        task: the task whose kind and labels apply, if the folder does not say it.
        model_name_or_path: the base to load instead of the one that was trained on.
        dtype: dtype of the base; the one of the training by default.
        quantization: form of the base, one of `peft_lab.backbones.quantized_loading.FORMS`, or "none"; the one of the
            training by default.
        dequantised: replace quantised weights by their values in float32, which an adapter can be merged into.
        allow_other_base: warn instead of refusing where the base's weights differ from those trained on.
        revision: branch, tag or commit of the adapter on the Hub.

    Raises:
        ConfigError: no such adapter or base, the task is not known, or a file of the folder is not what it should be.
        AdapterMismatchError: the adapter does not fit this base.
    """
    folder = AdapterFolder.find(adapter, revision)
    found = trained_task(folder.path, folder.origin, task, folder.is_download)
    kind, labels = task_kind(found.kind), folder.labels
    if labels is None:
        labels = list(found.labels) or _labels_of_data(found)
    found = _with_tuned(found, kind, folder)
    dtype = dtype or folder.origin.get("dtype")
    quantization = quantization or folder.origin.get("quantization")
    if quantization == "none":
        quantization = None
    # The recorded revision is one of the recorded base.
    base_revision = folder.origin.get("model_revision") if model_name_or_path is None else None
    base = model_name_or_path or folder.base_name()
    processor, bare = load_base(kind, found, labels, base, base_revision, dtype, folder.uses_source_head, quantization)
    if dequantised and dequantise(bare):
        bare.float()
    model: Any = load_folder(bare, folder, allow_other_base=allow_other_base) if folder.has_adapter else bare
    return Loaded(model.eval(), processor, found, kind, labels, folder.path)


def _with_tuned(task: Task, kind: Kind, folder: AdapterFolder) -> Task:
    """Return the task with the options that the run has chosen on its validation rows.

    Raises:
        ConfigError: the folder names options that the kind does not have.
        TaskError: the kind refuses their values.
    """
    if not kind.tunes(task):
        return task
    tuned = run_folder.read_tuned(folder.path)
    if not tuned:
        logger.warning(
            'Task "%s" asks for values that a run chooses on its validation rows, and "%s" holds none; the defaults '
            "are taken.",
            task.name,
            folder.path,
        )
        return task
    check_keys(tuned, kind.info.options, f'the tuned options of "{folder.path}"')
    found = task.with_options(tuned)
    kind.check(found)
    return found


def load_image_classifier(
    adapter: str | Path, model_name_or_path: str | None = None, *, allow_other_base: bool = False
) -> tuple[PeftModel, Any]:
    """Load an adapter that names no task, on an image classifier.

    Returns the model and the image processor of the base.

    The labels are those saved with the adapter, else those of the base.

    Raises:
        ConfigError, AdapterMismatchError: as `load`.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

    folder = AdapterFolder.find(adapter)
    name = model_name_or_path or folder.base_name()
    path = resolve_model(name)
    try:
        check_files(path)
        labels = folder.labels or [*AutoConfig.from_pretrained(path, trust_remote_code=False).id2label.values()]
        processor = AutoImageProcessor.from_pretrained(path, backend="pil", trust_remote_code=False)
        base, _ = load_checkpoint(
            AutoModelForImageClassification,
            path,
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
            ignore_mismatched_sizes=True,  # a head for other labels
        )
    except PeftLabError:
        raise
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f'Backbone "{name}" cannot be loaded as an image classifier: {first}') from error
    return load_folder(base, folder, allow_other_base=allow_other_base).eval(), processor


def _labels_of_data(task: Task) -> list[str] | None:
    """Return the labels of a task that reads them from its rows.

    None for regression and generation.
    """
    if not task_kind(task.kind).labelled or task.problem_type == "regression":
        return None
    return list(load_splits(task).labels or ()) or None


def method_config(model: Any) -> dict[str, Any]:
    """Config of the adapter as JSON holds it; empty without an adapter."""
    if not isinstance(model, PeftModel):
        return {}
    config = model.active_peft_config.to_dict()
    config.pop("fingerprints", None)  # they are in adapter_config.json
    for key, value in config.items():
        if isinstance(value, set):  # such as peft's target_modules, whose order differs from process to process
            config[key] = sorted(value)
    return config
