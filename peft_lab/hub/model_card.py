"""Model card: README.md of a run's folder or of a repository.

`model_card.md.jinja` holds the text; this module gathers the values for it from what was measured.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from peft_lab.backbones.pypi_weights import BACKBONES, is_local, public_name
from peft_lab.data.task_registry import kind as task_kind
from peft_lab.hub import usage
from peft_lab.hub.card_tables import class_tables, score_rows
from peft_lab.hub.evaluation_results import eval_results, mean_of_arm
from peft_lab.hub.usage import Usage
from peft_lab.metrics.baselines import beside_baselines, shortfall
from peft_lab.metrics.predictions import PREDICTIONS, Predictions, read_predictions
from peft_lab.runs import run_folder
from peft_lab.runs.pruning import pruned_words
from peft_lab.tuners.registration import has_trait
from peft_lab.utils.atomic_files import write_text
from peft_lab.utils.text import markdown_code, markdown_text, visible

if TYPE_CHECKING:
    from peft_lab.data.kind import Kind
    from peft_lab.data.task_schema import Task
    from peft_lab.registry import MethodInfo
    from peft_lab.runs.standing import Standing

#: Metrics that are a share of right answers, so that their interval follows from the number of rows.
_SHARES = ("accuracy", "exact_match")

#: Options of a run that belong to the machine it ran on, or that are secret.
LOCAL_OPTIONS = frozenset(
    (
        *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "logging_dir", "run_name", "project"),
        *("hub_token", "hub_model_id", "push_to_hub", "hub_private_repo", "hub_revision", "hub_strategy"),
    )
)


@dataclass(frozen=True)
class Base:
    """The base model as a card names it.

    Attributes:
        name: a Hub id, a short name of peft-lab, or the last part of a path that has no other name.
        on_hub: True if `name` is a Hub id.
        revision: commit, branch or tag on the Hub, if it is known.
    """

    name: str
    on_hub: bool = False
    revision: str | None = None


@dataclass(frozen=True)
class Interval:
    """Interval (95 %) of the main metric over the test rows.

    Attributes:
        score: the metric and the rows it was measured on, in words.
        method: name of the interval.
        low, high: its ends.
    """

    score: str
    method: str
    low: float
    high: float


def write_card(folder: Path, metrics: Mapping[str, Any], info: MethodInfo, task: Task) -> None:
    """Write README.md from the content of metrics.json."""
    text = card_text(folder.name, metrics, info, task, items=items_of(folder), labels=labels_of(folder))
    write_text(folder / run_folder.CARD, text)


def items_of(folder: Path) -> Predictions | None:
    """Predictions of a run for each test row; None if absent."""
    return read_predictions(folder / PREDICTIONS) if (folder / PREDICTIONS).is_file() else None


def labels_of(folder: Path) -> list[str] | None:
    """Label names of a run; None if it has none."""
    return run_folder.read_labels(folder) if (folder / run_folder.LABELS).is_file() else None


def card_text(
    name: str,
    metrics: Mapping[str, Any],
    info: MethodInfo,
    task: Task,
    base: Base | None = None,
    repo: str = "",
    items: Predictions | None = None,
    standing: Standing | None = None,
    labels: Sequence[str] | None = None,
) -> str:
    """Render the card of a run: Markdown with the Hub's YAML head.

    A local path is never given as the base model.

    Args:
        name: title of the card.
        metrics: content of metrics.json.
        info, task: the method and the task of the run.
        base: name of the base model; by default what its name in the run tells.
        repo: Hub id that the lines of code load from; by default they load from the folder `name`.
        items: predictions for each test row, for the interval of a metric that is no share of right answers.
        standing: standing of the run in the comparison that it belongs to.
        labels: names of the classes, for the tables of classes.
    """
    kind = task_kind(task.kind)
    base = base or base_of(metrics)
    is_adapter = bool(metrics.get("method_config"))  # else a whole model was saved
    head = ModelCardData(
        library_name="peft" if is_adapter else "transformers",
        # the Hub links this entry to a repository, so a name that is none must not stand here
        base_model=base.name if base.on_hub else None,
        pipeline_tag=kind.pipeline_tag(task) or None,
        tags=_tags(base, info, is_adapter),
        datasets=[task.data.path] if task.data.path else None,
        metrics=[Path(metric).stem for metric in task.metrics],
        model_name=name,
        eval_results=eval_results(metrics, task, kind.pipeline_tag(task), standing),
    )
    # peft finds the base by the name in adapter_config.json: a path in a local folder, a Hub id in a repository
    form = metrics["run"].get("quantization")
    # peft would load the base unquantised and dense, too
    pruning = metrics.get("pruning")
    peft_finds_base = (repo == "" or base.on_hub) and not form and not pruning
    return _template().render(
        head=head,
        title=name,
        method=_method(info, metrics.get("lora_export")),
        base=base,
        revision=_revision(base),
        form=f", quantised to {markdown_code(form)}," if form else "",
        usage=_usage(repo or name, info, kind, task, metrics, is_adapter, peft_finds_base),
        run=metrics,
        task=task,
        data=_data(task),
        interval=_interval(metrics, task, items),
        scores=score_rows(metrics),
        beside=beside_baselines(metrics),
        falls_short=bool(shortfall(metrics)),
        classes=class_tables(items, labels),
        standing=_standing(standing, metrics["seed"]) if standing else "",
        options=_options(metrics["run"], task, base),
        pruned=pruned_words(pruning) if pruning else "",
        is_adapter=is_adapter,
    )


def plain_card(
    name: str, config: Mapping[str, Any], info: MethodInfo, base: Base, size: int, labels: int | None = None
) -> str:
    """Render the card of an adapter that peft-lab did not train.

    It says what adapter_config.json says, and nothing else.

    Args:
        name: Hub id of the repository.
        config: content of adapter_config.json.
        info: the method.
        base: the base model.
        size: bytes of the adapter file.
        labels: outputs of the head in the adapter file, if there is one.
    """
    return _template().render(
        head=ModelCardData(
            library_name="peft", base_model=base.name if base.on_hub else None, tags=_tags(base, info), model_name=name
        ),
        title=name.rpartition("/")[2],
        method=_method(info),
        base=base,
        revision=_revision(base),
        usage=usage.of_foreign_adapter(name, info, config.get("task_type"), labels),
        run=None,
        info=info,
        # the template raises on a missing key, and adapters from elsewhere may lack any of these
        config={"target_modules": None, "modules_to_save": None, "peft_version": None, **config},
        bytes=size,
    )


def base_of(metrics: Mapping[str, Any]) -> Base:
    """Base model of a run by the name in its options.

    Of a folder without a public name only the last part is taken, because the rest is a path of this machine.
    """
    named = metrics["run"]["model_name_or_path"]
    public = public_name(named)
    name = public or Path(named).expanduser().resolve().name
    revision = metrics.get("base_revision") or metrics["run"].get("model_revision")
    # a short name means a package of PyPI, not a repository of the Hub
    on_hub = public is not None and public not in BACKBONES
    # a revision means nothing for a folder, even where the folder's name on the Hub is known
    return Base(name, on_hub, revision if on_hub and not is_local(named) else None)


@lru_cache(maxsize=1)
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not HTML
        finalize=lambda value: visible(value) if isinstance(value, str) else value,
    )
    environment.filters |= {"markdown_text": markdown_text, "code": markdown_code}
    return environment.get_template("model_card.md.jinja")


def _usage(
    source: str,
    info: MethodInfo,
    kind: Kind,
    task: Task,
    metrics: Mapping[str, Any],
    is_adapter: bool,
    peft_finds_base: bool,
) -> Usage:
    """Lines that load a run with the classes of transformers or peft.

    Args:
        source: folder of the run, or its Hub id.
        info, kind, task: method, kind of task and task of the run.
        metrics: content of metrics.json.
        is_adapter: False if a whole model was saved.
        peft_finds_base: False if the base has no name that peft can load; peft-lab loads it then.
    """
    # number of classes, which the base model must be told of; None for generation
    labels = metrics["data"]["labels"]
    own = usage.own_class(metrics.get("model_class"))
    if own is not None:
        # peft and transformers import no other package for a class of a base
        return usage.by_peft_lab(source) if is_adapter else usage.of_model(source, *own)
    if not is_adapter:
        return usage.of_model(source, kind.auto_class(task).__name__)
    if not peft_finds_base:
        return usage.by_peft_lab(source)
    return usage.of_adapter(source, info, kind.task_type(task), labels, has_trait(info, "uses_source_head"))


def _tags(base: Base, info: MethodInfo, is_adapter: bool = True) -> list[str]:
    relation = [f"base_model:adapter:{base.name}"] if base.on_hub and is_adapter else []
    return [*relation, "transformers", "peft-lab", info.name]


def _method(info: MethodInfo, lora_export: Mapping[str, Any] | None = None) -> str:
    """Name of the method with its paper or its origin."""
    if lora_export:
        return f"LoRA adapter, converted from {markdown_text(lora_export['title'])},"
    paper = f" ([arXiv:{info.paper}](https://arxiv.org/abs/{info.paper}))" if info.paper[:1].isdigit() else ""
    return f"{info.title}{paper}" if info.place == "baseline" else f"{info.title} adapter{paper}"


def _revision(base: Base) -> str:
    return f" (revision {markdown_code(base.revision)})" if base.revision else ""


def _data(task: Task) -> str:
    title = markdown_text(task.title or task.name)
    # a scheme such as javascript, or a bracket, would make another link of it
    linked = re.fullmatch(r"https?://[^\s()<>\[\]`|\\\"']+", task.homepage)
    return f"[{title}]({visible(task.homepage)})" if linked else title


def _options(run: Mapping[str, Any], task: Task, base: Base) -> dict[str, Any]:
    """Options of a run without paths of this machine."""
    public = {**run, "task": task.name, "model_name_or_path": base.name}
    return {key: value for key, value in public.items() if value is not None and key not in LOCAL_OPTIONS}


def _standing(standing: Standing, seed: int) -> str:
    """Result of the run's arm in its comparison."""
    run = f'This is the run with seed {seed} of the arm {standing.arm} in the study "{standing.study}"'
    return f"{run}, {standing.task}: {mean_of_arm(standing)}. Of all arms there, {standing.words}"


def _interval(metrics: Mapping[str, Any], task: Task, items: Predictions | None) -> Interval | None:
    """Interval of the main metric; None if its data are missing."""
    name, rows = metrics["main_metric"], metrics["data"]["rows"].get("test")
    value = metrics["metrics"].get("test", {}).get(name)
    if name not in task.metrics or not rows or value is None:
        return None
    if name in _SHARES:
        from scipy.stats import binomtest

        # the number of right rows is binomial, so no value for each row is needed
        right = round(value * rows)
        low, high = binomtest(right, rows).proportion_ci(0.95, method="wilson")
        score = f"{right:,} of {rows:,} test rows are right: {name} {value:.4f}"
        return Interval(score, "binomial interval (Wilson)", low, high)
    ends = _jackknife(name, items, metrics["data"]["labels"])
    if ends is None:
        return None
    return Interval(f"{name} {value:.4f} on {rows:,} test rows", "jackknife interval over the rows", *ends)


def _jackknife(metric: str, items: Predictions | None, labels: int | None) -> tuple[float, float] | None:
    """Jackknife interval (95 %), cut at the metric's bounds; None without rows."""
    from scipy.stats import t

    from peft_lab.metrics.per_row import BOUNDS, jackknife_values

    found = jackknife_values(metric, items, labels) if items is not None and len(items) > 1 else None
    if found is None:
        return None
    value, rows = found
    # the jackknife values scatter as the metric does over the choice of rows
    half = t.ppf(0.975, len(rows) - 1) * rows.std(ddof=1) / len(rows) ** 0.5
    least, most = BOUNDS.get(metric, (float("-inf"), float("inf")))
    return max(least, value - half), min(most, value + half)
