"""Command `predict`: answers beside their inputs, as JSON lines or as a file.

The model is loaded once the inputs are read and checked, because that imports torch.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from peft_lab.cli.completion import complete_task
from peft_lab.cli.options import Adapter, Base, BatchSize, OtherBase
from peft_lab.errors import ConfigError
from peft_lab.utils.text import json_line, visible


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(predict)


def predict(
    adapter: Adapter,
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help=(
                "Texts; image files, folders of them or patterns; files of inputs: .txt, .csv, .tsv, .json, .jsonl or "
                ".parquet; or - for standard input, one a line."
            ),
        ),
    ],
    task: Annotated[
        str | None,
        typer.Option(
            autocompletion=complete_task, help="The task whose kind and labels apply, if the adapter names none."
        ),
    ] = None,
    model_name_or_path: Base = None,
    top_k: Annotated[int | None, typer.Option("--top_k", help="Labels in each answer, the best first.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write the answers to this file: .jsonl, .csv or .parquet.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output file.")] = False,
    per_device_eval_batch_size: BatchSize = 32,
    allow_other_base: OtherBase = False,
) -> None:
    """Predict for texts or images, one answer a line as JSON, with its input."""
    from peft_lab.data.answer_files import answer_line, check_output, write_answers
    from peft_lab.data.prediction_inputs import check_top_k
    from peft_lab.data.task_registry import kind as task_kind
    from peft_lab.data.task_registry import load_task
    from peft_lab.runs import run_folder
    from peft_lab.runs.trained_task import trained_task

    if overwrite and output is None:
        raise ConfigError("--overwrite goes with --output FILE.")
    file = None if output is None else check_output(output, overwrite)
    if task is not None:
        load_task(task)
    folder = run_folder.find_adapter(adapter)
    trained = trained_task(folder, run_folder.read_origin(folder), task, run_folder.is_download(adapter))
    kind = task_kind(trained.kind)
    if file is not None:
        check_output(file, overwrite, kind.answer_images)
    check_top_k(top_k, kind, trained, run_folder.read_labels(folder))
    rows = _read(inputs, kind.input_files(trained))
    from peft_lab.training.evaluate import predict_rows

    options: dict[str, Any] = {"batch_size": per_device_eval_batch_size, "allow_other_base": allow_other_base}
    answers = predict_rows(folder, rows, task, model_name_or_path, top_k=top_k, **options)
    if file is not None:
        write_answers(file, rows, answers)
        typer.echo(visible(f"{len(answers)} answers written to {file}"))
        return
    # not printed by rich, which would break long lines and read brackets as markup
    for row, answer in zip(rows, answers, strict=True):
        typer.echo(json_line(answer_line(row, answer)))


def _read(inputs: list[str], endings: tuple[str, ...]) -> list[Any]:
    from peft_lab.data.prediction_inputs import STANDARD_INPUT, read_inputs, read_standard_input

    if STANDARD_INPUT not in inputs:
        return read_inputs(inputs, endings)
    if len(inputs) > 1:
        raise ConfigError('"-" stands for standard input, which must be the only input.')
    return read_standard_input(sys.stdin, endings)
