"""The `peft-lab` command. Nothing here imports torch before names, keys, values and files have been checked."""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from peft_lab import registry
from peft_lab.cli import compare, share
from peft_lab.errors import ConfigError, PeftLabError, did_you_mean

if TYPE_CHECKING:
    from peft_lab.utils.source_reader import Field

app = typer.Typer(
    name="peft-lab",
    help="Parameter-efficient fine-tuning of text and vision models: train, compare and share adapters.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Adapter = Annotated[str, typer.Argument(help="Folder that `peft-lab train` wrote, or a Hub id.", show_default=False)]
Base = Annotated[
    str | None, typer.Option("--model_name_or_path", help="Load this base instead of the one the adapter names.")
]
OtherBase = Annotated[
    bool, typer.Option("--allow_other_base", help="Warn instead of refusing if the base has other weights.")
]
Rows = Annotated[int, typer.Option("--per_device_eval_batch_size", help="Rows in one batch.")]


def main() -> None:
    """Run the command line; errors about the user's input end in one sentence and exit status 2."""
    # peft asks transformers for a property by its old name, which nobody who types a command can change
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    try:
        app()
    except PeftLabError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]Error:[/] {_escape(str(error))}")
        sys.exit(2)


@app.command()
def methods(name: Annotated[str | None, typer.Argument(help="Show the arguments of this method.")] = None) -> None:
    """List the methods, or the arguments of one method."""
    if name is not None:
        _show_method(registry.method(name), registry.config_fields(name))
        return
    table = _table("method", "title", "acts on", "default targets", "learning rate", "paper")
    for info in registry.list_methods().values():
        if info.place == "peft":
            continue
        table.add_row(
            info.name, info.title, info.place, ", ".join(info.roles), f"{info.learning_rate:g}", _paper(info.paper)
        )
    _out().print(table)
    own = [info.name for info in registry.list_methods().values() if info.place == "peft"]
    _out().print(f"Tuners of peft itself, by their own names: {', '.join(own)}.")
    _out().print("`peft-lab methods NAME` shows the arguments of one method.")


def _show_method(info: Any, fields: dict[str, Field]) -> None:
    _out().print(f"[bold]{info.name}[/]: {_escape(info.title)} {_paper(info.paper)}".rstrip())
    if not fields:
        _out().print("It takes no method_args.")
        return
    table = _table("method_args", "type", "default", "meaning")
    for field in fields.values():
        table.add_row(
            field.name, _escape(field.annotation), _escape(str(field.default)), _escape(" ".join(field.help.split()))
        )
    _out().print(table)
    for name, values in info.presets.items():
        shown = ", ".join(f"{key}={'?' if value is ... else value}" for key, value in values.items())
        _out().print(f"preset={name} stands for {_escape(shown)}")


@app.command()
def tasks() -> None:
    """List the built-in tasks."""
    from peft_lab.data.task_registry import list_tasks

    table = _table("task", "kind", "metrics", "licence", "data")
    for task in list_tasks().values():
        table.add_row(task.name, task.kind, ", ".join(task.metrics), _escape(task.licence), _escape(task.where))
    _out().print(table)
    _out().print("Your own data: write a task YAML and pass its path as --task; `peft-lab validate FILE` checks it.")


@app.command()
def validate(file: Annotated[str, typer.Argument(help="A task, run or study YAML.", show_default=False)]) -> None:
    """Check a task, run or study file without loading a model or data."""
    from peft_lab.comparison.study.schema import is_study
    from peft_lab.data.task_registry import validate_task
    from peft_lab.runs import run_config, run_folder

    values = run_config.read_run_file(file)
    if is_study(values):
        from peft_lab.cli.compare import show_study

        _out().print(f"[green]ok[/] {_escape(show_study(values, file))}")
        return
    if "kind" in values or ("data" in values and "method" not in values):
        task = validate_task(file)
        _out().print(f'[green]ok[/] task "{task.name}" ({task.kind}), metrics: {", ".join(task.metrics)}')
        return
    config = run_config.load_run(file)
    run_folder.check_run(config)
    _out().print(f'[green]ok[/] run: method "{config.method}" on task "{config.task}" with {config.model_name_or_path}')


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def train(context: typer.Context) -> None:
    """Train an adapter: flags, a run YAML, or both. `peft-lab train --help` lists the flags."""
    from peft_lab.runs import run_config, run_folder

    if not context.args or {"-h", "--help"} & set(context.args):
        run_config.argument_parser().print_help()
        raise typer.Exit()
    file, overrides = run_config.parse_arguments(context.args)
    config = run_config.load_run(file, overrides)
    run_folder.check_run(config)  # before torch is imported
    from peft_lab.training.run import train as run_training

    result = run_training(config)
    if result.is_main_process:
        _report(result.metrics)


@app.command()
def evaluate(
    adapter: Adapter,
    task: Annotated[
        str | None, typer.Option(help="Evaluate on this task instead of the one it was trained on.")
    ] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    model_name_or_path: Base = None,
    max_samples: Annotated[int | None, typer.Option("--max_samples", help="Evaluate on this many examples.")] = None,
    per_device_eval_batch_size: Rows = 32,
    allow_other_base: OtherBase = False,
) -> None:
    """Evaluate a saved adapter on a split of its task."""
    from peft_lab.data.task_registry import SPLITS, load_task
    from peft_lab.runs.run_folder import find_adapter

    if split not in SPLITS:
        raise ConfigError(f'Unknown split "{split}".{did_you_mean(split, SPLITS)} Splits: {", ".join(SPLITS)}.')
    if task is not None:
        load_task(task)
    folder = find_adapter(adapter)
    from peft_lab.training.evaluate import evaluate as run_evaluation

    found = run_evaluation(
        folder,
        task,
        split,
        model_name_or_path,
        max_samples=max_samples,
        batch_size=per_device_eval_batch_size,
        allow_other_base=allow_other_base,
    )
    table = _table("metric", "value")
    for name, value in found.items():
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    _out().print(table)


@app.command()
def predict(
    adapter: Adapter,
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="INPUT...", help="Texts, image files, or a .txt, .csv or .jsonl file of inputs."),
    ],
    task: Annotated[
        str | None, typer.Option(help="The task whose kind and labels apply, if the adapter names none.")
    ] = None,
    model_name_or_path: Base = None,
    per_device_eval_batch_size: Rows = 32,
    allow_other_base: OtherBase = False,
) -> None:
    """Predict for texts or images, one answer a line as JSON."""
    import json

    from peft_lab.data.task_registry import load_task
    from peft_lab.runs.run_folder import find_adapter

    if task is not None:
        load_task(task)
    folder = find_adapter(adapter)
    from peft_lab.training.evaluate import predict as run_prediction

    options: dict[str, Any] = {"batch_size": per_device_eval_batch_size, "allow_other_base": allow_other_base}
    for answer in run_prediction(folder, inputs, task, model_name_or_path, **options):
        typer.echo(json.dumps(answer, ensure_ascii=False))


@app.command()
def merge(
    adapter: Adapter,
    out: Annotated[Path, typer.Argument(help="Folder for the merged model.", show_default=False)],
    model_name_or_path: Base = None,
    allow_other_base: OtherBase = False,
) -> None:
    """Merge an adapter into its base: the result loads with transformers alone."""
    from peft_lab.runs.run_folder import find_adapter, refuse_filled

    folder = find_adapter(adapter)
    refuse_filled(out)
    from peft_lab.export.merge import merge as run_merge

    run_merge(folder, out, model_name_or_path, allow_other_base=allow_other_base)
    _out().print(f"Merged model written to {_escape(str(out))}")


@app.command()
def demo(
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Where the adapters go.")] = Path("demo-runs"),
    seeds: Annotated[
        int, typer.Option(min=1, help="Train each method with this many seeds; print mean and spread.")
    ] = 1,
    task: Annotated[list[str] | None, typer.Option(help="Only this task of the demo (may be repeated).")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Only this method of the demo (may be repeated).")] = None,
    max_steps: Annotated[int | None, typer.Option("--max_steps", min=1, help="Train for fewer steps.")] = None,
) -> None:
    """Train LoRA, SVFit and SSF on a text and an image task, from PyPI packages alone."""
    from peft_lab.cli.demo import demo as run_demo

    run_demo(output_dir, seeds=seeds, tasks=task, methods=method, max_steps=max_steps)


share.register(app)
compare.register(app)
for module in registry.command_modules():
    importlib.import_module(module).register(app)


def _report(metrics: dict[str, Any]) -> None:
    table = _table("split", "metric", "value", title=metrics["run"]["method"])
    for split, values in metrics["metrics"].items():
        for name, value in values.items():
            table.add_row(split, name, f"{value:.4f}" if isinstance(value, float) else str(value))
    _out().print(table)
    size = metrics["adapter_bytes"] / 1024
    _out().print(
        f"{metrics['parameters']['trainable']:,} trainable parameters, {size:,.0f} KB in "
        f"{_escape(metrics['run']['output_dir'])}, {metrics['train_seconds']:.1f} s, "
        f"peak memory {metrics['peak_memory_bytes'] / 2**20:,.0f} MB"
    )


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(*columns, title=title, title_justify="left")
    for column in table.columns:
        column.overflow = "fold"
    return table


def _out() -> Console:
    # A pipe has no width: 80 columns would break the tables that scripts read.
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160, soft_wrap=True)


def _paper(paper: str) -> str:
    return f"arXiv:{paper}" if paper and paper[0].isdigit() else _escape(paper)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
