"""Typical mistakes: each ends in one sentence that names file, row or key and the mend, and in exit status 2."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from support.tiny_runs import environment, make_backbone, make_image_backbone
from transformers import LlamaConfig, LlamaForCausalLM

from peft_lab import registry
from peft_lab.cli.app import main
from peft_lab.errors import ConfigError
from peft_lab.loading.load_run import adapt

ROWS = "".join(f'"a text, number {number}",{"good" if number % 2 else "bad"}\n' for number in range(24))


@dataclass(frozen=True)
class Mistake:
    """A mistake: files beside the good ones, changes of the task file and of the options, and words of the answer."""

    says: Sequence[str]
    files: dict[str, str | bytes] | None = None
    task: dict[str, Any] | None = None
    options: dict[str, str] | None = None
    command: Sequence[str] = ()
    needs_torch: bool = False


LATIN = f"text,label\n{ROWS}".replace("a text", "café").encode("latin-1")
NUMBERS = "".join(f"a text number {n},{'' if n == 3 else n / 7:.3}\n" if n != 3 else "a text,\n" for n in range(24))

MISTAKES = {
    "a method that is not known": Mistake(['"loar"', 'Did you mean "lora"?'], options={"method": "loar"}),
    "an option that is not known": Mistake(["--learning_rat", "--learning_rate"], options={"learning_rat": "1"}),
    "an argument that the method lacks": Mistake(
        ['"rnk"', 'method "lora"', "`peft-lab methods lora`"], options={"method_args": "rnk=8"}
    ),
    "an output folder that is a file": Mistake(
        ['"out" is a file', "name a folder"], files={"out": "x"}, options={"output_dir": "out"}
    ),
    "a missing backbone": Mistake(['no folder "./missing"', "a Hub id"], options={"model_name_or_path": "./missing"}),
    "a missing adapter": Mistake(['no adapter folder "./missing"'], command=["predict", "./missing", "a text"]),
    "missing data": Mistake(['no file or folder "./missing"'], command=["init", "./missing", "--output=new.yaml"]),
    "a missing task": Mistake(['"other.yaml" does not exist', "peft-lab tasks"], options={"task": "other.yaml"}),
    "a missing data file": Mistake(
        ["train file", "other.csv does not exist"], task={"data": {"builder": "csv", "files": {"train": "other.csv"}}}
    ),
    "a wrong indentation": Mistake(
        ['"task.yaml"', "line 4", "indentation"], files={"task.yaml": "name: a\ndata:\n  builder: csv\n files: {}\n"}
    ),
    "a kind that is not known": Mistake(
        ["task.yaml", '"text_clasification"', 'Did you mean "text_classification"?'],
        task={"kind": "text_clasification"},
    ),
    "a key that is not known": Mistake(["task.yaml", '"metrix"', 'Did you mean "metrics"?'], task={"metrix": ["f1"]}),
    "a metric that does not fit": Mistake(
        ["task.yaml", '"perplexity" does not fit', "accuracy"], task={"metrics": ["perplexity"]}
    ),
    "a task without train": Mistake(
        ["task.yaml", '"train"'], task={"data": {"builder": "csv", "files": {"test": "rows.csv"}}}
    ),
    "a column that is missing": Mistake(
        ['no column "tekst"', 'Did you mean "text"?', "Columns: text, label"],
        task={"columns": {"text": "tekst", "label": "label"}},
        needs_torch=True,
    ),
    "an empty file": Mistake(["rows.csv", "no rows"], files={"rows.csv": ""}, needs_torch=True),
    "an empty file to look at": Mistake(
        ["rows.csv", "is empty"], files={"rows.csv": ""}, command=["init", "rows.csv", "--output=new.yaml"]
    ),
    "a header alone": Mistake(["rows.csv", "no rows"], files={"rows.csv": "text,label\n"}, needs_torch=True),
    "latin-1": Mistake(
        ["rows.csv", "encoding", "line 2", "options: {encoding: latin-1}"], files={"rows.csv": LATIN}, needs_torch=True
    ),
    "a row with too many cells": Mistake(
        ["rows.csv", "row 25", "quotes"], files={"rows.csv": f"text,label\n{ROWS}one, two,good\n"}, needs_torch=True
    ),
    "a blank in a regression": Mistake(
        ['no label in column "label"', "row 4 of 24", "empty_rows: drop"],
        files={"rows.csv": f"text,label\n{NUMBERS}"},
        task={"problem_type": "regression", "metrics": ["pearsonr"]},
        needs_torch=True,
    ),
    "a word in a regression": Mistake(
        ["no finite number", "rows 1, 2", '"bad"'],
        task={"problem_type": "regression", "metrics": ["pearsonr"]},
        needs_torch=True,
    ),
    "a label of the test that train lacks": Mistake(
        ['label "godo" of the test rows', "row 1", 'Did you mean "good"?'],
        files={"test.csv": "text,label\na text,godo\n"},
        task={"data": {"builder": "csv", "files": {"train": "rows.csv", "test": "test.csv"}}},
        needs_torch=True,
    ),
    "a damaged image": Mistake(
        ["pets/dog/3.png", "cannot be read as an image", "empty_rows: drop"],
        files={"pets/dog/3.png": b"\x89PNG but no more"},
        task={
            "kind": "image_classification",
            "data": {"builder": "imagefolder", "files": {"train": "pets"}},
            "columns": {"image": "image", "label": "label"},
        },
        needs_torch=True,
    ),
    "images for a backbone of texts": Mistake(
        ['"bert" reads texts', "AutoModelForImageClassification"],
        task={
            "kind": "image_classification",
            "data": {"builder": "imagefolder", "files": {"train": "pets"}},
            "columns": {"image": "image", "label": "label"},
        },
        needs_torch=True,
    ),
    "texts for a backbone of images": Mistake(
        ['"vit" reads images', "AutoModelForSequenceClassification"],
        options={"model_name_or_path": "vit"},
        needs_torch=True,
    ),
    "a rank above the matrix": Mistake(
        ["r=1000", "above the rank of every adapted matrix", "query: 32 x 32", "at most 32"],
        options={"method_args": "r=1000"},
        needs_torch=True,
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbones")
    make_backbone(folder / "bert")
    make_image_backbone(folder / "vit")
    return folder


@pytest.fixture
def folder(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working directory with a good task, its rows, images and backbones."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bert").symlink_to(place / "bert")
    (tmp_path / "vit").symlink_to(place / "vit")
    (tmp_path / "rows.csv").write_text(f"text,label\n{ROWS}")
    for name, colour in (("cat", "red"), ("dog", "blue")):
        for number in range(4):
            path = tmp_path / "pets" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), colour).save(path)
    return tmp_path


def arguments(mistake: Mistake, folder: Path) -> list[str]:
    """Write the files of a mistake, and return its command line."""
    task = {
        "name": "texts",
        "kind": "text_classification",
        "data": {"builder": "csv", "files": {"train": "rows.csv"}},
        "columns": {"text": "text", "label": "label"},
        "metrics": ["accuracy"],
        "validation_fraction": 0.25,
    }
    (folder / "task.yaml").write_text(yaml.safe_dump(task | (mistake.task or {})))
    for name, content in (mistake.files or {}).items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    if mistake.command:
        return list(mistake.command)
    options = {"task": "task.yaml", "model_name_or_path": "bert", "method": "lora", "output_dir": "new"}
    options |= {"max_steps": "1", "use_cpu": "true", **(mistake.options or {})}
    return ["train", *(f"--{name}={value}" for name, value in options.items())]


@pytest.mark.parametrize("name", MISTAKES)
def test_one_sentence_and_status_2(
    name: str, folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mistake = MISTAKES[name]
    monkeypatch.setattr(sys, "argv", ["peft-lab", *arguments(mistake, folder)])
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        main()
    error = capfd.readouterr().err
    assert stop.value.code == 2
    said = [line for line in error.splitlines() if line.startswith("Error: ")]
    assert len(said) == 1
    assert error.rstrip().endswith(said[0])
    assert "Traceback" not in error
    for words in mistake.says:
        assert words in said[0], said[0]
    # nothing is written that the same command would stumble over once the mistake is mended
    assert sorted(folder.rglob("*")) == before


def test_what_needs_no_torch_comes_before_it(folder: Path) -> None:
    """One process for all of them, because it starts without torch."""
    early = {name: mistake for name, mistake in MISTAKES.items() if not mistake.needs_torch}
    lines = [
        "import os, sys, pathlib",
        "from peft_lab.errors import PeftLabError",
        "from peft_lab.cli.app import app",
        "def run(folder, arguments):",
        "    os.chdir(folder)",
        "    try: app(arguments, standalone_mode=False)",
        "    except PeftLabError: assert 'torch' not in sys.modules, arguments",
        "    else: raise SystemExit(str(arguments))",
    ]
    for number, mistake in enumerate(early.values()):
        own = folder / str(number)
        own.mkdir()
        (own / "rows.csv").write_text(f"text,label\n{ROWS}")
        (own / "bert").symlink_to(folder / "bert")
        lines.append(f"run({str(own)!r}, {arguments(mistake, own)!r})")
    code = "\n".join(lines)
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def tiny(width: int, narrow: int) -> Any:
    """Decoder whose query matrix has `width` rows and columns, and whose key matrix has `narrow` rows."""
    sizes = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2 * narrow // width, "head_dim": width // 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads))


#: Methods whose config has a rank, and its name. The others of peft need arguments of their own.
RANKED = ("lora", "svfit", "adamss", "deft", "delora", "hira", "loha", "lokr", "osf", "tinylora")


@pytest.mark.parametrize("method", RANKED)
def test_no_method_clips_a_rank_in_silence(method: str, caplog: pytest.LogCaptureFixture) -> None:
    info, fields = registry.method(method), registry.config_fields(method)
    name = next(name for name in ("r", "rank", "effective_rank") if name in fields)
    targets = {"target_modules": ["q_proj", "k_proj"]}
    with pytest.raises(ConfigError, match=f"{name}=25 .* at most 24"):
        adapt(tiny(24, 12), info, {name: 25, **targets})
    # a tuner of ours says it by itself, in `get_peft_model` too
    assert bool(caplog.messages) != info.module.startswith("peft.")
    caplog.clear()
    adapt(tiny(24, 12), info, {name: 16, **targets})
    assert any(
        "1 of 2 adapted matrices (model.layers.0.self_attn.k_proj: 12 x 24)" in message for message in caplog.messages
    )
    caplog.clear()
    adapt(tiny(24, 24), info, {name: 24, **targets})
    assert not [message for message in caplog.messages if "adapted matrices" in message]


def test_a_number_of_values_is_no_rank() -> None:
    """VeRA trains a vector of r values beside the matrices."""
    adapted = adapt(tiny(24, 24), registry.method("vera"), {"r": 100, "target_modules": ["q_proj", "k_proj"]})
    assert [parameter.numel() for name, parameter in adapted.named_parameters() if "lambda_d" in name] == [100, 100]
