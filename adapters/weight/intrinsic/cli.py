"""Command `intrinsic-dimension` of `peft-lab`: search for the smallest d that is good enough.

It imports torch after its checks only.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peft_lab.cli.output import Json, format_metric, new_table, print_json, print_out
from peft_lab.errors import ConfigError
from peft_lab.utils.atomic_files import check_can_be_made, new_file, write_errors, write_text
from peft_lab.utils.interruption import going_on
from peft_lab.utils.terminal import shown

if TYPE_CHECKING:
    import pandas as pd

    from peft_lab.adapters.weight.intrinsic.dimension import Dimension

SETTINGS, RUNS = "search.json", "runs.csv"
PAGE, PICTURE = "intrinsic_dimension.md", "intrinsic_dimension.png"


def register(app: typer.Typer) -> None:
    """Add the command to the `peft-lab` command."""
    app.command("intrinsic-dimension")(intrinsic_dimension)


def intrinsic_dimension(
    task: Annotated[str, typer.Option(help="Name of a task, or the path of your own task YAML.", show_default=False)],
    model_name_or_path: Annotated[str, typer.Option("--model_name_or_path", help="The backbone.", show_default=False)],
    output_dir: Annotated[
        Path, typer.Option("--output_dir", help="Folder for runs, table and picture.", show_default=False)
    ],
    d: Annotated[str, typer.Option("--d", help="Dimensions to try.")] = "10,32,100,316,1000,3162,10000",
    learning_rates: Annotated[
        str, typer.Option("--learning_rates", help="Rates to try with each d, and with the head alone.")
    ] = "1e-2,3e-2,1e-1",
    full_learning_rates: Annotated[
        str, typer.Option("--full_learning_rates", help="Rates to try with full fine-tuning.")
    ] = "1e-4,3e-4,1e-3",
    share: Annotated[float, typer.Option(help="Share of the full score to reach; 0.9 gives d90.")] = 0.9,
    structure_aware: Annotated[
        bool, typer.Option("--structure_aware/--no-structure_aware", help="A factor for each block (SAID), or none.")
    ] = True,
    whole_curve: Annotated[
        bool, typer.Option("--whole_curve", help="Try all d, not only up to the first that is good enough.")
    ] = False,
    max_steps: Annotated[int, typer.Option("--max_steps", min=1, help="Training steps of a run.")] = 200,
    per_device_train_batch_size: Annotated[
        int, typer.Option("--per_device_train_batch_size", min=1, help="Rows of a training step.")
    ] = 16,
    max_train_samples: Annotated[
        int | None, typer.Option("--max_train_samples", min=1, help="Train on this many rows.")
    ] = None,
    max_eval_samples: Annotated[
        int | None, typer.Option("--max_eval_samples", min=1, help="Score this many validation rows.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the runs and of the projections.")] = 0,
    as_json: Json = False,
) -> None:
    """Search for d90: the fewest trained numbers with 90 % of the score of full fine-tuning.

    Scores are those of the validation rows. A search that was stopped goes on where it was.
    """
    dimensions, rates = _numbers("d", d, int), _numbers("learning_rates", learning_rates, float)
    full_rates = _numbers("full_learning_rates", full_learning_rates, float)
    if not 0 < share <= 1:
        raise ConfigError(f"--share {share} must be above 0 and at most 1.")
    settings = {
        "task": task,
        "model_name_or_path": model_name_or_path,
        "share": share,
        "structure_aware": structure_aware,
        "max_steps": max_steps,
        "per_device_train_batch_size": per_device_train_batch_size,
        "max_train_samples": max_train_samples,
        "max_eval_samples": max_eval_samples,
        "seed": seed,
    }
    metric = _check(settings, output_dir)
    again = "Stopped; the same command goes on with the runs that are missing."
    with going_on(lambda: again), write_errors(output_dir):
        write_text(output_dir / SETTINGS, json.dumps(settings, indent=2) + "\n")
        search = _Search(settings, output_dir, metric)
        search.run_all(dimensions, rates, full_rates, whole_curve)
        _write(search.result(), settings, output_dir)
    _show(search.result(), output_dir, as_json)


def _numbers(option: str, text: str, number: type) -> list[Any]:
    """Positive numbers of an option, in ascending order.

    Raises:
        ConfigError: the text holds something else.
    """
    try:
        found = sorted({number(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or not 0 < found[0] <= found[-1] < float("inf"):
        kind = "whole numbers" if number is int else "numbers"
        raise ConfigError(f'--{option} "{text}" must be positive {kind} with commas between them.')
    return found


def _check(settings: dict[str, Any], folder: Path) -> str:
    """Check a search without torch; returns the metric of its task.

    Raises:
        ConfigError: the task has no score of which a share means anything, the folder holds another search, or
            matplotlib is missing.
    """
    from peft_lab.adapter_files import safe_files
    from peft_lab.backbones.pypi_weights import check_name
    from peft_lab.data.task_registry import validate_task
    from peft_lab.metrics import greater_is_better

    loaded = validate_task(settings["task"])
    check_name(settings["model_name_or_path"])
    if not greater_is_better(loaded.main_metric):
        raise ConfigError(
            f'Task "{loaded.name}" is measured by {loaded.main_metric}, which is better the lower it is, so a share '
            "of it is no goal; choose a task with a score."
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("Pictures need matplotlib: pip install 'peft-lab[plots]'.")
    check_can_be_made(folder / SETTINGS)
    if (folder / SETTINGS).is_file():
        there = safe_files.read_json(folder / SETTINGS)
        for key, value in settings.items():
            # another share is another reading of the same runs
            if key != "share" and there.get(key) != value:
                raise ConfigError(
                    f'"{folder}" holds a search with {key}={there.get(key)}, not {value}; choose another --output_dir.'
                )
    elif folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f'"{folder}" is not empty and holds no search; choose another --output_dir.')
    return loaded.main_metric


class _Search:
    """Runs of a search; each is a line of `runs.csv`."""

    def __init__(self, settings: dict[str, Any], folder: Path, metric: str) -> None:
        import pandas as pd

        from peft_lab.adapters.weight.intrinsic.dimension import COLUMNS

        self.settings, self.file, self.metric = settings, folder / RUNS, metric
        empty = pd.DataFrame(columns=list(COLUMNS))
        self.runs: pd.DataFrame = pd.read_csv(self.file) if self.file.is_file() else empty
        if list(self.runs.columns) != list(COLUMNS):
            raise ConfigError(f'"{self.file}" has columns that no search writes; remove it, or the whole folder.')

    def run_all(self, dimensions: list[int], rates: list[float], full_rates: list[float], whole_curve: bool) -> None:
        """Make the runs of full fine-tuning, of the head alone, and of each d until one is good enough."""
        for rate in full_rates:
            self.run("full", None, rate)
        for d in [0, *dimensions]:
            for rate in rates:
                self.run("intrinsic" if d else "head", d, rate)
            if self.result().found is not None and not whole_curve:
                break

    def run(self, method: str, d: int | None, rate: float) -> None:
        """Train and score once, unless the search has done so before."""
        import pandas as pd

        from peft_lab.training.run import train

        known = self.runs["d"].isna() if d is None else self.runs["d"] == d
        if (known & (self.runs["learning_rate"] == rate)).any():
            return
        own = {"d": d, "structure_aware": self.settings["structure_aware"], "projection_seed": self.settings["seed"]}
        common = {key: value for key, value in self.settings.items() if key not in ("share", "structure_aware")}
        with tempfile.TemporaryDirectory() as scratch:
            found = train(
                **common,
                method=method,
                method_args=own if method == "intrinsic" else {},
                learning_rate=rate,
                output_dir=str(Path(scratch, "run")),
                save_strategy="no",
                do_predict=False,
            ).metrics
        line = [method, d, rate, found["metrics"]["validation"][self.metric], found["parameters"]["adapter"]]
        added = pd.DataFrame([[*line, found["train_seconds"]]], columns=self.runs.columns)
        self.runs = pd.concat([self.runs, added], ignore_index=True) if len(self.runs) else added
        with new_file(self.file) as partial:
            self.runs.to_csv(partial, index=False)

    def result(self) -> Dimension:
        """Result of the runs so far."""
        from peft_lab.adapters.weight.intrinsic.dimension import Dimension

        return Dimension.of(self.runs, self.metric, self.settings["share"])


def _write(result: Dimension, settings: dict[str, Any], folder: Path) -> None:
    write_text(folder / PAGE, result.page(settings))
    with new_file(folder / PICTURE) as partial:
        partial.write_bytes(result.picture())


def _show(result: Dimension, folder: Path, as_json: bool) -> None:
    document = result.document()
    if as_json:
        print_json({"output_dir": str(folder), **document})
        return
    table = new_table("d", result.metric, "learning rate", "parameters beside the head")
    for row in document["curve"]:
        cells = (str(row["d"]), format_metric(row["score"]), f"{row['learning_rate']:g}")
        table.add_row(*cells, f"{row['adapter_parameters']:,}")
    full = document["full"]
    table.add_row("full", format_metric(full["score"]), f"{full['learning_rate']:g}", "")
    print_out(table)
    print_out(shown(result.sentence()))
    print_out(f"Table and picture are in {shown(folder)}")
