"""Two processes on the CPU (gloo): the averaged gradient is the single process's, and a broken run continues."""

from __future__ import annotations

import json
import multiprocessing
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.method_runs import TRAINABLE, options_for
from support.process_runs import SGD as SGD_OF_RUNS
from support.properties import FITTED, IMAGES, equal_states
from support.tiny_runs import (
    diverge_as_rank,
    environment,
    make_backbone,
    make_decoder,
    make_task,
    make_writing_task,
    options,
    same_weights,
    train_as_rank,
    weights,
)

from peft_lab.training.run import train

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch with gloo")

#: Plain SGD without clipping: Adam would hide a gradient that is too large by a factor.
SGD = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.5, "max_steps": 5}
TESTS = Path(__file__).parents[1]
#: accelerate starts several processes on one CPU machine by its --multi_gpu launcher; `use_cpu` makes them gloo.
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return {
        "task": make_task(folder / "data"),
        "writing": make_writing_task(folder / "data"),
        "backbone": make_backbone(folder / "bert"),
        "decoder": make_decoder(folder / "llama"),
    }


@pytest.fixture(scope="module")
def server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.tiny_runs", "peft_lab.training.run"])
    return context


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def two(server, values, kill=None) -> list[int]:
    """Train as two processes; with `kill`, the second dies there and the first, which waits for it, is ended."""
    port = free_port()
    processes = [server.Process(target=train_as_rank, args=(values, r, port, kill if r else None)) for r in (0, 1)]
    for process in processes:
        process.start()
    processes[1].join(120)
    processes[0].join(120 if kill is None else 5)
    if processes[0].is_alive():
        processes[0].kill()
        processes[0].join()
    return [process.exitcode for process in processes]


def test_accelerate_launch_with_two_processes_gives_the_weights_of_one(place, tmp_path):
    run = tmp_path / "run.yaml"
    values = options(place["task"], place["backbone"], tmp_path / "two", **SGD, per_device_train_batch_size=4)
    run.write_text(yaml.safe_dump(values))
    launch = [sys.executable, *LAUNCH, "--main_process_port", str(free_port())]
    done = subprocess.run(
        [*launch, "-m", "peft_lab", "train", str(run), "--max_steps", "5"],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trainable parameters") == 1  # only the first process reports
    metrics = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert metrics["processes"] == 2
    one = train(options(place["task"], place["backbone"], tmp_path / "one", **SGD, per_device_train_batch_size=8))
    start = train(options(place["task"], place["backbone"], tmp_path / "start", **SGD | {"learning_rate": 0.0}))
    assert same_weights(tmp_path / "one", tmp_path / "two", tolerance=2e-6)
    assert not same_weights(tmp_path / "two", start.output_dir, tolerance=1e-2)  # it did move
    assert metrics["metrics"]["test"]["loss"] == pytest.approx(one.metrics["metrics"]["test"]["loss"], abs=1e-5)


#: Runs beside each method's own, as fields of its run: training data that is read by gradients, views that are drawn,
#: and stored features.
FURTHER: dict[str, dict[str, Any]] = {
    "atlas with blocks": {"method": "atlas", "method_args": {"blocks": 3}},
    "linear_svm on images": {"method": "linear_svm", "max_steps": -1},
    "head on stored features": {"method": "head", "features": "cached"},
    "nearest_mean on stored features": {"method": "nearest_mean", "features": "cached", "max_steps": -1},
    "moment_probing on stored features": {"method": "moment_probing", "features": "cached"},
}
RUNS = {method: {"method": method} for method in TRAINABLE} | {m: {"method": m, "max_steps": -1} for m in FITTED}
#: Runs whose two processes are no one process: bayes_prompt draws particles for the rows of each, p2p draws views of
#: them, and nmtune takes statistics over them.
APART = ("bayes_prompt", "p2p", "nmtune")


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with what a single process and the two of one `accelerate launch` end with, for each run."""
    folder = tmp_path_factory.mktemp("launched")
    # made before `options_for` makes one with dropout, which processes would draw apart
    make_task(folder / "texts")
    make_backbone(folder / "bert")
    for ways, launcher, batch in (("one", [], 8), ("two", LAUNCH, 4)):
        runs = {}
        for name, fields in (RUNS | FURTHER).items():
            like = IMAGES[0] if name.endswith("on images") else fields["method"]
            values = {**SGD_OF_RUNS, **fields, "per_device_train_batch_size": batch, "save_strategy": "no"}
            runs[name] = options_for(like, folder, folder / ways / "out" / name) | values
        (folder / ways).mkdir(exist_ok=True)
        (folder / ways / "runs.json").write_text(json.dumps(runs))
        port = ["--main_process_port", str(free_port())] if launcher else []
        done = subprocess.run(
            [sys.executable, *launcher, *port, "-m", "support.process_runs", str(folder / ways)],
            capture_output=True,
            text=True,
            env=environment({"PYTHONPATH": str(TESTS), "PEFT_LAB_CACHE": str(folder / ways / "cache")}),
            timeout=1800,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-5000:]
    return folder


def ends(launched: Path, name: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """What one process ends with, and each of two."""
    files = [launched / "one" / f"{name}-0.pt", *(launched / "two" / f"{name}-{rank}.pt" for rank in (0, 1))]
    one, first, second = (torch.load(file, weights_only=True) for file in files)
    assert "refused" not in one, one["refused"]
    assert (one["processes"], first["processes"]) == (1, 2)
    return one, first, second


@pytest.mark.parametrize("name", [name for name in RUNS | FURTHER if name not in APART])
def test_two_processes_give_the_values_and_scores_of_one(name, launched):
    one, first, _ = ends(launched, name)
    for tensor, value in one["values"].items():
        torch.testing.assert_close(first["values"][tensor], value, atol=2e-6, rtol=0)
    assert {s: m["loss"] for s, m in first["metrics"].items()} == pytest.approx(
        {s: m["loss"] for s, m in one["metrics"].items()}, abs=1e-5
    )
    # and the runs are such that a wrong gradient would show
    method = (RUNS | FURTHER)[name]["method"]
    own = [moved for tensor, moved in one["moved"].items() if method in tensor or method in ("full", "head")]
    assert method in FITTED or max(own) > 1e-3


@pytest.mark.parametrize("name", RUNS | FURTHER)
def test_both_processes_end_with_the_same_values(name, launched):
    """Those of the second answer its part of the rows of an evaluation, and those of the first are saved."""
    _, first, second = ends(launched, name)
    assert equal_states(first["values"], second["values"])


def test_tokens_count_alike_in_whichever_process_they_are(server, place, tmp_path):
    """Answers differ in length: a mean of the two processes' means would weigh their tokens differently."""
    values = options(place["writing"], place["decoder"], tmp_path / "two", **SGD | {"learning_rate": 0.1})
    divided = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    assert two(server, values | divided) == [0, 0]
    train(values | {"output_dir": str(tmp_path / "one"), "per_device_train_batch_size": 8})
    assert same_weights(tmp_path / "one", tmp_path / "two", tolerance=5e-6)
    assert max(v.abs().max() for n, v in weights(tmp_path / "two").items() if "lora_B" in n) > 1e-3  # it did move


def test_both_processes_stop_at_the_loss_that_one_of_them_has_seen(server, place, tmp_path):
    values = options(place["task"], place["backbone"], tmp_path, save_steps=1, max_steps=6)
    port = free_port()
    processes = [server.Process(target=diverge_as_rank, args=(values, rank, port)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [7, 7]
    assert {path.name for path in tmp_path.iterdir()} == {"run.yaml", "checkpoint-1", "checkpoint-2"}
    manifest = json.loads((tmp_path / "checkpoint-2" / "manifest.json").read_text())
    assert manifest["processes"] == 2
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= manifest["files"].keys()


def test_a_run_whose_process_was_killed_continues_to_the_same_weights(server, place, tmp_path):
    values = {"save_steps": 2, "max_steps": 6, "per_device_train_batch_size": 4}
    assert two(server, options(place["task"], place["backbone"], tmp_path / "alone", **values)) == [0, 0]
    broken = options(place["task"], place["backbone"], tmp_path / "out", **values)
    codes = two(server, broken, kill=("_save_rng_state", 2))
    assert codes[1] == -signal.SIGKILL
    assert two(server, broken) == [0, 0]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["resumed_from"] == "checkpoint-2"
    assert same_weights(tmp_path / "out", tmp_path / "alone")
