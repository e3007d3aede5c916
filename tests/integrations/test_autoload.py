"""Adapters in programs that do not import peft_lab: each door in a fresh process, and what can go wrong there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from support.properties import METHODS, adapt, move
from support.tiny_runs import environment, make_tokenizer
from tokenizers import processors
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

IDS = [[5, 9, 7, 11], [6, 8, 10, 5]]
#: Door -> code that makes `model`, whose logits are compared, from the adapter's folder and the base's.
DOORS = {
    ("peft", "`AutoPeftModelForCausalLM.from_pretrained(adapter)`"): (
        "from peft import AutoPeftModelForCausalLM; model = AutoPeftModelForCausalLM.from_pretrained(adapter)"
    ),
    ("peft", "`PeftModel.from_pretrained(model, adapter)`"): (
        "from peft import PeftModel; from transformers import AutoModelForCausalLM as Auto; "
        "model = PeftModel.from_pretrained(Auto.from_pretrained(base), adapter)"
    ),
    ("peft", "`PeftConfig.from_pretrained(adapter)`"): (
        "from peft import PeftConfig, PeftModel; config = PeftConfig.from_pretrained(adapter); "
        "from transformers import AutoModelForCausalLM as Auto; "
        "model = PeftModel.from_pretrained(Auto.from_pretrained(base), adapter, config=config)"
    ),
    ("transformers", "`AutoModelForCausalLM.from_pretrained(adapter)`"): (
        "from transformers import AutoModelForCausalLM as Auto; model = Auto.from_pretrained(adapter)"
    ),
    ("transformers", "`pipeline(model=adapter)`"): (
        "from transformers import pipeline; pipe = pipeline('text-generation', model=adapter, device='cpu'); "
        "pipe('the rain', max_new_tokens=2, do_sample=False); model = pipe.model"
    ),
}
LOADS = """
import json, sys
base, adapters = sys.argv[1], json.loads(sys.argv[2])
found = dict()
for name, adapter in adapters.items():
    try:
        {door}
        import torch
        assert "peft_lab" in sys.modules
        with torch.no_grad():
            found[name] = model.eval()(torch.tensor({ids})).logits.flatten().tolist()
    except Exception as error:
        found[name] = f"{{type(error).__name__}}: {{error}}"
print(json.dumps(found))
"""


def run(code: str, *arguments: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment(env), cwd=cwd, timeout=600)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tiny decoder with a tokenizer, an adapter of each method on it, and the logits of each."""
    folder = tmp_path_factory.mktemp("autoload")
    tokenizer = make_tokenizer()
    # of a decoder: none of the tokens that an encoder's puts around a text
    tokenizer.bos_token, tokenizer.eos_token = "[CLS]", "[SEP]"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B")
    torch.manual_seed(0)
    settings = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, pad_token_id=0, **settings)
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    found: dict[str, Any] = {"base": str(folder / "base"), "adapters": {}, "logits": {}}
    for method in METHODS:
        model = move(adapt(method, LlamaForCausalLM.from_pretrained(folder / "base")))
        model.save_pretrained(folder / method)
        found["adapters"][method] = str(folder / method)
        again = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder / "base"), folder / method).eval()
        with torch.no_grad():
            found["logits"][method] = again(torch.tensor(IDS)).logits.flatten()
    return found


@pytest.fixture(scope="module")
def opened(place: dict[str, Any]) -> Any:
    """What a door gives for all methods, in one fresh process for each door."""
    known: dict[str, Any] = {}

    def open_door(door: str) -> Any:
        if door not in known:
            code = LOADS.format(door=door.replace("; ", "\n        "), ids=IDS)
            done = run(code, place["base"], json.dumps(place["adapters"]))
            assert done.returncode == 0, done.stderr
            known[door] = json.loads(done.stdout.splitlines()[-1])
        return known[door]

    return open_door


def _cases() -> list[Any]:
    cases = []
    for (library, use), door in DOORS.items():
        mark = pytest.mark.integration(library=library, use=f"{use} without `import peft_lab`")
        cases += [pytest.param(door, method, marks=mark, id=f"{use}-{method}") for method in METHODS]
    return cases


@pytest.mark.parametrize(("door", "method"), _cases())
def test_an_adapter_loads_without_our_import(door: str, method: str, place: dict[str, Any], opened: Any) -> None:
    found = opened(door)[method]
    assert isinstance(found, list), found
    torch.testing.assert_close(torch.tensor(found), place["logits"][method], atol=1e-5, rtol=0)


@pytest.mark.integration(
    library="transformers", use="`AutoModel.from_pretrained(adapter)` of a bare model without `import peft_lab`"
)
@pytest.mark.parametrize("method", METHODS)
def test_a_bare_model_loads_by_auto_model(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaModel(LlamaConfig(vocab_size=32, **settings)).save_pretrained(tmp_path / "base")
    model = move(adapt(method, LlamaModel.from_pretrained(tmp_path / "base")))
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model.eval()(torch.tensor(IDS)).last_hidden_state.flatten()
    code = (
        "import json, sys, torch; from transformers import AutoModel; model = AutoModel.from_pretrained(sys.argv[1])\n"
        f"with torch.no_grad(): out = model.eval()(torch.tensor({IDS})).last_hidden_state\n"
        "print(json.dumps(out.flatten().tolist()))"
    )
    done = run(code, str(tmp_path / "adapter"))
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout.splitlines()[-1])), expected, atol=1e-5, rtol=0)


TASK = {
    "task": "tiny_cloze",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{text}}",
    "doc_to_choice": ["rain", "song"],
    "doc_to_target": "{{label}}",
    "metric_list": [{"metric": "acc"}],
}
LM_EVAL = """
import json, sys
from lm_eval.__main__ import cli_evaluate
base, adapters, tasks, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], sys.argv[4]
for name, adapter in adapters.items():
    model = f"pretrained={base},peft={adapter},dtype=float32"
    sys.argv = ["lm_eval", "--model", "hf", "--model_args", model, "--tasks", "tiny_cloze", "--include_path", tasks,
        "--device", "cpu", "--batch_size", "1", "--log_samples", "--output_path", f"{out}/{name}"]
    cli_evaluate()
"""


@pytest.fixture(scope="module")
def evaluated(place: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Log-likelihoods of lm_eval's samples for each method, all found by its command in one process."""
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("lm-eval")
    rows = [{"text": "the rain and some", "label": 0}, {"text": "please a band", "label": 1}]
    (folder / "test.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    task = {**TASK, "dataset_kwargs": {"data_files": {"test": str(folder / "test.jsonl")}}}
    (folder / "tiny_cloze.yaml").write_text(yaml.safe_dump(task))
    done = run(LM_EVAL, place["base"], json.dumps(place["adapters"]), str(folder), str(folder / "out"))
    assert done.returncode == 0, done.stderr
    found = {}
    for method in place["adapters"]:
        (file,) = (folder / "out" / method).rglob("samples_*.jsonl")
        samples = [json.loads(line) for line in file.read_text().splitlines()]
        found[method] = [float(pair[0][0]) for sample in samples for pair in sample["resps"]]
    return found


@pytest.mark.integration(library="lm_eval", use="`lm_eval --model hf --model_args pretrained=...,peft=...`")
@pytest.mark.parametrize("method", METHODS)
def test_lm_eval_reads_an_adapter(method: str, place: dict[str, Any], evaluated: dict[str, list[float]]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place["base"])
    base = LlamaForCausalLM.from_pretrained(place["base"])
    model = PeftModel.from_pretrained(base, place["adapters"][method]).eval()
    expected = []
    for text in ("the rain and some", "please a band"):
        for choice in ("rain", "song"):
            ids = torch.tensor([tokenizer(f"{text} {choice}", add_special_tokens=False)["input_ids"]])
            with torch.no_grad():
                logits = model(ids[:, :-1]).logits.log_softmax(-1)
            expected.append(float(logits[0, -1, ids[0, -1]]))
    assert evaluated[method] == pytest.approx(expected, abs=1e-4)


#: Names of the types of adapter that peft knows.
TYPES = "from peft import PeftType; print('SVFIT' in PeftType.__members__)"


@pytest.mark.parametrize("switch", ["PEFT_LAB_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"])
def test_a_switch_leaves_peft_as_it_is(switch: str, tmp_path: Path) -> None:
    done = run(TYPES, cwd=tmp_path, **{switch: "0"})
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


def test_torch_is_imported_beside_a_broken_package(tmp_path: Path) -> None:
    (tmp_path / "peft_lab").mkdir()
    (tmp_path / "peft_lab" / "_register_on_import.py").write_text("")
    (tmp_path / "peft_lab" / "__init__.py").write_text("raise ValueError('broken')")
    done = run(f"import torch; {TYPES}", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
    assert len([line for line in done.stderr.splitlines() if "(ValueError: broken)" in line]) == 1


def test_torch_is_imported_without_peft(tmp_path: Path) -> None:
    code = "import sys; sys.modules['peft'] = None; import torch, transformers; print('peft_lab.tuners' in sys.modules)"
    done = run(code, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
    assert "peft-lab" not in done.stderr


def test_a_target_that_is_gone_is_named_by_torch_and_switched_off_as_the_page_says(tmp_path: Path) -> None:
    # an editable installation whose folder was deleted keeps its entry points
    points = tmp_path / "gone-1.dist-info" / "entry_points.txt"
    points.parent.mkdir()
    points.write_text("[torch.backends]\ngone = gone_autoload:register\n")
    (points.parent / "METADATA").write_text("Metadata-Version: 2.1\nName: gone\nVersion: 1\n")
    done = run("import torch", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "Failed to load the backend extension: gone" in done.stderr
    done = run("import torch", PYTHONPATH=str(tmp_path), TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.returncode == 0, done.stderr
    # the doctor of an installation that is whole names whom torch does not name
    command = [sys.executable, "-m", "peft_lab", "doctor"]
    env = environment({"PYTHONPATH": str(tmp_path), "COLUMNS": "300"})
    doctor = subprocess.run(command, capture_output=True, text=True, env=env)
    assert doctor.returncode == 1
    assert "module gone_autoload is gone" in doctor.stdout
    assert "pip uninstall gone" in doctor.stdout
    assert "Traceback" not in doctor.stdout + doctor.stderr
