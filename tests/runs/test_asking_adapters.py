"""Adapters that are asked: `predict` with several labels, `info` without torch, `chat` turn by turn."""

from __future__ import annotations

import io
import json
import sys

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from support.tiny_runs import make_backbone, make_decoder, make_task, make_writing_task, options, without_torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import peft_lab
from peft_lab import registry
from peft_lab.errors import ConfigError
from peft_lab.hub.adapter_info import adapter_info
from peft_lab.loading.load_language_model import LanguageModel, load_language_model
from peft_lab.loading.load_run import load
from peft_lab.serve.chat import Chat
from peft_lab.serve.sampling import Sampling

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def short_answers(folder, more: str = ""):
    """The task of `make_writing_task` with answers of six tokens, so that its prompts fit beside them."""
    path = make_writing_task(folder)
    text = path.read_text().replace("- perplexity", "- perplexity\n- exact_match")
    path.write_text(f"{text}max_new_tokens: 6\n{more}")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("asking")
    task, backbone = make_task(folder / "text"), make_backbone(folder / "bert")
    peft_lab.train(options(task, backbone, folder / "classifier", max_steps=10))
    decoder = make_decoder(folder / "llama")
    peft_lab.train(options(short_answers(folder / "writing"), decoder, folder / "writer", method="soft_prompt"))
    return folder


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command line in this process, with lines for standard input."""

    def run(*arguments: str, lines: str = "") -> tuple[int, str, str]:
        from peft_lab.cli import main

        monkeypatch.setattr(sys, "argv", ["peft-lab", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        capsys.readouterr()
        with pytest.raises(SystemExit) as leaving:
            main()
        output = capsys.readouterr()
        return leaving.value.code or 0, output.out, output.err

    return run


# predict ------------------------------------------------------------------------------------------------------------


def test_the_labels_of_an_answer_are_the_sorted_probabilities(place):
    loaded = load(place / "classifier")
    texts = ["the rain", "a song please", "soup"]
    batch = loaded.processor(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = loaded.model(**batch).logits.softmax(-1)
    plain = peft_lab.predict(place / "classifier", texts)
    for row, (answer, best) in enumerate(
        zip(peft_lab.predict(place / "classifier", texts, top_k=3), plain, strict=True)
    ):
        scores = [entry["score"] for entry in answer["top_k"]]
        assert scores == pytest.approx(wanted[row].sort(descending=True).values.tolist(), abs=1e-5)
        assert [entry["label"] for entry in answer["top_k"]] == [
            loaded.labels[i] for i in wanted[row].argsort().flip(0)
        ]
        assert {key: answer[key] for key in ("label", "score")} == pytest.approx(best)


def test_predict_reads_standard_input_and_writes_a_file(place, command, tmp_path):
    lines = '{"sentence": "the rain", "id": 1}\n{"sentence": "a song", "id": 2}\n'
    code, output, _ = command("predict", place / "classifier", "-", "--output", tmp_path / "out.jsonl", lines=lines)
    assert code == 0
    assert output.startswith("2 answers written to")
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["input"]["sentence"] for line in found] == ["the rain", "a song"]
    _, output, _ = command("predict", place / "classifier", "the rain", "a song")
    assert [json.loads(line)["label"] for line in output.splitlines()] == [line["label"] for line in found]
    code, _, error = command("predict", place / "classifier", "-", "--output", tmp_path / "out.jsonl", lines=lines)
    assert code == 2
    assert "--overwrite" in error


# info ---------------------------------------------------------------------------------------------------------------


def test_info_says_what_the_run_measured_and_counts_what_the_file_holds(place):
    found = adapter_info(place / "classifier")
    metrics = json.loads((place / "classifier" / "metrics.json").read_text())
    saved = load_file(place / "classifier" / "adapter_model.safetensors")
    assert found["parameters"]["saved"] == sum(tensor.numel() for tensor in saved.values())
    assert found["parameters"]["trained"] == metrics["parameters"]["trainable"]
    assert found["size_bytes"] == (place / "classifier" / "adapter_model.safetensors").stat().st_size
    assert found["score"]["value"] == metrics["metrics"]["test"]["accuracy"]
    wanted = {each["predictor"]: each["metrics"]["test"]["accuracy"] for each in metrics["baselines"]}
    assert found["score"]["baselines"] == wanted
    assert found["task"]["kind"] == "text_classification"
    assert found["fingerprint"]["weights"] > 0
    assert found["merges"] == registry.method("lora").can("merge")


def test_the_lines_of_info_load_the_adapter(place):
    for name in ("classifier", "writer"):
        names: dict = {}
        exec("\n".join(adapter_info(place / name)["load"]), names)
        assert any("prompt" in key or "lora" in key for key in names["model"].state_dict()), name


def test_info_tells_of_adapters_of_anybody(place, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(place / "llama")
    get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(tmp_path)
    found = adapter_info(tmp_path)
    assert found["method"]["name"] == "lora"
    assert found["method"]["arguments"]["r"] == 4
    assert found["base_model"]["name"] == str(place / "llama")
    assert (found["score"], found["fingerprint"], found["parameters"]["trained"]) == (None, None, None)
    with pytest.raises(ConfigError, match="no adapter folder"):
        adapter_info(tmp_path / "gone")


def test_info_imports_no_torch_and_prints_one_document(place):
    loaded, times, output = without_torch(["info", str(place / "classifier"), "--json"], place)
    assert loaded == []
    assert times < 7
    assert json.loads(output)["method"]["name"] == "lora"


# chat ---------------------------------------------------------------------------------------------------------------


def test_a_turn_is_answered_as_predict_answers(place, command):
    """A task without a chat template gets each turn through its own template, soft prompts included."""
    code, output, error = command("chat", place / "writer", lines="weather\n/reset\n/rest\nmusic\n/exit\nfood\n")
    assert code == 0
    answers = output.splitlines()
    assert len(answers) == 2
    assert "Unknown command /rest" in error
    assert "/reset" in error
    assert [answer.strip() for answer in answers] == peft_lab.predict(place / "writer", ["weather", "music"])
    assert all(answers)


def with_template(place) -> LanguageModel:
    tokenizer = AutoTokenizer.from_pretrained(place / "llama")
    tokenizer.chat_template = TEMPLATE
    return LanguageModel(AutoModelForCausalLM.from_pretrained(place / "llama").eval(), tokenizer, None)


def test_turns_are_remembered_by_the_chat_template_until_a_reset(place, monkeypatch):
    chat = Chat(with_template(place), system="now", sampling=Sampling(max_new_tokens=2))
    seen: list[list[int]] = []
    generate = chat._generate
    monkeypatch.setattr(chat, "_generate", lambda tokens, write: seen.append(tokens) or generate(tokens, write))
    first = chat.say("rain")
    chat.say("song")
    tokenizer = chat._tokenizer
    turns = [("system", "now"), ("user", "rain"), ("assistant", first), ("user", "song")]
    text = " ".join(f"{role} {content}" for role, content in turns) + " assistant"
    assert seen[1] == tokenizer(text, add_special_tokens=False)["input_ids"]
    chat.reset()
    chat.say("song")
    assert seen[2] == tokenizer("system now user song assistant", add_special_tokens=False)["input_ids"]


def test_a_full_context_loses_its_earliest_turns_with_a_word(place, caplog):
    chat = Chat(with_template(place), sampling=Sampling(max_new_tokens=8))
    for _ in range(12):
        chat.say("rain and song with soup")
    assert "the earliest turn is left out" in caplog.text
    with pytest.raises(ConfigError, match="has 102 tokens, and the model takes 64"):
        chat.say(" ".join(["rain"] * 100))


def test_draws_repeat_by_seed_and_are_streamed_whole(place):
    written: list[list[str]] = []
    answers = []
    for seed in (1, 1, 2):
        pieces: list[str] = []
        chat = Chat(with_template(place), sampling=Sampling(12, temperature=2.0, seed=seed))
        answers.append(chat.say("rain", pieces.append))
        written.append(pieces)
    assert answers[0] == answers[1] != answers[2]
    assert ["".join(pieces).strip() for pieces in written] == answers
    assert len(written[0]) > 3


@pytest.mark.parametrize("config", ["lora", "prompt_tuning"])
def test_adapters_of_anybody_answer_a_chat(place, config, tmp_path):
    of = {
        "lora": LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]),
        "prompt_tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    }
    base = AutoModelForCausalLM.from_pretrained(place / "llama")
    get_peft_model(base, of[config]).save_pretrained(tmp_path)
    pieces: list[str] = []
    answer = Chat(load_language_model(tmp_path), sampling=Sampling(5)).say("rain", pieces.append)
    assert answer
    assert "".join(pieces).strip() == answer


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["classifier"], "a chat needs a causal language model"),
        (["writer", "--system", "be kind"], "needs a chat template"),
        (["writer", "--top_p", "0.5"], 'only with a "temperature"'),
        (["writer", "--temperature", "-1"], "must not be negative"),
        (["writer", "--prompt_value", "x"], "does not choose prompts by a value"),
        (["gone"], "no adapter folder"),
    ],
    ids=" ".join,
)
def test_a_chat_refuses_in_one_sentence(place, command, arguments, words):
    code, output, error = command("chat", str(place / arguments[0]), *arguments[1:], lines="rain\n")
    assert code == 2
    assert output == ""
    assert words in error
    assert "Traceback" not in error


def test_a_bare_classifier_of_transformers_is_refused(place, tmp_path):
    AutoModelForSequenceClassification.from_pretrained(place / "bert").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="needs a causal language model"):
        load_language_model(tmp_path)


def test_prompts_by_value_are_asked_for(place, tmp_path):
    writing = short_answers(tmp_path / "task", "columns: {prompt_ids: topic}\n")
    values = {"method": "metadata_prompt", "max_steps": 2, "do_predict": False}
    peft_lab.train(options(writing, place / "llama", tmp_path / "out", **values))
    model = load_language_model(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"several sets of prompts.*food, music, weather"):
        Chat(model)
    with pytest.raises(ConfigError, match=r'Unknown prompt_value "musik"\. Did you mean "music"'):
        Chat(model, prompt_value="musik")
    answer = Chat(model, prompt_value="music").say("music")
    assert peft_lab.predict(tmp_path / "out", [{"topic": "music"}]) == [answer]
