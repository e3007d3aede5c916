"""Command `info`: what an adapter's own files say of it. Imports neither torch nor peft."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from peft_lab.cli.output import Json, format_metric, new_table, print_json, print_out
from peft_lab.utils.terminal import shown
from peft_lab.utils.text import visible

#: Names that a table shows; `--json` has all of them.
_SHOWN_NAMES = 8
_UNKNOWN = "not recorded"


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(info)


def info(
    adapter: Annotated[str, typer.Argument(help="Folder of a run or of any peft adapter, or a Hub id.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    json: Json = False,
) -> None:
    """Show method, base, size, score and loading code of an adapter, without loading it."""
    from peft_lab.hub.adapter_info import adapter_info

    found = adapter_info(adapter, revision)
    if json:
        print_json(found)
        return
    table = new_table("of", "value", title=found["adapter"])
    for name, value in _lines(found).items():
        table.add_row(name, value)
    print_out(table)
    print_out("Load it:")
    # code is printed as it is: rich would read its brackets as markup
    for line in found["load"]:
        typer.echo(f"    {visible(line)}")
    score = found["score"]
    if score and score["beats_baseline"] is False:
        print_out(f"[bold red]{shown(score['sentence'])}[/]")


def _lines(found: Mapping[str, Any]) -> dict[str, str]:
    """Rows of the table."""
    base, task, parameters = found["base_model"], found["task"], found["parameters"]
    details = [f"{key} {base[key]}" for key in ("revision", "dtype", "quantization", "pruned") if base[key]]
    fingerprint, versions = found["fingerprint"], found["versions"]
    digest = f"{fingerprint['sha256'][:12]} of {fingerprint['weights']} weights" if fingerprint else _UNKNOWN
    trained = f"{parameters['trained']:,} of {parameters['total']:,}" if parameters["trained"] else _UNKNOWN
    return {
        "method": _method(found["method"]),
        "base model": ", ".join([base["name"] or _UNKNOWN, *details]),
        "base fingerprint": digest,
        "size": f"{found['size_bytes'] / 1024:,.0f} KB",
        "saved parameters": f"{parameters['saved']:,} ({', '.join(parameters['dtypes'])})",
        "trained parameters": trained,
        "task": _task(task),
        "score": _score(found["score"]),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()) or _UNKNOWN,
        "merges into the base": _yes(found["merges"]),
        "serves mixed batches": _yes(found["mixed_batch"]),
    }


def _method(method: Mapping[str, Any]) -> str:
    if method["name"] is None:
        return str(method["title"])
    arguments = [f"{key}={_short(value)}" for key, value in method["arguments"].items()]
    origin = f", converted from {method['converted_from']}" if method["converted_from"] else ""
    return f"{method['name']}{origin}: {', '.join(arguments)}" if arguments else f"{method['name']}{origin}"


def _task(task: Mapping[str, Any]) -> str:
    parts = [task["name"] or _UNKNOWN]
    if task["kind"] or task["task_type"]:
        parts.append(str(task["kind"] or task["task_type"]).replace("_", " "))
    if task["labels"]:
        parts.append(f"labels {_short(task['labels'])}")
    return ", ".join(parts)


def _score(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return _UNKNOWN
    beside = [f"{predictor}: {format_metric(value)}" for predictor, value in score["baselines"].items()]
    return "; ".join([f"{score['split']} {score['metric']} {format_metric(score['value'])}", *beside])


def _short(value: Any) -> str:
    """Write a value; of a long list the first names and how many there are."""
    if not isinstance(value, list):
        return str(value)
    names = ", ".join(map(str, value[:_SHOWN_NAMES]))
    return names if len(value) <= _SHOWN_NAMES else f"{names}, ... ({len(value)})"


def _yes(value: bool | None) -> str:
    # most tuners of peft have no card that says it, and a whole model has no method
    return "not known here" if value is None else "yes" if value else "no"
