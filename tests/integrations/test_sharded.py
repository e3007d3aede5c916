"""Weights that are sharded over two processes: FSDP2, DeepSpeed ZeRO and tensor parallelism, on the CPU by gloo."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support import sharded_runs
from support.properties import EVERY_OWN, FITTED, KEEPS_HEAD, UNTRAINED
from support.sharded_runs import TENSOR_PARALLEL, two
from support.tiny_runs import environment, make_backbone, make_decoder, make_task, options, same_weights, weights

from peft_lab.tuners.merge_refusals import SHARDED_MERGE

METHODS = ["lora", *(m for m in EVERY_OWN if m not in FITTED), *KEEPS_HEAD, *sharded_runs.FIELDS]
#: Largest difference of a loss or a trained value from those of one process.
TOLERANCE = 1e-5
#: Methods that read training data, which ZeRO-3 refuses.
READERS = [*(m for m in (*UNTRAINED, *KEEPS_HEAD) if m not in FITTED), "atlas with blocks"]
#: Methods that draw for the rows of a process, or take statistics over them.
BY_PROCESS = [*UNTRAINED, "nmtune", "p2p"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def server() -> Any:
    return sharded_runs.server()


@pytest.fixture(scope="module")
def trained(place: Path, server: Any) -> Callable[[str, str], dict[str, Any]]:
    """What each method has found, one way of sharding after the other."""

    @lru_cache
    def train(way: str, dtype: str) -> Path:
        if way.startswith("zero"):
            pytest.importorskip("deepspeed")
        out = place / dtype
        if way == "one":
            process = server.Process(target=sharded_runs.train_methods, args=(METHODS, way, out, dtype))
            process.start()
            process.join(600)
            assert process.exitcode == 0
        else:
            assert two(server, sharded_runs.train_methods, METHODS, way, out, dtype, seconds=900) == [0, 0]
        return out / way

    def found(method: str, way: str, dtype: str = "float32") -> dict[str, Any]:
        folder = train(way, dtype) / method
        values = json.loads((folder / "found.json").read_text())
        if "error" not in values:
            values["weights"] = load_file(folder / "adapter" / "adapter_model.safetensors")
        return values

    return found


def assert_same(found: dict[str, Any], expected: dict[str, Any], tolerance: float = TOLERANCE) -> None:
    assert "error" not in found, found.get("error")
    assert found["losses"] == pytest.approx(expected["losses"], abs=tolerance)
    assert len(set(found["losses"])) > 1  # bfloat16 has few numbers, so two of the three may be equal
    assert found["weights"].keys() == expected["weights"].keys()
    for name, values in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name].float(), values.float(), atol=tolerance, rtol=0)


def reference(method: str) -> str:
    """Two processes are compared with two where each acts on its own rows, and otherwise with one."""
    return "ddp" if method in BY_PROCESS else "one"


def check_fsdp2(method: str, found: dict[str, Any], refused: Callable[[str], None]) -> bool:
    """Check the refusal of a method that FSDP2 cannot train; False for the others."""
    if method != "p2p":
        return False
    assert found["error"].startswith("ConfigError")
    assert "use DeepSpeed ZeRO-2" in found["error"]
    refused("it makes the model's inputs by parameters that FSDP2 gathers later")
    return True


@pytest.mark.integration(library="accelerate", use="FSDP2, two processes: losses, parameters and file of one process")
@pytest.mark.parametrize("method", METHODS)
def test_fsdp2_trains_as_one_process(method: str, trained: Any, refused: Callable[[str], None]) -> None:
    found = trained(method, "fsdp2")
    if check_fsdp2(method, found, refused):
        return
    assert_same(found, trained(method, reference(method)))
    assert found["model"].startswith("FSDP")


@pytest.mark.integration(library="accelerate", use="FSDP2, a bfloat16 base below float32 adapters")
@pytest.mark.parametrize("method", METHODS)
def test_fsdp2_trains_float32_adapters_on_a_bfloat16_base(
    method: str, trained: Any, refused: Callable[[str], None]
) -> None:
    found = trained(method, "fsdp2", "bfloat16")
    if check_fsdp2(method, found, refused):
        return
    # the processes round to bfloat16 apart, a step of which is 2^-7 at a loss of 1
    assert_same(found, trained(method, reference(method), "bfloat16"), tolerance=2**-6)


@pytest.mark.integration(library="deepspeed", use="ZeRO-1, two processes: losses, parameters and file of one process")
@pytest.mark.parametrize("method", METHODS)
def test_zero1_trains_as_one_process(method: str, trained: Any) -> None:
    found = trained(method, "zero1")
    assert_same(found, trained(method, reference(method)))
    assert found["model"] == "DeepSpeedEngine"


@pytest.mark.integration(library="deepspeed", use="ZeRO-2, two processes: losses, parameters and file of one process")
@pytest.mark.parametrize("method", METHODS)
def test_zero2_trains_as_one_process(method: str, trained: Any) -> None:
    found = trained(method, "zero2")
    assert_same(found, trained(method, reference(method)))
    assert found["model"] == "DeepSpeedEngine"


@pytest.mark.integration(library="deepspeed", use="ZeRO-3, two processes: losses, parameters and file of one process")
@pytest.mark.parametrize("method", METHODS)
def test_zero3_trains_as_one_process(method: str, trained: Any, refused: Callable[[str], None]) -> None:
    found = trained(method, "zero3")
    if method in READERS:
        assert found["error"].startswith("ConfigError")
        assert "use ZeRO-2 or FSDP2" in found["error"] or "or use DeepSpeed ZeRO-2" in found["error"]
        refused("it reads training data, for which ZeRO-3 does not gather the weights")
        return
    assert_same(found, trained(method, reference(method)))


# Runs -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(place: Path) -> dict[str, Path]:
    return {
        "task": make_task(place / "data"),
        "backbone": make_backbone(place / "bert"),
        "decoder": make_decoder(place / "llama"),
    }


def run_values(files: dict[str, Path], out: Path, method: str, way: str, **changes: Any) -> dict[str, Any]:
    rows = {
        "per_device_train_batch_size": 8 if way == "one" else 4,
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
    }
    values = {**sharded_runs.SGD, **rows, "weight_decay": 0.1, "method": method, **changes}
    return options(files["task"], files["backbone"], out, **values)


def in_processes(server: Any, values: dict[str, Any], way: str, env: dict[str, str] | None = None) -> list[int | None]:
    if way == "one":
        process = server.Process(target=sharded_runs.train_run, args=(values, way, env or {}))
        process.start()
        process.join(300)
        return [process.exitcode]
    return two(server, sharded_runs.train_run, values, way, env or {})


def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.integration(library="accelerate", use="FSDP2: `peft_lab.train`, its folder and metrics")
@pytest.mark.parametrize("method", ["svfit", "lora", "head", "full"])
def test_an_fsdp2_run_leaves_the_folder_of_one_process(method, server, files, tmp_path) -> None:
    check_run("fsdp2", method, server, files, tmp_path)


@pytest.mark.integration(library="accelerate", use="FSDP2: a run that goes on from its checkpoint")
@pytest.mark.parametrize("method", ["svfit", "ssf"])
def test_an_fsdp2_run_goes_on_from_its_checkpoint(method, server, files, tmp_path) -> None:
    check_resume("fsdp2", method, server, files, tmp_path)


@pytest.mark.integration(library="deepspeed", use="ZeRO-2 and 3: `peft_lab.train`, its folder and metrics")
@pytest.mark.parametrize("way", ["zero2", "zero3"])
@pytest.mark.parametrize("method", ["svfit", "head"])
def test_a_zero_run_leaves_the_folder_of_one_process(method, way, server, files, tmp_path) -> None:
    pytest.importorskip("deepspeed")
    check_run(way, method, server, files, tmp_path)


@pytest.mark.integration(library="deepspeed", use="ZeRO-2 and 3: a run that goes on from its checkpoint")
@pytest.mark.parametrize("way", ["zero2", "zero3"])
@pytest.mark.parametrize("method", ["svfit"])
def test_a_zero_run_goes_on_from_its_checkpoint(method, way, server, files, tmp_path) -> None:
    pytest.importorskip("deepspeed")
    check_resume(way, method, server, files, tmp_path)


def check_run(way: str, method: str, server: Any, files: dict[str, Path], out: Path) -> None:
    """Compare the folders of one and of two processes."""
    assert in_processes(server, run_values(files, out / "one", method, "one"), "one") == [0]
    values = run_values(files, out / "two", method, way)
    assert in_processes(server, values, way) == [0, 0]
    one, both = metrics(out / "one"), metrics(out / "two")
    assert both["processes"] == 2
    assert both["parameters"] == one["parameters"]
    for split, scores in one["metrics"].items():
        assert both["metrics"][split] == pytest.approx(scores, abs=TOLERANCE)
    assert same_weights(out / "one", out / "two", tolerance=TOLERANCE)
    assert {path.name for path in (out / "two").iterdir()} == {path.name for path in (out / "one").iterdir()}


def check_resume(way: str, method: str, server: Any, files: dict[str, Path], out: Path) -> None:
    """Train in two processes, and in two that go on from the checkpoint in the middle, with AdamW's state."""
    values = run_values(files, out / "two", method, way, optim="adamw_torch", learning_rate=0.01)
    assert in_processes(server, values, way) == [0, 0]
    kept = weights(out / "two")
    # as a run that was killed behind its first checkpoint leaves them
    for path in (out / "two").iterdir():
        if path.name not in ("run.yaml", "checkpoint-2"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert in_processes(server, values, way) == [0, 0]
    assert metrics(out / "two")["resumed_from"] == "checkpoint-2"
    again = weights(out / "two")
    assert again.keys() == kept.keys()
    assert max((again[name] - kept[name]).abs().max() for name in kept) <= TOLERANCE


@pytest.mark.parametrize(
    ("way", "env", "words"),
    [
        ("ddp", sharded_runs.FSDP2, 'use the accelerate config "cpu"'),
        ("fsdp2", {"FSDP_VERSION": "1"}, "set fsdp_version: 2"),
        ("fsdp2", {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "set it to false"),
        ("alone", {}, "pass --use_cpu"),
    ],
)
def test_what_cannot_be_sharded_is_refused_before_anything_is_written(way, env, words, server, files, tmp_path) -> None:
    values = run_values(files, tmp_path / "out", "ssf", way)
    assert in_processes(server, values, way, env) == [2, 2]
    assert words in (tmp_path / "out.error-0").read_text()
    # Trainer makes the folder before it can be asked how it shards
    assert not [*tmp_path.glob("out/*")]


@pytest.mark.integration(library="deepspeed", use="`peft-lab train --accelerate_config zero2`")
def test_the_command_starts_the_processes_of_a_config(files, server, tmp_path) -> None:
    pytest.importorskip("deepspeed")
    values = run_values(files, tmp_path / "two", "ssf", "zero2", use_cpu=False)
    run = tmp_path / "run.yaml"
    run.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "peft_lab", "train", str(run), "--accelerate_config", "zero2"]
    # DeepSpeed is initialised by gloo, because this machine may have no GPU
    done = subprocess.run(
        [*command, "--num_processes", "2", "--ddp_backend", "gloo"],
        capture_output=True,
        text=True,
        env=environment({"CUDA_VISIBLE_DEVICES": ""}),
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trainable parameters") == 1
    assert in_processes(server, run_values(files, tmp_path / "one", "ssf", "one"), "one") == [0]
    assert metrics(tmp_path / "two")["processes"] == 2
    assert same_weights(tmp_path / "one", tmp_path / "two", tolerance=TOLERANCE)


# Tensor parallelism ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def split(place: Path, files: dict[str, Path], server: Any) -> Path:
    process = server.Process(target=sharded_runs.tensor_parallel, args=(files["decoder"], place / "split", "one"))
    process.start()
    process.join(300)
    assert two(server, sharded_runs.tensor_parallel, files["decoder"], place / "split", "tp") == [0, 0]
    return place / "split"


@pytest.mark.integration(library="transformers", use='`tp_plan="auto"`, two processes: outputs and training of one')
@pytest.mark.parametrize("method", TENSOR_PARALLEL)
def test_tensor_parallelism_answers_and_trains_as_one_process(method: str, split: Path) -> None:
    one = torch.load(split / "one" / method / "found-0.pt", weights_only=True)
    assert "error" not in one, one.get("error")
    assert len(set(one["losses"])) == 3
    for rank in (0, 1):
        found = torch.load(split / "tp" / method / f"found-{rank}.pt", weights_only=True)
        assert "error" not in found, found.get("error")
        assert found["losses"] == pytest.approx(one["losses"], abs=TOLERANCE)
        for name, values in one["trained"].items():
            torch.testing.assert_close(found["trained"][name], values, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(found["logits"], one["logits"], atol=5 * TOLERANCE, rtol=0)
        torch.testing.assert_close(found["reloaded"], found["logits"], atol=TOLERANCE, rtol=0)
        # the same base, whether it is whole or in parts
        assert found["recorded"] == one["recorded"]
        # what cannot be merged at all says so, and the others that the base is sharded
        assert found["merged"] == (one["merged"] or SHARDED_MERGE)
    files = [load_file(split / way / method / "adapter" / "adapter_model.safetensors") for way in ("one", "tp")]
    assert files[0].keys() == files[1].keys()
    assert max((files[0][name] - files[1][name]).abs().max() for name in files[0]) <= TOLERANCE
