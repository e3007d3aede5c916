"""The model card: README.md of a run's folder or of a repository, filled with what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData

from peft_lab.backbones.pypi_weights import BACKBONES, is_local, public_name
from peft_lab.data.task_registry import kind as task_kind
from peft_lab.metrics.predictions import PREDICTIONS, Predictions, read_predictions
from peft_lab.runs import run_folder
from peft_lab.utils.text import markdown_text

if TYPE_CHECKING:
    from peft_lab.data.task_schema import Task
    from peft_lab.registry import MethodInfo
    from peft_lab.runs.standing import Standing
    from peft_lab.tasks.kinds._base import Kind

#: Metrics that are a share of right answers, so that their interval follows from the number of rows.
_SHARES = ("accuracy", "exact_match")


@dataclass(frozen=True)
class Base:
    """The base model as a card names it.

    Attributes:
        name: a Hub id, a short name of peft-lab, or the last part of a path that has no other name.
        on_hub: whether `name` is a Hub id.
        revision: commit, branch or tag on the Hub, if it is known.
    """

    name: str
    on_hub: bool = False
    revision: str | None = None


def write_card(folder: Path, metrics: Mapping[str, Any], info: MethodInfo, task: Task) -> None:
    """Write README.md from the content of metrics.json."""
    text = card_text(folder.name, metrics, info, task, items=items_of(folder))
    (folder / run_folder.CARD).write_text(text, encoding="utf-8")


def items_of(folder: Path) -> Predictions | None:
    """What a run found for each test row, if it wrote that."""
    return read_predictions(folder / PREDICTIONS) if (folder / PREDICTIONS).is_file() else None


def card_text(
    name: str,
    metrics: Mapping[str, Any],
    info: MethodInfo,
    task: Task,
    base: Base | None = None,
    repo: str = "",
    items: Predictions | None = None,
    standing: Standing | None = None,
) -> str:
    """The card as Markdown with the Hub's YAML head. A local path is never given as the base model.

    Args:
        name: title of the card.
        metrics: content of metrics.json.
        info, task: the method and the task of the run.
        base: how to name the base model; by default what its name in the run tells.
        repo: Hub id that the lines of code load from; by default they load from the folder `name`.
        items: what was found for each test row, for the interval of a metric that is no share of right answers.
        standing: where the run stands in the comparison it belongs to.
    """
    run, kind = metrics["run"], task_kind(task.kind)
    base = base or base_of(metrics)
    adapter = _is_adapter(metrics)
    head = ModelCardData(
        library_name="peft" if adapter else "transformers",
        base_model=base.name if base.on_hub else None,
        pipeline_tag=kind.info.pipeline_tag or None,
        tags=_tags(base, info, adapter),
        datasets=[task.data.path] if task.data.path else None,
        metrics=[Path(metric).stem for metric in task.metrics],
        model_name=name,
        eval_results=eval_results(metrics, task, kind, standing),
    )
    by_path = repo == "" or base.on_hub
    code = usage(repo or name, info, kind, metrics["data"]["labels"], adapter, by_path)
    parts = [
        f"---\n{head.to_yaml()}\n---",
        f"# {name}",
        f"{_what(info, metrics)} of `{base.name}`{_at(base)} for {task.kind.replace('_', ' ')} on {_task(task)}, "
        f"trained with peft-lab {metrics['versions']['peft-lab']}.",
        "## Use",
        f"```python\n{code}\n```",
        "## Results",
        _table(("split", "metric", "value"), _scores(metrics["metrics"])),
        *_interval(metrics, task, items),
        *([_in_study(standing, metrics["seed"])] if standing else []),
        *_converted(metrics),
        _table(("measured", "value"), _measured(metrics)),
        "## Training",
        _table(("option", "value"), _options(run, task, base)),
        f"Data: {_task(task)}, version {task.version}, fingerprint `{metrics['data']['fingerprint']}`, "
        + ", ".join(f"{count:,} {split} rows" for split, count in metrics["data"]["rows"].items())
        + ". The test rows were used once, at the end.",
        "Versions: " + ", ".join(f"{package} {version}" for package, version in metrics["versions"].items()) + ".",
        "## Licence",
        f"The weights here follow the terms of the base model `{base.name}` (see its own card) and of the data "
        f"({task.licence or 'no licence is stated for it'}).",
    ]
    return "\n\n".join(parts) + "\n"


def plain_card(
    name: str, config: Mapping[str, Any], info: MethodInfo, base: Base, size: int, labels: int | None = None
) -> str:
    """The card of an adapter that peft-lab did not train: what its adapter_config.json says, and nothing else.

    Args:
        name: Hub id of the repository.
        config: content of adapter_config.json.
        info: the method.
        base: the base model.
        size: bytes of the adapter file.
        labels: outputs of the head in the adapter file, if there is one.
    """
    auto = _AUTO.get(config.get("task_type") or "", "AutoPeftModel")
    head = ModelCardData(
        library_name="peft", base_model=base.name if base.on_hub else None, tags=_tags(base, info), model_name=name
    )
    targets = config.get("target_modules")
    options = "" if labels is None else f", num_labels={labels}, ignore_mismatched_sizes=True"
    kept = config.get("modules_to_save") or []
    parts = [
        f"---\n{head.to_yaml()}\n---",
        f"# {name.rpartition('/')[2]}",
        f"{_what(info, {})} of `{base.name}`{_at(base)}. Its data and its scores are not recorded.",
        "## Use",
        f'```python\n{_ours(info)}from peft import {auto}\nmodel = {auto}.from_pretrained("{name}"{options})\n```',
        "## Adapter",
        _table(
            ("field", "value"),
            [
                ("method", f"`{info.name}`"),
                ("target modules", f"`{targets}`"),
                ("modules trained in full", f"`{kept}`"),
                ("file size", f"{size / 1024:,.0f} KB"),
                ("written by peft", str(config.get("peft_version") or "not recorded")),
            ],
        ),
        "## Licence",
        f"The weights here follow the terms of the base model `{base.name}`; see its own card.",
    ]
    return "\n\n".join(parts) + "\n"


#: peft's classes that load a base with its head, by task type.
_AUTO = {
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}


def usage(folder: str, info: MethodInfo, kind: Kind, labels: int | None, adapter: bool, by_path: bool = True) -> str:
    """The lines that load what a run saved with transformers' or peft's own classes.

    Args:
        folder: where the run was saved, or its Hub id.
        labels: number of classes, which the base model must be told of; None for generation.
        adapter: whether an adapter was saved, not a whole model.
        by_path: whether peft can find the base by the name in adapter_config.json; else peft-lab has to.
    """
    auto = kind.auto_class().__name__
    if not adapter:
        return f'from transformers import {auto}\nmodel = {auto}.from_pretrained("{folder}")'
    if not by_path:
        return f'from peft_lab.loading.load_run import load\nmodel = load("{folder}").model'
    options = "" if labels is None or info.can("keeps_head") else f", num_labels={labels}"
    if kind.info.task_type is None:
        # peft loads the class that the base was; a head for other labels is replaced by the saved one
        auto, options = "AutoModel", f"{options}, ignore_mismatched_sizes=True" if options else ""
    auto = auto.replace("AutoModel", "AutoPeftModel")
    return f'{_ours(info)}from peft import {auto}\nmodel = {auto}.from_pretrained("{folder}"{options})'


def base_of(metrics: Mapping[str, Any]) -> Base:
    """The base model of a run by the name in its options; of a folder without a public name the last part only."""
    named = metrics["run"]["model_name_or_path"]
    public = public_name(named)
    name = public or Path(named).expanduser().resolve().name
    revision = metrics.get("base_revision") or metrics["run"].get("model_revision")
    on_hub = public is not None and public not in BACKBONES
    return Base(name, on_hub, revision if on_hub and not is_local(named) else None)


def eval_results(
    metrics: Mapping[str, Any], task: Task, kind: Kind, standing: Standing | None = None
) -> list[EvalResult]:
    """The task's metrics on every split as entries of the card's `model-index`, and the mean of the run's arm."""
    entry = partial(
        EvalResult,
        task_type=kind.info.pipeline_tag or task.kind,
        dataset_type=task.data.path or task.name,
        dataset_name=task.title or task.name,
        dataset_config=task.data.name or None,
        dataset_revision=task.data.revision or None,
    )
    found = [
        entry(
            dataset_split=task.splits.get(split, split),
            metric_type=name,
            metric_value=value,
            metric_name=f"{name} ({split})",
        )
        for split, values in metrics["metrics"].items()
        for name, value in values.items()
        if name != "loss"
    ]
    if standing:
        interval = {} if standing.low is None else {"interval_95": [standing.low, standing.high], "over": standing.over}
        found.append(
            entry(
                dataset_split=task.splits.get("test", "test"),
                metric_type=standing.metric,
                metric_value=standing.mean,
                metric_name=f"{standing.metric} (test, mean of {_seeds(standing)})",
                metric_args={"study": standing.study, "arm": standing.arm, "seeds": list(standing.seeds), **interval},
            )
        )
    return found


def eval_entries(
    metrics: Mapping[str, Any], info: MethodInfo, task: Task, standing: Standing | None = None
) -> list[EvalResultEntry]:
    """The main metric on the test rows as an entry of `.eval_results`; empty for data that is not on the Hub.

    The value is that of the pushed run; the mean of its arm in a comparison stands in the notes.
    """
    value = metrics["metrics"].get("test", {}).get(metrics["main_metric"])
    if value is None or not task.data.path:
        return []
    rows = metrics["data"]["rows"].get("test")
    return [
        EvalResultEntry(
            dataset_id=task.data.path,
            task_id=task.data.name or "default",
            dataset_revision=task.data.revision or None,
            value=value,
            notes=f"{metrics['main_metric']} on {rows} rows of split {task.splits.get('test', 'test')}; {info.title}, "
            f"seed {metrics['seed']}, peft-lab {metrics['versions']['peft-lab']}"
            + (f'; arm {standing.arm} in the study "{standing.study}": {_mean(standing)}' if standing else ""),
        )
    ]


def _is_adapter(metrics: Mapping[str, Any]) -> bool:
    """Whether a run saved an adapter; else a whole model."""
    return bool(metrics.get("method_config"))


def _tags(base: Base, info: MethodInfo, adapter: bool = True) -> list[str]:
    relation = [f"base_model:adapter:{base.name}"] if base.on_hub and adapter else []
    return [*relation, "transformers", "peft-lab", info.name]


def _ours(info: MethodInfo) -> str:
    known = info.place == "baseline" or info.module.startswith("peft.")
    return "" if known else "import peft_lab  # makes the method known to peft\n"


def _what(info: MethodInfo, metrics: Mapping[str, Any]) -> str:
    paper = f" ([arXiv:{info.paper}](https://arxiv.org/abs/{info.paper}))" if info.paper[:1].isdigit() else ""
    origin = metrics.get("lora_export")
    if origin:
        return f"LoRA adapter, converted from {origin['title']},"
    return f"{info.title} adapter{paper}" if info.place != "baseline" else f"{info.title}{paper}"


def _at(base: Base) -> str:
    return f" (revision `{base.revision}`)" if base.revision else ""


def _task(task: Task) -> str:
    title = task.title or task.name
    return f"[{title}]({task.homepage})" if task.homepage else title


def _scores(metrics: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    return [
        (split, name, f"{value:.4f}" if isinstance(value, float) else str(value))
        for split, values in metrics.items()
        for name, value in values.items()
    ]


def _interval(metrics: Mapping[str, Any], task: Task, items: Predictions | None) -> list[str]:
    """One sentence with the interval of the main metric over the choice of the test rows, if one can be had."""
    name, rows = metrics["main_metric"], metrics["data"]["rows"].get("test")
    value = metrics["metrics"].get("test", {}).get(name)
    if name not in task.metrics or not rows or value is None:
        return []
    if name in _SHARES:
        from scipy.stats import binomtest

        right = round(value * rows)
        low, high = binomtest(right, rows).proportion_ci(0.95, method="wilson")
        begin, how = f"{right:,} of {rows:,} test rows are right: {name} {value:.4f}", "binomial interval (Wilson)"
    else:
        found = _jackknife(name, items, metrics["data"]["labels"])
        if found is None:
            return []
        low, high = found
        begin, how = f"{name} {value:.4f} on {rows:,} test rows", "jackknife interval over the rows"
    return [
        f"{begin}, 95 % {how} {low:.4f} to {high:.4f}. It covers the choice of the test rows, not that of the seed: "
        "this is one run."
    ]


def _in_study(standing: Standing, seed: int) -> str:
    """What the comparison that the run belongs to says of its arm, and of the others on that task."""
    run = f'This is the run with seed {seed} of the arm {standing.arm} in the study "{standing.study}"'
    return markdown_text(f"{run}, {standing.task}: {_mean(standing)}. Of all arms there, {standing.words}")


def _mean(standing: Standing) -> str:
    found = f"mean {standing.metric} {standing.mean:.4f} of {_seeds(standing)}"
    if standing.low is None:
        return found
    return f"{found} (95 % interval {standing.low:.4f} to {standing.high:.4f} over {standing.over})"


def _seeds(standing: Standing) -> str:
    return f"{len(standing.seeds)} seed{'s' if len(standing.seeds) > 1 else ''}"


def _jackknife(metric: str, items: Predictions | None, labels: int | None) -> tuple[float, float] | None:
    from scipy.stats import t

    from peft_lab.metrics.per_row import BOUNDS, jackknife_values

    found = jackknife_values(metric, items, labels) if items is not None and len(items) > 1 else None
    if found is None:
        return None
    value, rows = found
    half = t.ppf(0.975, len(rows) - 1) * rows.std(ddof=1) / len(rows) ** 0.5
    least, most = BOUNDS.get(metric, (float("-inf"), float("inf")))
    return max(least, value - half), min(most, value + half)


def _converted(metrics: Mapping[str, Any]) -> list[str]:
    origin = metrics.get("lora_export")
    if not origin:
        return []
    return [
        f"The scores were measured before the conversion. Ranks go up to {origin['rank']}; the weight deltas differ "
        f"from the original ones by at most {origin['max_relative_error']:.1e} (relative, Frobenius norm)."
    ]


def _options(run: Mapping[str, Any], task: Task, base: Base) -> list[tuple[str, str]]:
    """The run's options without anything that names a path of this machine."""
    public = {**run, "task": task.name, "model_name_or_path": base.name}
    return [(key, f"`{value}`") for key, value in public.items() if value is not None and key not in LOCAL_OPTIONS]


#: Options of a run that belong to the machine it ran on, or that are secret.
LOCAL_OPTIONS = frozenset(
    (
        *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "logging_dir", "run_name", "project"),
        *("hub_token", "hub_model_id", "push_to_hub", "hub_private_repo", "hub_revision", "hub_strategy"),
    )
)


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
