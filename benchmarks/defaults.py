"""Default learning rates, from the validation scores of short runs.

    python benchmarks/defaults.py             # the page, from the studies' searches and results/defaults.csv
    python benchmarks/defaults.py --run       # first the runs that results/defaults.csv still lacks

The studies in `results/` tried several rates of each method on validation rows before their test rows were read; those
searches are the main source. Runs made here fill in what no study has: further tasks for LoRA, BayesPrompt, batch sizes
and warm-up. The page is `defaults.md`.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import report  # first: it sets the environment

from peft_lab.training.run import train

HERE = Path(__file__).parent
RESULTS, RUNS, PAGE = HERE / "results", HERE / "results" / "defaults.csv", HERE / "defaults.md"

#: Steps, rows of a step, part of the steps that warms up, and seed of the runs made here.
STEPS, BATCH, WARMUP, SEED = 60, 16, 0.1, 0
#: Batch sizes and warm-ups that are compared, at the same number of training rows.
BATCHES, WARMUPS = (8, 16, 32), (0.0, 0.1)
#: Runs of 12 steps are too short, the head has a rate of its own beside aTLAS, and CoLA was learned by no method.
LEFT_OUT = {"study": ["coffee", "atlas"], "task": ["local-glue-cola"]}
#: Rates that differ from the rule; the page says why.
EXCEPTIONS = {"full": 3e-4, "lora": 3e-3, "iapt": 3e-4, "bayes_prompt": 1e-1}


@dataclass(frozen=True)
class Workload:
    """Task and backbone, the validation metric that counts (greater is better), and a preset of the method."""

    name: str
    task: str
    backbone: str
    score: str = "accuracy"
    preset: str = ""


SNIPS = Workload("snips", "snips", "minilm")
BANKING = Workload("banking77", "local-banking77", "minilm")
SIGNS = Workload("sign-digits, ViT", "sign-digits", "${PEFT_LAB_DATA}/vit-mini-cifar10")
#: Method, workload and rates of the runs made here.
SEARCHES: list[tuple[str, Workload, tuple[float, ...]]] = [
    ("lora", SNIPS, (1e-3, 3e-3, 1e-2, 3e-2)),
    ("lora", BANKING, (1e-3, 3e-3, 1e-2, 3e-2)),
    ("lora", Workload("sst2-sentences", "local-sst2-sentences", "minilm"), (1e-3, 3e-3, 1e-2, 3e-2)),
    ("lora", Workload("sign-digits, EfficientNet", "sign-digits", "efficientnet-lite0"), (1e-3, 3e-3, 1e-2)),
    ("lora", SIGNS, (1e-3, 3e-3, 1e-2, 3e-2)),
    ("petalface", SIGNS, (1e-3, 3e-3, 1e-2, 3e-2)),
    (
        "lora",
        Workload("sign-digits, ViT", "sign-digits", "${PEFT_LAB_DATA}/vit-mini-cifar10"),
        (1e-3, 3e-3, 1e-2, 3e-2),
    ),
    ("bottleneck", SNIPS, (1e-3, 3e-3, 1e-2, 3e-2)),
    ("bottleneck", Workload("snips, parallel", "snips", "minilm", preset="parallel"), (1e-3, 3e-3, 1e-2, 3e-2)),
    (
        "bottleneck",
        Workload("sign-digits, parallel", "sign-digits", "${PEFT_LAB_DATA}/vit-mini-cifar10", preset="parallel"),
        (1e-3, 3e-3, 1e-2, 3e-2),
    ),
    ("bottleneck", Workload("snips, pfeiffer", "snips", "minilm", preset="pfeiffer"), (1e-3, 3e-3, 1e-2, 3e-2)),
    ("wiclp", SNIPS, (3e-4, 1e-3, 3e-3, 1e-2)),
    ("intrinsic", SNIPS, (1e-2, 3e-2, 1e-1, 3e-1)),
    ("lora_xs", SNIPS, (1e-2, 3e-2, 1e-1)),
    ("svft", SNIPS, (3e-2, 1e-1, 3e-1)),
    ("svdiff", SNIPS, (1e-2, 3e-2, 1e-1, 3e-1)),
    ("gated_spectra", SNIPS, (1e-2, 3e-2)),
    ("sparse_support", SNIPS, (1e-2, 3e-2, 1e-1, 3e-1)),
    ("moment_probing", SNIPS, (1e-3, 3e-3, 1e-2)),
    (
        "moment_probing",
        Workload("sign-digits, ViT", "sign-digits", "${PEFT_LAB_DATA}/vit-mini-cifar10"),
        (1e-3, 3e-3, 1e-2),
    ),
    ("gated_spectra", SNIPS, (1e-2, 3e-2, 1e-1)),
    ("bayes_prompt", SNIPS, (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)),
]
#: Methods whose batch sizes and warm-ups are compared, one of each place, with their rate.
COMPARED = {"lora": 1e-2, "svfit": 1e-1, "ssf": 1e-2, "soft_prompt": 1e-1, "head": 3e-2}

HEAD = """\
# Default learning rates

The rate that `peft-lab train` takes where none is given, by method. Written by [`defaults.py`](defaults.py) from
validation rows alone: the searches of our [studies](README.md) (runs of 10 to 100 steps of 8 or 16 rows, AdamW, a
warm-up of a tenth of the steps, linear decay) and the {runs} runs of [`results/defaults.csv`](results/defaults.csv)
({steps} steps of {batch} rows, seed {seed}, at most 500 validation rows, 2 CPU cores). This is what someone does
who tries a method for the first time. No test row was read for it.

A cell is a task with a backbone, an arm of the method and a length of the runs; rates are rounded to half decades.
For each cell the score of a rate (accuracy, or the inverse of perplexity) is divided by the best score of the cell;
the tables show mean and minimum over the cells. The default, in bold, has the highest mean among the rates tried in
at least {share:.0%} of the cells. Most cells are one seed: means that differ by less than about 0.03 cannot be told
apart. Longer runs and larger backbones often want a lower rate; `peft-lab compare` searches for it.

Exceptions: `full` has 3e-4 in place of 1e-3, because every backbone here is small (135 million parameters at most), and
larger ones are known to diverge at 1e-3. `lora` has 3e-3, because at 1e-2, whose mean is 0.006 higher, it failed in
some cells. `iapt` keeps 3e-4, which is near the best of the decoder, for which the method was made; the encoder of the
intents wants 1e-2, where the decoder diverges. `bayes_prompt` has 1e-1 as fixed prompts have, because one task alone
does not tell 3e-1 from it. Not measured, and taken from their papers: `metadata_prompt` and the tuners of peft that are
not listed below."""
SHARE = 0.75

BATCH_HEAD = """\
## Batch size and warm-up

Validation accuracy on snips with MiniLM after the same {rows} training rows in batches of 8, 16 and 32, without warm-up
and with one of a tenth of the steps, at the rate named. {verdict}"""
VERDICT = """\
Warm-up is better in most pairs, for every method on the mean, so it is the default of `peft-lab train` from 20 steps
on, as it is that of studies. Larger batches are no better for the same rows, so the 8 rows of Trainer stay."""


def run(method: str, workload: Workload, rate: float, batch: int = BATCH, warmup: float = WARMUP) -> dict[str, Any]:
    """Train once; returns a line of the runs."""
    with tempfile.TemporaryDirectory() as folder:
        metrics = train(
            task=workload.task,
            model_name_or_path=workload.backbone,
            method=method,
            method_args={"preset": workload.preset} if workload.preset else {},
            output_dir=folder,
            learning_rate=rate,
            max_steps=STEPS * BATCH // batch,
            per_device_train_batch_size=batch,
            per_device_eval_batch_size=64,
            warmup_steps=warmup,
            max_eval_samples=500,
            save_strategy="no",
            do_predict=False,
            seed=SEED,
            disable_tqdm=True,
        ).metrics
    line = {"method": method, "workload": workload.name, "rate": rate, "batch": batch, "warmup": warmup, "seed": SEED}
    return line | {"score": metrics["metrics"]["validation"][workload.score]}


def wanted_runs() -> Iterator[tuple[str, Workload, float, int, float]]:
    """Arguments of `run` for everything that the page needs."""
    for method, workload, rates in SEARCHES:
        for rate in rates:
            yield method, workload, rate, BATCH, WARMUP
    for method, rate in COMPARED.items():
        for batch in BATCHES:
            for warmup in WARMUPS:
                yield method, SNIPS, rate, batch, warmup


def run_missing() -> None:
    """Make the runs that the file lacks, and write each at once."""
    for method, workload, rate, batch, warmup in wanted_runs():
        lines = pd.read_csv(RUNS)
        keys = lines[["method", "workload", "rate", "batch", "warmup"]].itertuples(index=False, name=None)
        if (method, workload.name, rate, batch, warmup) in set(keys):
            continue
        line = run(method, workload, rate, batch, warmup)
        print(line, flush=True)
        pd.concat([lines, pd.DataFrame([line])]).to_csv(RUNS, index=False)


def scores() -> pd.DataFrame:
    """Validation scores of the studies' searches and of the runs made here.

    Columns: study, method, arm, task, steps, rate (rounded to half decades), score (greater is better).
    """
    lines = []
    for file in sorted(RESULTS.glob("*/results.jsonl")):
        for text in file.read_text(encoding="utf-8").splitlines():
            found = json.loads(text)
            if found["stage"] == "search" and found["status"] == "ok":
                lines.append(_search_line(file.parent.name, found))
    studies = pd.DataFrame(lines)
    for column, values in LEFT_OUT.items():
        studies = studies[~studies[column].isin(values)]
    own = pd.read_csv(RUNS)
    # Further seeds at the chosen rate are no search.
    own = own[(own["batch"] == BATCH) & (own["warmup"] == WARMUP) & (own["seed"] == SEED)]
    own = own.rename(columns={"workload": "task"}).assign(study="defaults", arm=own["method"], steps=STEPS)
    both = pd.concat([studies, own[studies.columns]])
    exponents = both["rate"].map(lambda rate: round(2 * math.log10(rate)) / 2)
    both["rate"] = exponents.map(lambda exponent: float(f"{10**exponent:.0e}"))
    return both


def _search_line(study: str, found: dict[str, Any]) -> dict[str, Any]:
    metrics = found["metrics"]
    name, values = metrics["main_metric"], metrics["metrics"]["validation"]
    score = 1 / values[name] if name == "perplexity" else values[name]
    line = {"study": study, "method": found["method"], "arm": found["arm"], "task": found["task"]}
    return line | {"steps": metrics["global_step"], "rate": found["learning_rate"], "score": score}


def relative_scores(lines: pd.DataFrame, method: str) -> pd.DataFrame:
    """Scores of a method, (cells, rates), each over the best of its cell."""
    cell = ["study", "arm", "task", "steps"]
    own = lines[lines["method"] == method].groupby([*cell, "rate"])["score"].max().unstack("rate")
    own = own[own.count(axis="columns") > 1]  # a rate alone compares nothing
    return own.div(own.max(axis="columns"), axis="index")


def chosen_rate(relative: pd.DataFrame) -> float:
    """Rate with the highest mean, among those tried in most of the cells."""
    common = relative.loc[:, relative.count() >= SHARE * len(relative)]
    return float(common.mean().idxmax())


def page() -> str:
    """Text of `defaults.md`."""
    runs, lines = pd.read_csv(RUNS), scores()
    parts = [HEAD.format(runs=len(runs), steps=STEPS, batch=BATCH, seed=SEED, share=SHARE)]
    for method in sorted(lines["method"].unique()):
        relative = relative_scores(lines, method)
        chosen, rows = EXCEPTIONS.get(method, chosen_rate(relative)), []
        for rate, values in relative.items():
            mark = f"**{rate:g}**" if rate == chosen else f"{rate:g}"
            rows.append([mark, f"{values.mean():.3f}", f"{values.min():.3f}", values.count()])
        parts += [f"## `{method}`", report.table(["rate", "mean", "minimum", "cells"], rows)]
    parts += [BATCH_HEAD.format(rows=STEPS * BATCH, verdict=" ".join(VERDICT.split())), _batch_table(runs)]
    return "\n\n".join(parts)


def _batch_table(runs: pd.DataFrame) -> str:
    rows, runs = [], runs[runs["seed"] == SEED]
    for method, rate in COMPARED.items():
        own = runs[(runs["method"] == method) & (runs["workload"] == SNIPS.name) & (runs["rate"] == rate)]
        found = own.set_index(["batch", "warmup"])["score"]
        rows.append([f"{method}, {rate:g}", *(f"{found[batch, part]:.3f}" for batch in BATCHES for part in WARMUPS)])
    heads = [f"{batch} rows, warm-up {part:g}" for batch in BATCHES for part in WARMUPS]
    return report.table(["method, rate", *heads], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="make the runs that results/defaults.csv lacks")
    if parser.parse_args().run:
        run_missing()
    PAGE.write_text(page() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
