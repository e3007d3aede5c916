"""Commands `methods`, `tasks` and `validate`; they import neither torch nor data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from peft_lab import registry
from peft_lab.cli.completion import complete_method
from peft_lab.cli.data import is_task, report_on_data
from peft_lab.cli.output import Json, new_table, print_json, print_out
from peft_lab.errors import ConfigError
from peft_lab.utils.mappings import attributes
from peft_lab.utils.terminal import shown

if TYPE_CHECKING:
    from peft_lab.utils.source_reader import Field


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (methods, tasks, validate):
        app.command()(command)


def methods(
    name: Annotated[
        str | None, typer.Argument(autocompletion=complete_method, help="Show the arguments of this method.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the methods, or the arguments of one method."""
    if as_json:
        print_json(_with_fields(name) if name else [_as_json(info) for info in registry.list_methods().values()])
        return
    if name is not None:
        _show_method(registry.method(name), registry.config_fields(name))
        return
    table = new_table("method", "title", "acts on", "default targets", "learning rate", "paper")
    for info in registry.list_methods().values():
        if info.place == "peft":  # listed by name below
            continue
        rate = f"{info.learning_rate:g}" if info.takes_steps else "none"
        table.add_row(info.name, info.title, info.place, ", ".join(info.roles), rate, _paper(info.paper))
    print_out(table)
    own = [info.name for info in registry.list_methods().values() if info.place == "peft"]
    print_out(f"Tuners of peft itself, by their own names: {', '.join(own)}.")
    print_out("`peft-lab methods NAME` shows the arguments of one method.")


def _as_json(info: Any) -> dict[str, Any]:
    names = ("name", "title", "place", "roles", "learning_rate", "paper")
    return {name: getattr(info, name) for name in names}


def _with_fields(name: str) -> dict[str, Any]:
    """Card of a method, its arguments and its presets; an argument of a preset that the user must give is None."""
    info = registry.method(name)
    found = []
    for field in registry.config_fields(name).values():
        meaning = " ".join(field.help.split())
        found.append({"name": field.name, "type": field.annotation, "default": field.default, "meaning": meaning})
    presets = {}
    for preset, values in info.presets.items():
        presets[preset] = {key: None if value is ... else value for key, value in values.items()}
    return {**_as_json(info), "method_args": found, "presets": presets}


def _show_method(info: Any, fields: dict[str, Field]) -> None:
    print_out(f"[bold]{info.name}[/]: {shown(info.title)} {shown(_paper(info.paper))}".rstrip())
    if not fields:
        print_out("It takes no method_args.")
        return
    table = new_table("method_args", "type", "default", "meaning")
    for field in fields.values():
        table.add_row(field.name, field.annotation, field.default, " ".join(field.help.split()))
    print_out(table)
    for name, values in info.presets.items():
        fields_of = []
        for key, value in values.items():
            fields_of.append(f"{key}=?" if value is ... else f"{key}={value}")  # `...` must be given by the user
        print_out(f"preset={name} stands for {shown(', '.join(fields_of))}")


def tasks(as_json: Json = False) -> None:
    """List the built-in tasks."""
    from peft_lab.data.task_registry import list_tasks

    if as_json:
        names = ("name", "title", "kind", "metrics", "licence", "where")
        print_json([attributes(task, names) for task in list_tasks().values()])
        return
    table = new_table("task", "kind", "metrics", "licence", "data")
    for task in list_tasks().values():
        table.add_row(task.name, task.kind, ", ".join(task.metrics), task.licence, task.where)
    print_out(table)
    print_out("Your own data: write a task YAML and pass its path as --task; `peft-lab validate FILE` checks it.")


def validate(
    file: Annotated[
        str, typer.Argument(help="YAML of a task, run, study or incremental protocol.", show_default=False)
    ],
    data: Annotated[bool, typer.Option("--data", help="Read all rows of the task too, and report on them.")] = False,
    model_name_or_path: Annotated[
        str | None,
        typer.Option("--model_name_or_path", help="With --data: count the tokens of this backbone, and show its rows."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check the file of a task, a run or a comparison without loading a model.

    With --data the rows are read too: the exit status is 2 if a run would refuse them.
    """
    if data:
        report_on_data(file, model_name_or_path, as_json)
        return
    if model_name_or_path is not None:
        raise ConfigError("--model_name_or_path is for --data, which reads the rows; give both.")
    document, line = _checked(file)
    if as_json:
        print_json(document)
    else:
        print_out(f"[green]ok[/] {shown(line)}")


def _checked(file: str) -> tuple[dict[str, Any], str]:
    """Check a file; return a document about it, and a line."""
    from peft_lab.comparison.study.schema import is_study
    from peft_lab.data.task_registry import validate_task
    from peft_lab.protocols.incremental_options import IncrementalOptions, is_protocol
    from peft_lab.runs import run_config, run_folder

    # the keys tell a study from a task and a run
    values = run_config.read_run_file(file)
    if is_study(values):
        from peft_lab.cli.compare import show_study

        line = show_study(values, file)
        return {"file": file, "is": "study", "says": line}, line
    if is_protocol(values):
        # the folder may be named on the command line
        own = IncrementalOptions.from_mapping({"output_dir": "incremental", **values}, f'"{file}"').own
        line = f'protocol of {own.steps} sessions: {", ".join(own.method)} on task "{own.task}"'
        return {"file": file, "is": "protocol", **own.model_dump(exclude={"output_dir"})}, line
    if is_task(values):
        task = validate_task(file)
        line = f'task "{task.name}" ({task.kind}), metrics: {", ".join(task.metrics)}'
        return {"file": file, "is": "task", "name": task.name, "kind": task.kind, "metrics": list(task.metrics)}, line
    config = run_config.load_run(file)
    run_folder.check_run(config)
    line = f'run: method "{config.method}" on task "{config.task}" with {config.model_name_or_path}'
    return {"file": file, "is": "run", **config.to_dict()}, line


def _paper(paper: str) -> str:
    return f"arXiv:{paper}" if paper and paper[0].isdigit() else paper
