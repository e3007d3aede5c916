"""Commands `compare`, `recommend` and `report`.

The functions behind them are imported once the arguments are checked, because they import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peft_lab.cli.completion import complete_backbone, complete_task
from peft_lab.cli.output import Json, print_json
from peft_lab.errors import ConfigError
from peft_lab.utils.interruption import Stopped
from peft_lab.utils.terminal import SafeConsole, shown

if TYPE_CHECKING:
    from peft_lab.comparison import Comparison, Recommendation, Study
    from peft_lab.comparison.stats.estimates import Estimate
    from peft_lab.comparison.stats.statistics import CellResult

Task = Annotated[
    str | None, typer.Option("--task", autocompletion=complete_task, help="A task, if there is no study file.")
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model_name_or_path", autocompletion=complete_backbone, help="The backbone, if there is no study file."
    ),
]
Folder = Annotated[Path | None, typer.Option("--output_dir", help="Its folder; comparisons/NAME if left out.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Runs at once; one per GPU, else one per two cores.")]
Where = Annotated[str, typer.Option(help="local, or ray (needs the package ray).")]
Address = Annotated[str | None, typer.Option(help="Ray cluster to use, such as auto; left out, one is started here.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(compare)
    app.command()(recommend)
    app.command()(report)


def compare(
    study: Annotated[Path | None, typer.Argument(help="A study YAML; see `examples/study.yaml`.")] = None,
    task: Task = None,
    model_name_or_path: Model = None,
    output_dir: Folder = None,
    max_steps: Annotated[
        int | None, typer.Option("--max_steps", min=1, help="Training steps of each run, without a study file.")
    ] = None,
    workers: Workers = None,
    backend: Where = "local",
    address: Address = None,
    retry_failed: Annotated[bool, typer.Option("--retry_failed", help="Make the runs that failed again.")] = False,
    json: Json = False,
) -> None:
    """Compare methods by a study YAML, or on one task.

    Without a study file six methods are compared on --task with --model_name_or_path. Repeat the command to go on.
    """
    from peft_lab.comparison import compare as run_comparison

    done = run_comparison(
        _study(study, task, model_name_or_path, max_steps),
        output_dir,
        workers=workers,
        backend=backend,
        address=address,
        retry_failed=retry_failed,
    )
    if json:
        from peft_lab.comparison.records.results import read_predictions
        from peft_lab.comparison.stats.statistics import rank_arms

        cells = rank_arms(done.records, lambda record: read_predictions(done.folder, record))
        print_json(_comparison_values(done, cells))
    else:
        _summarise(done)
    if done.failed:  # a script that goes on with the results must notice
        raise typer.Exit(1)


def recommend(
    task: Annotated[str, typer.Option("--task", autocompletion=complete_task, help="The task.")],
    model_name_or_path: Annotated[
        str, typer.Option("--model_name_or_path", autocompletion=complete_backbone, help="The backbone.")
    ],
    minutes: Annotated[float, typer.Option(min=0, help="Time for everything.")] = 10.0,
    output: Annotated[Path, typer.Option(help="The run YAML to write.")] = Path("run.yaml"),
    output_dir: Folder = None,
    max_steps: Annotated[
        int | None, typer.Option("--max_steps", min=1, help="Training steps of each run, if the time suffices.")
    ] = None,
    workers: Workers = None,
    json: Json = False,
) -> None:
    """Compare methods on your task within a time, and choose one.

    It always ends with an answer, and a run YAML for `peft-lab train`.
    """
    from peft_lab.comparison.study.schema import default_study

    default_study(task, model_name_or_path, max_steps)  # raises its errors before anything heavy is imported
    from peft_lab.comparison.run.recommend import recommend as run_recommendation

    try:
        found = run_recommendation(
            task, model_name_or_path, minutes, output, output_dir=output_dir, max_steps=max_steps, workers=workers
        )
    except Stopped as stop:
        # the answer from what was there; the last line says how to go on
        if stop.result is not None:
            _show_recommendation(stop.result, json)
        raise
    _show_recommendation(found, json)


def _show_recommendation(found: Recommendation, json: bool) -> None:
    if json:
        print_json(_recommendation_values(found))
        return
    _summarise(found.comparison)
    console = SafeConsole(highlight=False, soft_wrap=True)
    # sentences may hold square brackets, which rich would take for markup
    for sentence in (*found.reasons, *found.dropped, *found.more):
        console.print(shown(sentence))
    console.print(f"[bold]{shown(found.answer)}[/]")
    console.print(f"peft-lab train {shown(found.file)}")


def _recommendation_values(found: Recommendation) -> dict[str, Any]:
    score = found.score
    return {
        "answer": found.answer,
        "arm": found.arm,
        "learning_rate": found.learning_rate,
        "evidence": score is not None,
        "finished": found.finished,
        "metric": found.cell.metric if found.cell is not None else None,
        "score": None if score is None else _score_values(score),
        "reasons": list(found.reasons),
        "left_out": list(found.dropped),
        "more_time": list(found.more),
        "options": found.options,
        "file": str(found.file),
        "comparison": _comparison_values(found.comparison, [] if found.cell is None else [found.cell]),
    }


def _comparison_values(done: Comparison, cells: Sequence[CellResult]) -> dict[str, Any]:
    failed = []
    for record in done.failed:
        failed.append({"arm": record.arm, "task": record.task, "seed": record.seed, "error": record.error})
    return {
        "folder": str(done.folder),
        "report": None if done.report is None else str(done.report),
        "runs": len(done.records),
        "failed": failed,
        "unfinished": done.unfinished,
        "results": [_cell_values(cell) for cell in cells],
    }


def _cell_values(cell: CellResult) -> dict[str, Any]:
    arms = []
    for arm in cell.arms:
        arms.append({"arm": arm.label, **_score_values(arm.score), "by_seed": arm.by_seed})
    return {
        "task": cell.task,
        "backbone": cell.backbone,
        "metric": cell.metric,
        "arms": arms,
        "without_score": list(cell.without_score),
        "indistinguishable_from_first": list(cell.indistinguishable),
    }


def _score_values(score: Estimate) -> dict[str, Any]:
    return {"mean": score.value, "low": score.low, "high": score.high, "interval_over": score.basis}


def report(
    folder: Annotated[Path, typer.Argument(help="The output_dir of a comparison.")],
    out: Annotated[Path | None, typer.Option(help="Folder for a copy to share: no runs, no paths of yours.")] = None,
    as_json: Json = False,
) -> None:
    """Write the report of a comparison again, or a copy to share."""
    from peft_lab.comparison.report.report import write_report

    written = write_report(folder, out)
    if as_json:
        print_json({"report": str(written)})
    else:
        SafeConsole(highlight=False, soft_wrap=True).print(f"Report: {shown(written)}")


def _study(file: Path | None, task: str | None, backbone: str | None, max_steps: int | None) -> Study:
    from peft_lab.comparison import default_study, load_study

    if file is not None:
        given = {"--task": task, "--model_name_or_path": backbone, "--max_steps": max_steps}
        extra = next((name for name, value in given.items() if value is not None), None)
        if extra is not None:
            raise ConfigError(f'{extra} does not go with a study file; write it into "{file}".')
        return load_study(file)
    if task is None or backbone is None:
        raise ConfigError("Name a study file, or both --task and --model_name_or_path.")
    return default_study(task, backbone, max_steps)


def _summarise(done: Comparison) -> None:
    """Print the folder of the results and the runs that failed."""
    console = SafeConsole(highlight=False, soft_wrap=True)
    for record in done.failed:
        console.print(
            f"[red]failed[/] {shown(f'{record.arm}, {record.task}, seed {record.seed}: {record.error}')} "
            f"({shown(done.folder / record.folder)})"
        )
    if done.failed:
        console.print("`--retry_failed` makes them again.")
    console.print(f"{len(done.records)} runs, {len(done.failed)} failed: {shown(done.folder)}")
    if done.report is not None:
        console.print(f"Report: {shown(done.report)}")


def show_study(values: dict[str, Any], file: str) -> str:
    """Describe a study file in one line, for `peft-lab validate`."""
    from peft_lab.comparison.run.plan import check_first_runs, count_beyond, count_runs
    from peft_lab.comparison.study.schema import from_mapping

    study = from_mapping(values, f'"{file}"', Path(file).expanduser().absolute().parent)
    check_first_runs(study)
    line = (
        f'study "{study.name}": {len(study.arms)} arms, {len(study.cells)} tasks on backbones, '
        f"{len(study.seeds)} seeds, {count_runs(study)} runs"
    )
    beyond = count_beyond(study)
    if beyond:
        line += f", at most {beyond} more where the best learning rate is the lowest or highest"
    return line
