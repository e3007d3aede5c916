"""The examples for TRL run offline on a tiny decoder, and what they save loads."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from support.code import missing_names
from support.tiny_runs import make_decoder
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("trl")

EXAMPLES = Path(__file__).parents[2] / "examples"
TEMPLATE = "{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny decoder, a tokenizer with a chat template of its own, and rows."""
    folder = tmp_path_factory.mktemp("trl-examples")
    base = make_decoder(folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "template")
    rows = [{"text": "the rain now", "intent": "song"}, {"text": "a band please", "intent": "soup"}]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows * 8))
    return {"base": base, "template": folder / "template", "rows": folder / "rows.jsonl"}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: Any) -> Any:
    """Run an example as a script, in this process."""

    def run_example(example: str, *arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        common = ["--model_name_or_path", str(place["base"]), "--train_file", str(place["rows"]), "--max_steps", "20"]
        monkeypatch.setattr(sys, "argv", [example, *common, *arguments])
        runpy.run_path(str(EXAMPLES / example), run_name="__main__")
        return capsys.readouterr().out

    return run_example


@pytest.mark.parametrize("example", ["trl_sft.py", "trl_dpo.py"])
def test_it_names_what_exists(example: str) -> None:
    assert missing_names((EXAMPLES / example).read_text()) == []


@pytest.mark.parametrize("method", ["lora", "svfit", "ssf"])
def test_fine_tuning_learns_a_template_of_new_tokens(method: str, run: Any, place: Any, tmp_path: Path) -> None:
    output = run("trl_sft.py", "--method", method, "--chat_template_path", str(place["template"]))
    # 64 tokens are in the table: chance is below 0.02
    assert float(output.rsplit("token accuracy ", 1)[1]) > 0.2
    config = json.loads((tmp_path / "sft-run" / "adapter_config.json").read_text())
    assert config["peft_type"] == method.upper()
    assert len(config["trainable_token_indices"]["embed_tokens"]) >= 2


@pytest.mark.parametrize("method", ["lora", "svfit", "soft_prompt"])
def test_preferences_are_learned(method: str, run: Any, place: Any, tmp_path: Path) -> None:
    output = run("trl_dpo.py", "--method", method)
    assert float(output.rsplit("chosen before rejected ", 1)[1]) > 0.9
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place["base"]), tmp_path / "dpo-run")
