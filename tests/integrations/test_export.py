"""Graphs of trained models by torch.export and ONNX Runtime: any rows and tokens, the outputs of the model."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from support.method_runs import TRAINABLE, options_for
from support.properties import UNTRAINED
from support.tiny_runs import environment, make_decoder, make_writing_task, options
from typer.testing import CliRunner

from peft_lab import registry, to_lora
from peft_lab.cli.app import app
from peft_lab.errors import ConfigError
from peft_lab.export import graph
from peft_lab.export.graph import to_onnx, to_torch_export
from peft_lab.loading.load_run import load
from peft_lab.training.run import train

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

FORMATS = {"torch-export": to_torch_export, "onnx": to_onnx}
EACH_FORMAT = pytest.mark.parametrize("form", FORMATS)
#: Numbers that decide the shapes inside depend on the values of each call.
BY_VALUES = (*UNTRAINED,)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def runs(place):
    """A short run of each method, made when it is asked for."""

    def run(method: str, writes: bool = False) -> Path:
        folder = place / f"{method}-{'decoder' if writes else 'classifier'}"
        values = {"max_steps": 2, "save_strategy": "no", "do_eval": False, "do_predict": False}
        if not folder.is_dir() and writes:
            task, base = make_writing_task(place / "texts"), make_decoder(place / "llama")
            train(options(task, base, folder, method=method, **values))
        elif not folder.is_dir():
            train(options_for(method, place, folder, **values))
        return folder

    return run


def check(folder: Path, form: str, out: Path) -> graph.Exported:
    done = FORMATS[form](folder, out)
    assert done.difference < 1e-5
    record = json.loads((out / "export.json").read_text())
    assert record["largest_difference"] == done.difference
    assert {axis for sizes in done.inputs.values() for axis in sizes if isinstance(axis, str)} <= {"batch", "tokens"}
    assert all(sizes[0] == "batch" for sizes in done.inputs.values())
    return done


@pytest.mark.integration(library="torch", use="`torch.export` of a classifier, any batch and length")
@pytest.mark.parametrize("method", TRAINABLE)
def test_torch_export_of_a_classifier(method, runs, tmp_path, refused):
    if method in BY_VALUES:
        with pytest.raises(ConfigError, match="cannot be exported, because it looks at its values in each call"):
            to_torch_export(runs(method), tmp_path / "out")
        assert not (tmp_path / "out").exists()
        refused("looks at its values in each call")
        return
    done = check(runs(method), "torch-export", tmp_path / "out")
    assert done.merged == (method in ("full", "head") or registry.method(method).can("merge"))


@pytest.mark.integration(library="onnxruntime", use="ONNX graph of a classifier, any batch and length")
@pytest.mark.parametrize("method", [name for name in TRAINABLE if name not in BY_VALUES])
def test_onnx_of_a_classifier(method, runs, tmp_path):
    check(runs(method), "onnx", tmp_path / "out")


@pytest.mark.integration(library="onnxruntime", use="ONNX graph of a decoder, without a cache")
@pytest.mark.parametrize("method", ["lora", "svfit", "ssf", "iapt", "soft_prompt"])
def test_onnx_of_a_decoder(method, runs, tmp_path):
    check(runs(method, writes=True), "onnx", tmp_path / "out")


@EACH_FORMAT
def test_graphs_load_without_peft_lab_and_answer_the_same(form, runs, tmp_path):
    folder = runs("svfit")
    FORMATS[form](folder, tmp_path / "out")
    code = """
        import sys, torch
        ids = torch.tensor([[2, 4, 14, 3], [2, 17, 3, 0]])
        inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
        if sys.argv[2] == "onnx":
            import onnxruntime
            session = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx")
            found = torch.from_numpy(session.run(None, {k: v.numpy() for k, v in inputs.items()})[0])
        else:
            found = torch.export.load(sys.argv[1] + "/model.pt2").module()(**inputs)
        assert not {"transformers", "peft_lab"} & set(sys.modules)
        torch.save(found, sys.argv[1] + "/logits.pt")
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "out"), form]
    # else torch itself would load peft_lab, as its plug-in
    where = environment({"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})
    done = subprocess.run(command, capture_output=True, text=True, env=where, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    ids = torch.tensor([[2, 4, 14, 3], [2, 17, 3, 0]])
    with torch.no_grad():
        expected = load(folder).model(input_ids=ids, attention_mask=(ids != 0).long()).logits
    assert torch.allclose(torch.load(tmp_path / "out" / "logits.pt"), expected, atol=1e-5)


@EACH_FORMAT
def test_a_graph_that_differs_is_refused_and_removed(form, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(graph, "TOLERANCE", 0.0 if form == "onnx" else -1.0)
    with pytest.raises(ConfigError, match=r"gives other outputs than the model: they differ by .*nothing was written"):
        FORMATS[form](runs("lora"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(runs, tmp_path, monkeypatch):
    run = CliRunner()
    folder = str(runs("lora"))
    done = run.invoke(app, ["export", folder, str(tmp_path / "out"), "--onnx"])
    assert done.exit_code == 0, done.output
    assert "model.onnx, merged: input_ids (batch, tokens), attention_mask (batch, tokens) -> logits" in " ".join(
        done.output.split()
    )
    for options_given in ([], ["--onnx", "--torch-export"]):
        wrong = run.invoke(app, ["export", folder, str(tmp_path / "other"), *options_given])
        assert isinstance(wrong.exception, ConfigError)
    monkeypatch.setattr(graph.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs onnx, onnxscript, onnxruntime; `pip install 'peft-lab\[onnx\]'`"):
        to_onnx(folder, tmp_path / "other")


def test_a_decoder_converted_to_lora_names_the_rank_of_vllm(runs, tmp_path):
    done = to_lora(runs("svfit", writes=True), tmp_path / "out")
    rank = max(done.ranks.values())
    assert f"--max-lora-rank {next(c for c in (1, 8, 16, 32, 64) if c >= rank)}" in done.vllm
    shown = CliRunner().invoke(app, ["to-lora", str(runs("svfit", writes=True)), str(tmp_path / "again")])
    assert done.vllm in shown.output
