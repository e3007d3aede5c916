"""Public copy of a run's folder.

It holds no path of this machine, no token and no pickle.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import eval_result_entries_to_yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from peft_lab import registry
from peft_lab.adapter_files.names import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE_RECORD,
    PRUNING,
    PRUNING_MASKS,
    write_json,
)
from peft_lab.backbones.pypi_weights import BACKBONES, is_local, public_name
from peft_lab.errors import ConfigError
from peft_lab.hub.evaluation_results import eval_entries
from peft_lab.hub.model_card import LOCAL_OPTIONS, Base, card_text, items_of, labels_of, plain_card
from peft_lab.hub.usage import head_outputs
from peft_lab.runs import run_folder
from peft_lab.runs.metrics_schema import check_complete
from peft_lab.runs.run_config import dump_yaml, read_run_file
from peft_lab.runs.standing import Standing, read_standing
from peft_lab.utils.atomic_files import write_text
from peft_lab.utils.bounded_files import read_bytes, read_json
from peft_lab.utils.cache import cache_dir
from peft_lab.utils.safetensors_header import read_header

logger = logging.getLogger("peft_lab")

#: Files of tokenizers and of image processors; nothing else of them is published.
PROCESSOR_FILES = (
    *("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt"),
    *("*.model", "chat_template.jinja", "chat_template.json", "tokenizer_config.json"),
    *("preprocessor_config.json", "processor_config.json", "image_processor_config.json"),
)
_WEIGHTS = (ADAPTER_WEIGHTS, "model*.safetensors", "model.safetensors.index.json")
_AS_THEY_ARE = (*PROCESSOR_FILES, *_WEIGHTS, run_folder.LABELS, BASE_RECORD, PRUNING, PRUNING_MASKS)
#: Files whose values may name a path, which is taken out of them.
_SETTINGS = (
    *("tokenizer_config.json", "preprocessor_config.json", "processor_config.json", "config.json"),
    *("generation_config.json", "image_processor_config.json"),
)

EVAL_RESULTS = ".eval_results"
#: Largest file beside the weights, which is searched for paths and secrets.
_MAX_BYTES = 128 * 2**20


def stage(
    folder: Path,
    repo_id: str,
    out: Path,
    base_model: str | None = None,
    secrets: Iterable[str] = (),
) -> None:
    """Write the files of a repository into the empty folder `out`.

    Args:
        folder: a run's folder, or any folder of a peft adapter.
        repo_id: Hub id of the repository, which the card names.
        out: an empty folder.
        base_model: Hub id of the base model, if the folder does not tell one.
        secrets: texts that no file may contain.

    Raises:
        ConfigError: the base has no name that others know, or a file would give away a path or a secret.
    """
    metrics = run_folder.read_metrics(folder)
    standing = read_standing(folder)
    # what is copied as it is, is read by those who load it
    for path in folder.glob("*.safetensors"):
        read_header(path)
    adapter = (folder / ADAPTER_CONFIG).is_file()
    base = find_base(folder, metrics, base_model, needed=adapter)
    if adapter:
        _tell_training_rows(folder)
    # only listed files are copied, because a file that is not known could hold anything
    for pattern in _AS_THEY_ARE:
        for path in folder.glob(pattern):
            shutil.copyfile(path, out / path.name)
    for name in _SETTINGS:
        if (folder / name).is_file():
            _rewrite(folder / name, out / name, run_folder.without_paths)
    if adapter:
        # peft has written a path of this machine here if the base was loaded from a folder
        named = {"base_model_name_or_path": base.name, "revision": base.revision}
        _rewrite(folder / ADAPTER_CONFIG, out / ADAPTER_CONFIG, lambda c: {**c, **named})
    if metrics.get("run"):
        _stage_run(folder, metrics, repo_id, out, base, standing)
    else:
        _stage_plain(folder, repo_id, out, base)
    # last, because it must see every file as it will be uploaded
    refuse_private(out, [*local_paths(folder), *secrets])


def _tell_training_rows(folder: Path) -> None:
    """Warn of an adapter whose file holds features of training rows."""
    stored = read_json(folder / ADAPTER_CONFIG).get("stored_rows")
    if isinstance(stored, int) and stored > 0:
        logger.warning(
            "This adapter holds the features of %d training rows, from which much of a row may be recovered; whoever "
            "can read the repository has them.",
            stored,
        )


def find_base(folder: Path, metrics: Mapping[str, Any], given: str | None = None, needed: bool = True) -> Base:
    """Base model by a name that others can load.

    It is the one given, else the one that the folder names.

    Raises:
        ConfigError: there is no such name and it is `needed`, or the given one cannot be a Hub id.
    """
    run = metrics.get("run") or {}
    if given is not None:
        return Base(_checked_id(given), on_hub=True)
    config = _adapter_config(folder)
    named = [str(name) for name in (run.get("model_name_or_path"), config.get("base_model_name_or_path")) if name]
    for name in named:
        public = public_name(name)
        if public in BACKBONES:
            return Base(public)
        if public is not None:
            pinned = metrics.get("base_revision") or run.get("model_revision") or config.get("revision")
            return Base(public, on_hub=True, revision=None if is_local(name) else pinned)
    if not needed:  # a whole model loads without its base
        return Base(Path(named[0]).name if named else "its base")
    what = f'is the folder "{named[0]}" of this machine' if named else "is not named"
    raise ConfigError(
        f'The base model of "{folder}" {what}, which nobody else can load; publish it, and name it with '
        "--base_model USER/NAME."
    )


def _checked_id(name: str) -> str:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f'base_model "{name}" cannot be a Hub id: {" ".join(str(error).split())}') from error
    # a relative path can look like a Hub id, so the disk is asked too
    if is_local(name):
        raise ConfigError(f'base_model "{name}" is a folder of this machine; name a model on the Hub.')
    return name


def _stage_run(
    folder: Path, metrics: dict[str, Any], repo_id: str, out: Path, base: Base, standing: Standing | None
) -> None:
    """Write the records and the card of a run of peft-lab."""
    from peft_lab.runs.trained_task import trained_task  # imports datasets

    check_complete(metrics, f'"{folder / run_folder.METRICS}"')
    run = metrics["run"]
    # a converted run still names its old method, but what is uploaded is a LoRA adapter
    info = registry.method("lora" if "lora_export" in metrics else run["method"])
    task = trained_task(folder, run_folder.read_origin(folder))
    own_task = (folder / run_folder.TASK).is_file()
    given = {name: value for name, value in run.items() if name not in LOCAL_OPTIONS and value is not None}
    public = given | {
        # a short name stays: its package is there without the Hub, and `base_model` says where else it is
        "model_name_or_path": run["model_name_or_path"] if run["model_name_or_path"] in BACKBONES else base.name,
        "output_dir": repo_id.rpartition("/")[2],
    }
    public = run_folder.without_paths(public)
    # the commit that the cache had at training time, so that others load the same weights
    if base.revision and not public.get("model_revision") and public["model_name_or_path"] == base.name:
        public["model_revision"] = base.revision
    if own_task:
        _rewrite(folder / run_folder.TASK, out / run_folder.TASK, run_folder.without_paths)
        public["task"] = run_folder.TASK
    # metrics.json names only built-in tasks: a task of one's own is the file beside it
    options = {name: value for name, value in public.items() if name != "task" or not own_task}
    shown = run_folder.without_paths(metrics) | {"run": options}
    if "base_model_name_or_path" in shown.get("method_config", {}):
        shown["method_config"] |= {"base_model_name_or_path": base.name}
    write_json(out / run_folder.METRICS, shown)
    # after a conversion these options would train the original method, not this adapter
    if "lora_export" not in metrics:
        write_text(out / run_folder.RUN, dump_yaml(public))
    title, items = repo_id.rpartition("/")[2], items_of(folder)
    card = card_text(title, shown | {"run": public}, info, task, base, repo_id, items, standing, labels_of(folder))
    write_text(out / run_folder.CARD, card)
    entries = eval_entries(metrics, info, task, standing)
    if entries:
        text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)
        write_text(out / EVAL_RESULTS / f"{task.name}.yaml", text)


def _stage_plain(folder: Path, repo_id: str, out: Path, base: Base) -> None:
    """Write the card of an adapter that peft-lab did not train."""
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ConfigError(f'"{folder}" is a whole model without a run of peft-lab; push it with transformers.')
    config = _adapter_config(folder)
    info = registry.method(str(config.get("peft_type", "")).lower())
    text = plain_card(repo_id, config, info, base, run_folder.weights_bytes(folder), head_outputs(folder))
    write_text(out / run_folder.CARD, text)


def _adapter_config(folder: Path) -> dict[str, Any]:
    """Content of adapter_config.json, {} without one; its names are texts."""
    config = read_json(folder / ADAPTER_CONFIG)
    for name in ("peft_type", "task_type", "base_model_name_or_path", "revision", "peft_version"):
        if not isinstance(config.get(name, ""), str | None):
            raise ConfigError(f'"{folder / ADAPTER_CONFIG}" sets {name} to something else than a text.')
    return config


def local_paths(folder: Path) -> list[str]:
    """Paths of this machine that no published file may contain."""
    config = _adapter_config(folder)
    base = str(config.get("base_model_name_or_path") or "")
    found = {str(folder), str(folder.resolve()), str(folder.resolve().parent), f"{Path.home()}/", str(cache_dir())}
    found |= {base} if is_local(base) else set()
    # a path as short as `/` is found in nearly any text, and would refuse every file
    return sorted(text for text in found if (text.startswith(("/", "~")) and len(text) > 2) or "\\" in text)


def refuse_private(folder: Path, texts: Iterable[str]) -> None:
    """Raise `ConfigError` if a file contains one of the texts.

    Of weights only the header is read, because tensors hold no text.
    """
    needles = [text.encode() for text in texts if text]
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = _header(path) if path.suffix == ".safetensors" else read_bytes(path, _MAX_BYTES)
        for needle in needles:
            if needle in content:
                raise ConfigError(
                    f"{path.name} would give away a path or a token of this machine, and was not uploaded; remove it "
                    "from the file, or train with names instead of paths."
                )


def _header(path: Path) -> bytes:
    """JSON header of a safetensors file, by its length in 8 bytes."""
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def _rewrite(source: Path, target: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    is_yaml = target.suffix == ".yaml"
    values = change(read_run_file(source) if is_yaml else read_json(source, lenient=True))
    write_text(target, dump_yaml(values) if is_yaml else json.dumps(values, indent=2, ensure_ascii=False) + "\n")
