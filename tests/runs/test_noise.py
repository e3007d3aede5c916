"""What a training says on standard error: nothing of other libraries, and all that is about the user's own input."""

from __future__ import annotations

import fcntl
import importlib.machinery
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import types
from pathlib import Path

import pytest
from support.kind_rows import KINDS, write_task
from support.tiny_runs import command, environment, flags, make_backbone, make_task, options

import peft_lab

#: Lines of peft-lab that a good run may write to standard error: a score beside its baselines, and what is noticed in
#: the user's own rows.
ALLOWED = (
    *(r"The \S+ \S+ of \d.* does not beat ", r"the base without an adapter was scored on \d"),
    r'Task "[\w-]+": \d+ .* rows? ',
)
#: Options that are left to peft-lab, as a user does.
LEFT_TO_US = ("disable_tqdm", "dataloader_pin_memory", "use_cpu")
#: What a developer's shell may set must not hide what users see.
CLEAN = {"PYTHONWARNINGS": "", "TRANSFORMERS_VERBOSITY": "", "TOKENIZERS_PARALLELISM": ""}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("noise")
    return {"folder": folder, "task": make_task(folder / "data"), "backbone": make_backbone(folder / "bert")}


def train(place, out: Path, *words: str, **changes):
    """Train as a process."""
    values = options(place["task"], place["backbone"], out, max_steps=2, **changes)
    for name in LEFT_TO_US:
        values.pop(name)
    return command("train", *flags(values), *words, env=CLEAN)


def foreign(text: str) -> list[str]:
    """Lines of standard error that are not ours."""
    found = [line for line in re.split(r"[\n\r]", text) if line.strip()]
    return [line for line in found if not any(re.match(pattern, line) for pattern in ALLOWED)]


@pytest.mark.full
def test_a_training_says_nothing_but_its_own_and_warns_of_the_users_flag(place, tmp_path):
    done = train(place, tmp_path / "out", "--gradient_checkpointing")
    assert done.returncode == 0, done.stderr
    lines = foreign(done.stderr)
    # the new head, peft's old names, torch and numpy are silent; the deprecated flag is the user's own
    assert len(lines) == 1
    assert lines[0].startswith("Warning: `gradient_checkpointing` is deprecated")
    assert re.search(r"[\d.]+ s of training \([\d.]+ s with loading and evaluation\)", " ".join(done.stdout.split()))


@pytest.mark.full
@pytest.mark.parametrize(
    "changes",
    [
        {"method": "full"},
        {"method": "soft_prompt"},
        {"early_stopping_patience": 2, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1},
        {"bf16": True, "dataloader_num_workers": 1, "preprocessing_num_workers": 2},
        {"load_in_8bit": True},
        {"accelerate_config": "cpu", "num_processes": 2},
    ],
    ids=str,
)
def test_no_option_brings_noise(changes, place, tmp_path):
    if "load_in_8bit" in changes:
        pytest.importorskip("bitsandbytes", reason="quantised loading needs bitsandbytes")
    done = train(place, tmp_path / "out", **changes)
    assert done.returncode == 0, done.stderr
    assert foreign(done.stderr) == []


#: Trains several runs one after another as the command does, because importing torch takes most of the time.
SEVERAL = """
import json, sys
from peft_lab.cli import main
for name, words in json.loads(sys.argv[1]).items():
    sys.stderr.write(f"KIND {name}\\n")
    sys.argv = ["peft-lab", "train", *words]
    try:
        main()
    except SystemExit as leaving:
        if leaving.code:
            raise
"""


@pytest.mark.full
def test_no_kind_brings_noise(tmp_path):
    runs = {}
    for number, (name, kind) in enumerate(KINDS.items()):
        folder = tmp_path / str(number)
        values = options(write_task(folder, name), kind.backbone(folder / "base"), folder / "out", max_steps=2)
        runs[name] = flags({key: values[key] for key in values if key not in LEFT_TO_US})
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL, json.dumps(runs)], capture_output=True, text=True, env=environment(CLEAN)
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("KIND ") == len(KINDS)
    assert [line for line in foreign(done.stderr) if not line.startswith("KIND ")] == []
    # what is about the user's own rows comes through
    assert 'Task "multi_label": 6 train rows have no label' in done.stderr
    assert "rows are longer than the limit" in done.stderr


@pytest.mark.full
def test_quiet_prints_the_result_and_verbose_what_is_done(place, tmp_path):
    quiet = train(place, tmp_path / "quiet", "--quiet")
    assert foreign(quiet.stderr) == []
    assert "train_runtime" not in quiet.stdout
    assert "trainable parameters" in quiet.stdout
    verbose = train(place, tmp_path / "verbose", "--verbose")
    assert "DEBUG peft_lab" in verbose.stderr
    assert "[transformers] ***** Running training *****" in verbose.stderr


@pytest.mark.full
@pytest.mark.parametrize(("flag", "drawn"), [(None, True), ("true", False)])
def test_bars_are_drawn_on_a_terminal_unless_refused(flag, drawn, place, tmp_path):
    values = options(place["task"], place["backbone"], tmp_path / "out", max_steps=2)
    values = {name: value for name, value in values.items() if name != "disable_tqdm"}
    words = flags(values) + ([] if flag is None else ["--disable_tqdm", flag])
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # a bar needs a width
    done = subprocess.Popen(
        [sys.executable, "-m", "peft_lab", "train", *words], stdout=subprocess.PIPE, stderr=theirs, env=environment()
    )
    os.close(theirs)
    seen = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # Linux says so at the end of a terminal
            break
        if not part:
            break
        seen += part
    done.communicate()
    os.close(ours)
    assert done.returncode == 0
    assert (b"2/2" in seen) == drawn


@pytest.mark.full
def test_bars_that_are_asked_for_are_drawn_into_a_pipe(place, tmp_path):
    assert "2/2" in train(place, tmp_path / "out", "--disable_tqdm", "false").stderr


class _Html:
    def __init__(self, text: str) -> None:
        self.text = text


@pytest.fixture
def notebook(monkeypatch):
    """Stand-in for IPython in a notebook's kernel; the value is what it has displayed."""
    shown: list[str] = []
    handle = types.SimpleNamespace(update=lambda html: shown.append(html.text))

    def display(html, display_id=None):
        shown.append(html.text)
        return handle

    ipython = types.ModuleType("IPython")
    ipython.__path__ = []
    ipython.__spec__ = importlib.machinery.ModuleSpec("IPython", None, is_package=True)
    ipython.get_ipython = lambda: types.SimpleNamespace(config={"IPKernelApp": {}})
    ipython.display = types.ModuleType("IPython.display")
    ipython.display.HTML, ipython.display.display = _Html, display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", ipython.display)
    monkeypatch.delitem(sys.modules, "transformers.utils.notebook", raising=False)
    from transformers.utils import is_in_notebook

    is_in_notebook.cache_clear()
    assert is_in_notebook()
    from transformers.utils.notebook import NotebookProgressCallback

    # chosen by transformers when it is imported
    monkeypatch.setattr("transformers.trainer.DEFAULT_PROGRESS_CALLBACK", NotebookProgressCallback)
    yield shown
    is_in_notebook.cache_clear()
    sys.modules.pop("transformers.utils.notebook", None)


@pytest.mark.full
def test_a_notebook_gets_the_table_of_trainer(notebook, place, tmp_path):
    values = options(place["task"], place["backbone"], tmp_path / "out", eval_strategy="steps", eval_steps=2)
    del values["disable_tqdm"]
    values |= {"save_steps": 2, "early_stopping_patience": 3, "logging_steps": 1}
    result = peft_lab.train(values)
    assert not result.trainer.args.disable_tqdm
    (table,) = [page for page in notebook if page.count("<tr") > 3][-1:]
    assert "Validation Loss" in table
    assert "<td>6</td>" in table.replace(" ", "")
    notebook.clear()
    found = peft_lab.evaluate(result.output_dir)
    assert found["accuracy"] == result.metrics["metrics"]["test"]["accuracy"]
    assert notebook  # a bar was drawn
    # the test split is not called another name
    assert not any("Validation Loss" in page for page in notebook)


@pytest.mark.full
def test_a_quiet_notebook_gets_none(notebook, place, tmp_path, monkeypatch):
    monkeypatch.setenv("PEFT_LAB_VERBOSITY", "quiet")
    values = options(place["task"], place["backbone"], tmp_path / "out", max_steps=2)
    del values["disable_tqdm"]
    peft_lab.train(values)
    assert notebook == []
