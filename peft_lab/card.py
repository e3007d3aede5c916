"""The model card: README.md of a run's folder, filled with what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCardData

from peft_lab import run_folder
from peft_lab.task import kind as task_kind

if TYPE_CHECKING:
    from peft_lab.kind import Kind
    from peft_lab.registry import MethodInfo
    from peft_lab.task_schema import Task


def write_card(folder: Path, metrics: Mapping[str, Any], info: MethodInfo, task: Task) -> None:
    """Write README.md from the content of metrics.json."""
    (folder / run_folder.CARD).write_text(card_text(folder.name, metrics, info, task), encoding="utf-8")


def card_text(name: str, metrics: Mapping[str, Any], info: MethodInfo, task: Task) -> str:
    """The card as Markdown with the Hub's YAML head. A local path is never given as the base model."""
    run, kind = metrics["run"], task_kind(task.kind)
    base = public_name(run["model_name_or_path"])
    adapter = info.kind != "baseline"
    head = ModelCardData(
        library_name="peft" if adapter else "transformers",
        base_model=base if "/" in base else None,
        pipeline_tag=kind.pipeline_tag or None,
        tags=[f"base_model:adapter:{base}"] * ("/" in base and adapter) + ["transformers", "peft-lab", info.name],
    )
    parts = [
        f"---\n{head.to_yaml()}\n---",
        f"# {name}",
        f"{_what(info, adapter)} of `{base}` on {_task(task)}, trained with peft-lab "
        f"{metrics['versions']['peft-lab']}.",
        "## Use",
        f"```python\n{usage(name, info, kind, metrics['data']['labels'])}\n```",
        "## Results",
        _table(("split", "metric", "value"), _scores(metrics["metrics"])),
        _table(("measured", "value"), _measured(metrics)),
        "## Training",
        _table(("option", "value"), _options(run, task)),
        f"Data: {_task(task)}, version {task.version}, fingerprint `{metrics['data']['fingerprint']}`, "
        + ", ".join(f"{count:,} {split} rows" for split, count in metrics["data"]["rows"].items())
        + ". The test rows were used once, at the end.",
        "Versions: " + ", ".join(f"{package} {version}" for package, version in metrics["versions"].items()) + ".",
        "## Licence",
        f"The weights here follow the terms of the base model `{base}` (see its own card) and of the data "
        f"({task.licence or 'no licence is stated for it'}).",
    ]
    return "\n\n".join(parts) + "\n"


def usage(folder: str, info: MethodInfo, kind: Kind, labels: int | None) -> str:
    """The lines that load what a run saved with transformers' or peft's own classes.

    Args:
        folder: where the run was saved.
        labels: number of classes, which the base model must be told of; None for generation.
    """
    auto = kind.auto_class().__name__
    if info.kind == "baseline":
        return f'from transformers import {auto}\nmodel = {auto}.from_pretrained("{folder}")'
    options = "" if labels is None else f", num_labels={labels}"
    if kind.task_type is None:
        # peft loads the class that the base was; a head for other labels is replaced by the saved one
        auto, options = "AutoModel", options + (", ignore_mismatched_sizes=True" if labels is not None else "")
    auto = auto.replace("AutoModel", "AutoPeftModel")
    ours = "" if info.module.startswith("peft.") else "import peft_lab  # makes the method known to peft\n"
    return f'{ours}from peft import {auto}\nmodel = {auto}.from_pretrained("{folder}"{options})'


def public_name(model: str) -> str:
    """The name of a backbone for a card: a Hub id or short name as it is, of a local path the last part only."""
    if Path(model).expanduser().exists() or model.startswith((".", "/", "~")) or "\\" in model:
        return Path(model).expanduser().resolve().name
    return model


def _what(info: MethodInfo, adapter: bool) -> str:
    paper = f" ([arXiv:{info.paper}](https://arxiv.org/abs/{info.paper}))" if info.paper[:1].isdigit() else ""
    return f"A {info.title} adapter{paper}" if adapter else f"{info.title}{paper}"


def _task(task: Task) -> str:
    title = task.title or task.name
    return f"[{title}]({task.homepage})" if task.homepage else title


def _scores(metrics: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    return [
        (split, name, f"{value:.4f}" if isinstance(value, float) else str(value))
        for split, values in metrics.items()
        for name, value in values.items()
    ]


def _options(run: Mapping[str, Any], task: Task) -> list[tuple[str, str]]:
    """The run's options without anything that names a path of this machine."""
    public = {**run, "task": task.name, "model_name_or_path": public_name(run["model_name_or_path"])}
    local = ("output_dir", "resume_from_checkpoint", "overwrite_output_dir", "hub_token", "run_name", "project")
    return [(key, f"`{value}`") for key, value in public.items() if value is not None and key not in local]


def _measured(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    count = metrics["parameters"]
    return [
        ("trainable parameters", f"{count['trainable']:,} of {count['total']:,}"),
        ("file size", f"{metrics['adapter_bytes'] / 1024:,.0f} KB"),
        ("training time", f"{metrics['train_seconds']:.1f} s for {metrics['global_step']:,} steps"),
        ("peak memory", f"{metrics['peak_memory_bytes'] / 2**20:,.0f} MB on {metrics['device']}"),
        ("learning rate", f"{metrics['learning_rate']:g}"),
        ("seed", str(metrics["seed"])),
    ]


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )
