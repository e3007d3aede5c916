"""What a downloaded folder says about other files: its base, its task, its metric and its labels."""

from __future__ import annotations

import json

import pytest

from peft_lab.data.task_registry import data_files
from peft_lab.errors import PeftLabError
from peft_lab.loading.adapter_folder import AdapterFolder
from peft_lab.runs import own_tasks
from peft_lab.runs.run_folder import is_download, read_labels
from peft_lab.runs.trained_task import trained_task


@pytest.fixture
def snapshot(tmp_path):
    """A folder as a download from the Hub leaves it."""
    folder = tmp_path / "models--a--b" / "snapshots" / "0123"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("name", ["/etc", "../x", "~/model", "./x", "a/../b", "C:\\model", "file:///x", "", 7])
def test_download_names_no_base_of_this_machine(snapshot, name):
    (snapshot / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": name}))
    assert is_download(snapshot)
    with pytest.raises(PeftLabError, match="model_name_or_path"):
        AdapterFolder(snapshot, is_download=True).base_name()


def test_download_names_a_base_on_the_hub(snapshot, monkeypatch, tmp_path):
    for name in ("google/vit-base-patch16-224", "gpt2"):
        (snapshot / "metrics.json").write_text(json.dumps({"run": {"model_name_or_path": name}}))
        assert AdapterFolder(snapshot, is_download=True).base_name() == name
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()  # a name on the Hub must not turn into a folder that lies here
    with pytest.raises(PeftLabError, match="model_name_or_path"):
        AdapterFolder(snapshot, is_download=True).base_name()


TASK = """
name: mine
kind: text_classification
data: {builder: csv, files: {train: "FILE"}}
columns: {text: text, label: label}
labels: [a, b]
"""


@pytest.mark.parametrize("file", ["/etc/passwd", "../../secret.csv", "${PEFT_LAB_DATA}/x.csv"])
def test_task_of_a_folder_reads_no_data_outside(snapshot, file, monkeypatch, tmp_path):
    monkeypatch.setenv("PEFT_LAB_DATA", str(tmp_path))
    (snapshot / "task.yaml").write_text(TASK.replace("FILE", file))
    task = trained_task(snapshot, {"task": "elsewhere.yaml"}, download=True)
    assert task.labels == ("a", "b")
    with pytest.raises(PeftLabError, match="lies outside of it"):
        data_files(task, "train")


def test_task_file_is_followed_only_if_its_user_trained_on_it_and_it_is_the_same(snapshot, tmp_path, monkeypatch):
    monkeypatch.setenv("PEFT_LAB_CACHE", str(tmp_path / "cache"))
    own = tmp_path / "mine.yaml"
    own.write_text(TASK.replace("FILE", "train.csv"))
    (tmp_path / "train.csv").write_text("text,label\n")
    (snapshot / "task.yaml").write_text(own.read_text())
    run = {"task": str(own)}
    assert trained_task(snapshot, run).folder == snapshot  # nobody has trained on it here
    own_tasks.remember(own)
    assert trained_task(snapshot, run).folder == tmp_path
    assert trained_task(snapshot, run, download=True).folder == snapshot
    # metrics.json names the file alone, and where it was noted here
    noted = {"task": "mine.yaml", "task_file": own_tasks.digest(own)}
    assert trained_task(snapshot, noted).folder == tmp_path
    assert trained_task(snapshot, noted, download=True).folder == snapshot
    (snapshot / "elsewhere").write_text(str(own))
    assert trained_task(snapshot, {**noted, "task_file": str(snapshot / "elsewhere")}).folder == snapshot
    (snapshot / "task.yaml").write_text(own.read_text() + "title: another\n")
    assert trained_task(snapshot, run).folder == snapshot
    assert trained_task(snapshot, noted).folder == snapshot


def test_metric_of_a_folder_is_not_run(snapshot):
    (snapshot / "metric.py").write_text("raise SystemExit")
    (snapshot / "task.yaml").write_text(TASK.replace("FILE", "train.csv") + "metrics: [metric.py]\n")
    with pytest.raises(PeftLabError, match="metric to run"):
        trained_task(snapshot, {})


@pytest.mark.parametrize("text", ['{"id2label": {"0": "a", "2": "b"}}', '{"id2label": [1]}', '{"id2label": 7}', "["])
def test_bad_label_map_is_refused(tmp_path, text):
    (tmp_path / "labels.json").write_text(text)
    with pytest.raises(PeftLabError):
        read_labels(tmp_path)
