"""Commands `train`, `evaluate` and `merge`.

The functions behind them are imported once the arguments are checked, because they import torch.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from peft_lab.cli.completion import TrainCommand, complete_task
from peft_lab.cli.options import Adapter, Base, BatchSize, OtherBase
from peft_lab.cli.output import Json, format_metric, new_table, print_json, print_out
from peft_lab.metrics.baselines import beside_baselines, shortfall
from peft_lab.runs.pruning import pruned_words
from peft_lab.utils.terminal import shown
from peft_lab.utils.verbosity import bars


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    # the flags of `train` are those of Trainer too, so its own parser reads them and prints their help
    settings = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    app.command(cls=TrainCommand, context_settings=settings, add_help_option=False)(train)
    for command in (evaluate, merge):
        app.command()(command)


def train(context: typer.Context, as_json: Json = False) -> None:
    """Train an adapter; `peft-lab train --help` lists the flags.

    The options are flags, a run YAML, or both.
    """
    from peft_lab.runs import command_line, run_config, run_folder

    if not context.args or {"-h", "--help"} & set(context.args):  # typer's own help would list no flag
        command_line.argument_parser().print_help()
        raise typer.Exit()
    file, overrides = command_line.parse_arguments(context.args)
    started = command_line.pop_launch(overrides)
    config = run_config.load_run(file, overrides)
    run_folder.check_run(config)  # before torch is imported
    if started is not None:
        from peft_lab.training.launch import launch_train

        raise typer.Exit(launch_train(*started, file, overrides, ["--json"] if as_json else []))
    wanted = config.training_arguments.get("disable_tqdm")
    with nullcontext() if wanted is None else bars(not wanted, always=True):
        from peft_lab.training.run import train as run_training

        result = run_training(config)
    if result.is_main_process and as_json:
        print_json({"output_dir": str(result.output_dir), **result.metrics})
    elif result.is_main_process:
        _show_metrics(result.metrics, result.output_dir)


def evaluate(
    adapter: Adapter,
    task: Annotated[
        str | None,
        typer.Option(autocompletion=complete_task, help="Evaluate on this task instead of the one it was trained on."),
    ] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    model_name_or_path: Base = None,
    max_samples: Annotated[int | None, typer.Option("--max_samples", help="Evaluate on this many examples.")] = None,
    per_device_eval_batch_size: BatchSize = 32,
    allow_other_base: OtherBase = False,
    as_json: Json = False,
) -> None:
    """Evaluate a saved adapter on a split of its task."""
    from peft_lab.data.task_registry import check_split, load_task
    from peft_lab.runs.run_folder import find_adapter

    check_split(split)
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
    if as_json:
        print_json({"adapter": adapter, "split": split, "metrics": found})
        return
    table = new_table("metric", "value")
    for name, value in found.items():
        table.add_row(name, format_metric(value))
    print_out(table)


def merge(
    adapter: Adapter,
    out: Annotated[Path, typer.Argument(help="Folder for the merged model.", show_default=False)],
    model_name_or_path: Base = None,
    allow_other_base: OtherBase = False,
    method_args: Annotated[
        list[str] | None,
        typer.Option("--method_args", help="NAME=VALUE: a field that chooses what the merge stands for."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Merge an adapter into its base: the result loads with transformers alone."""
    from peft_lab.runs.run_folder import find_adapter, refuse_filled
    from peft_lab.utils import plain_yaml

    folder = find_adapter(adapter)
    refuse_filled(out)
    from peft_lab.export.merge import merge as run_merge

    pairs = [given.partition("=") for given in method_args or ()]
    fields = {name: plain_yaml.read(value) for name, _, value in pairs}
    run_merge(folder, out, model_name_or_path, allow_other_base=allow_other_base, method_args=fields)
    if as_json:
        print_json({"output_dir": str(out)})
    else:
        print_out(f"Merged model written to {shown(out)}")


def _times(metrics: dict[str, Any]) -> str:
    """Seconds of the training steps, and of the whole run where an older one has kept them."""
    times = f"{metrics['train_seconds']:.1f} s of training"
    if "wall_seconds" in metrics:
        times += f" ({metrics['wall_seconds']:.1f} s with loading and evaluation)"
    return times


def _show_metrics(metrics: dict[str, Any], folder: Path) -> None:
    table = new_table("split", "metric", "value", title=metrics["run"]["method"])
    for split, values in metrics["metrics"].items():
        for name, value in values.items():
            table.add_row(split, name, format_metric(value))
    print_out(table)
    size = metrics["adapter_bytes"] / 1024
    print_out(
        f"{metrics['parameters']['trainable']:,} trainable parameters, {size:,.0f} KB in "
        f"{shown(folder)}, {_times(metrics)}, "
        f"peak memory {metrics['peak_memory_bytes'] / 2**20:,.0f} MB"
    )
    if metrics.get("pruning"):
        print_out(f"Pruned of the base: {pruned_words(metrics['pruning'])}")
    sentence = beside_baselines(metrics)
    if sentence:
        print_out(f"[bold red]{shown(sentence)}[/]" if shortfall(metrics) else shown(sentence))
