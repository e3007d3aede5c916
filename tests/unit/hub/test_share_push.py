"""Push to the Hub, which a local stand-in plays: what arrives there, what never does, and that it loads again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants, parse_eval_result_entries
from support.hub_stand_in import TOKEN, Hub, Repository
from support.tiny_runs import (
    command,
    environment,
    flags,
    make_backbone,
    make_image_backbone,
    make_image_task,
    make_task,
    options,
)

from peft_lab import push
from peft_lab.cli import main
from peft_lab.errors import ConfigError
from peft_lab.hub.public_copy import find_base, refuse_private, stage
from peft_lab.training.run import train

EXPECTED = {
    *("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    *("labels.json", "metrics.json", "run.yaml", "task.yaml", "README.md"),
}


@pytest.fixture(scope="module")
def hub():
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def place(tmp_path_factory, hub):
    """A run whose base is on the stand-in, as a user has it: trained on a Hub id, in a process of its own."""
    folder = tmp_path_factory.mktemp("share")
    task, backbone = make_task(folder / "data"), make_backbone(folder / "bert")
    hub.publish("org/base", backbone)
    run = options(task, "org/base", folder / "runs" / "topics", method="svfit", max_steps=20, save_steps=10)
    env = hub.environment(folder / "home")
    done = command("train", *flags(run | {"push_to_hub": True, "hub_model_id": "someone/trainer"}), env=env)
    assert done.returncode == 0, done.stderr
    return {"folder": folder, "run": folder / "runs" / "topics", "env": env, "backbone": backbone, "task": task}


def python(code: str, *arguments: object, env: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(env),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def at_hub(hub):
    """Point this process at the stand-in; a command is then run without starting another one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setenv("NO_PROXY", "127.0.0.1")

        def run(*arguments: str) -> int:
            patch.setattr(sys, "argv", ["peft-lab", *arguments])
            try:
                main()
            except SystemExit as leaving:
                return int(leaving.code or 0)
            return 0

        yield run


@pytest.fixture(scope="module")
def pushed(place, hub, at_hub) -> Repository:
    assert at_hub("push", str(place["run"]), "someone/pushed", "--token", TOKEN) == 0
    return hub.repositories["someone/pushed"]


def test_a_push_holds_what_is_promised_and_is_private(pushed):
    assert set(pushed.files) == EXPECTED
    assert pushed.private
    assert pushed.messages == ["Upload adapter with peft-lab"]


def test_no_path_no_token_and_no_pickle_is_uploaded(pushed, place, hub):
    repositories = [pushed, hub.repositories["someone/trainer"]]
    for repository in repositories:
        for name, content in repository.files.items():
            for private in (place["folder"], Path.home(), TOKEN):
                assert str(private).encode() not in content, (name, private)
            assert not name.endswith((".bin", ".pt", ".pth", ".pkl"))
            assert "checkpoint" not in name
    assert list(place["run"].glob("checkpoint-*"))  # there was something to leave behind
    assert (place["run"] / "items.csv").is_file()


def test_trainer_and_command_give_the_same_repository(pushed, hub):
    trainer = hub.repositories["someone/trainer"]
    assert trainer.private
    assert trainer.messages == pushed.messages
    renamed = {name: content.replace(b"trainer", b"pushed") for name, content in trainer.files.items()}
    plain = {name: content.replace(b"trainer", b"pushed") for name, content in pushed.files.items()}
    assert renamed == plain


def test_the_config_names_the_base_and_its_commit(pushed, hub):
    config = json.loads(pushed.files["adapter_config.json"])
    assert config["base_model_name_or_path"] == "org/base"
    card = ModelCard(pushed.files["README.md"].decode())
    assert card.data.base_model == "org/base"
    assert "base_model:adapter:org/base" in card.data.tags
    assert card.data.library_name == "peft"
    assert len(config["revision"]) == 40
    assert config["revision"] in card.text
    run = yaml.safe_load(pushed.files["run.yaml"])
    assert (run["model_name_or_path"], run["task"], run["output_dir"]) == ("org/base", "task.yaml", "pushed")


@pytest.mark.full
def test_it_loads_from_the_hub_in_every_way(pushed, place, tmp_path):
    env = place["env"] | {"HF_HOME": str(tmp_path / "hf"), "HOME": str(tmp_path)}
    lines = pushed.files["README.md"].decode().split("```python\n")[1].split("```")[0]
    assert len(lines.strip().splitlines()) <= 3
    printed = python(
        f"""
        import json, sys, torch
        {textwrap.indent(lines, " " * 8).strip()}
        import peft_lab
        from peft import PeftModel
        from transformers import AutoModelForSequenceClassification
        from peft_lab.training.evaluate import evaluate
        from peft_lab.loading.load_run import load
        inputs = {{"input_ids": torch.tensor([[2, 4, 14, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}}
        base = AutoModelForSequenceClassification.from_pretrained("org/base", num_labels=3)
        found = [model, PeftModel.from_pretrained(base, "someone/pushed"), load("someone/pushed").model]
        found.append(load(sys.argv[1]).model)
        logits = [m.eval()(**inputs).logits for m in found]
        score = evaluate("someone/pushed", sys.argv[2])["accuracy"]
        print(json.dumps([[bool(torch.equal(l, logits[0])) for l in logits], score]))
        from peft_lab.cli import main
        from peft_lab.training.evaluate import predict
        print(*map(json.dumps, predict(sys.argv[1], ["the rain", "a song"])), sep="\\n")
        sys.argv = ["peft-lab", "predict", "someone/pushed", "the rain", "a song"]
        main()
        """,
        place["run"],
        place["task"],
        env=env,
    )
    found, *answers = printed.strip().splitlines()[-5:]
    same, score = json.loads(found)
    assert same == [True] * 4
    metrics = json.loads((place["run"] / "metrics.json").read_text())
    assert score == metrics["metrics"]["test"]["accuracy"]
    answers = [json.loads(line) for line in answers]
    assert [answer.pop("input") for answer in answers[2:]] == ["the rain", "a song"]
    assert answers[:2] == answers[2:]
    assert {answer["label"] for answer in answers} <= {"food", "music", "weather"}


@pytest.mark.full
@pytest.mark.parametrize("method", ["vpt", "prompt_cam"])
def test_prompts_of_images_come_back_from_the_hub(method, hub, at_hub, tmp_path):
    backbone, task = make_image_backbone(tmp_path / "vit"), make_image_task(tmp_path / "data")
    hub.publish("org/vit", backbone)
    run = train(options(task, backbone, tmp_path / "out", method=method, max_steps=10))
    name = f"someone/{method}"
    assert at_hub("push", str(run.output_dir), name, "--base_model", "org/vit", "--token", TOKEN) == 0
    assert {"adapter_model.safetensors", "preprocessor_config.json"} <= set(hub.repositories[name].files)
    image = tmp_path / "data" / "test.png"
    printed = python(
        """
        import json, sys
        from peft_lab.training.evaluate import predict
        for folder in sys.argv[1:3]:
            print(json.dumps(predict(folder, [sys.argv[3]])))
        """,
        *(name, run.output_dir, image),
        env=hub.environment(tmp_path / "home"),
    )
    there, here = printed.strip().splitlines()[-2:]
    assert there == here


def test_a_branch_and_a_public_repository(place, hub, at_hub, capsys):
    options = ("--public", "--revision", "second", "--commit_message", "A try", "--token", TOKEN)
    assert at_hub("push", str(place["run"]), "someone/open", *options) == 0
    repository = hub.repositories["someone/open"]
    assert not repository.private
    assert repository.messages == ["A try"]
    assert repository.files == {}
    assert set(repository.branches["second"]) == EXPECTED
    assert at_hub("push", str(place["run"]), "someone/open", "--token", TOKEN) == 2
    assert "is public; pass --public" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "answer"), [(401, "hf auth login"), (403, "write permission"), (404, "no such user"), (402, "(402)")]
)
def test_what_the_hub_refuses_is_one_sentence(status, answer, place, hub, at_hub, capsys):
    before, hub.status = hub.written, status
    try:
        assert at_hub("push", str(place["run"]), f"someone/refused{status}", "--token", TOKEN) == 2
    finally:
        hub.status = None
    said = capsys.readouterr().err
    assert answer in said
    assert len(said.strip().splitlines()) == 1
    assert hub.written == before
    assert f"someone/refused{status}" not in hub.repositories


def test_without_a_token_or_a_hub_it_is_one_sentence(place, hub, at_hub, capsys, monkeypatch):
    before = hub.written
    for name, value, answer in (
        ("HF_HUB_OFFLINE", True, "HF_HUB_OFFLINE"),
        ("HF_HUB_OFFLINE", False, "hf auth login"),  # and no token
        ("ENDPOINT", "http://127.0.0.1:9", "cannot be reached"),
    ):
        monkeypatch.setattr(constants, name, value)
        assert at_hub("push", str(place["run"]), "someone/none", "--token", "hf_wrong") == 2
        said = capsys.readouterr().err
        assert answer in said
        assert len(said.strip().splitlines()) == 1
    assert hub.written == before
    assert "someone/none" not in hub.repositories


def test_a_training_whose_push_would_be_refused_does_not_start(place, tmp_path, at_hub, capsys):
    values = options(place["task"], place["backbone"], tmp_path / "out", push_to_hub=True, hub_token="hf_wrong")
    assert at_hub("train", *flags(values)) == 2
    assert "hf auth login" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["noslash", "a/b/c", "some one/x", "-a/b", "a/b.git"])
def test_a_wrong_repository_name_is_refused_before_anything(name, tmp_path):
    with pytest.raises(ConfigError, match="Repository"):
        push(tmp_path, name)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    (tmp_path / "topics").mkdir()
    with pytest.raises(ConfigError, match=r'no adapter folder .*Did you mean "topics"'):
        push(tmp_path / "topcs", "a/b")
    with pytest.raises(ConfigError, match="is not an adapter folder"):
        push(tmp_path / "topics", "a/b")


def test_only_the_finished_run_is_pushed(place, tmp_path):
    values = options(place["task"], place["backbone"], tmp_path / "out", hub_strategy="checkpoint")
    with pytest.raises(ConfigError, match="would upload checkpoints"):
        train(values)


# What needs no Hub ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def local(place, tmp_path_factory):
    """A run on a folder of this machine."""
    out = tmp_path_factory.mktemp("local") / "out"
    return train(options(place["task"], place["backbone"], out, method="ssf", max_steps=2, do_predict=False)).output_dir


def staged(folder: Path, out: Path, **kwargs: object) -> Path:
    out.mkdir()
    stage(folder, "someone/name", out, **kwargs)
    return out


def test_a_base_of_this_machine_is_refused_until_it_is_named(local, tmp_path, place):
    with pytest.raises(ConfigError, match="--base_model USER/NAME"):
        staged(local, tmp_path / "a")
    for wrong in (str(place["backbone"]), "a b/c"):
        with pytest.raises(ConfigError, match="base_model"):
            staged(local, tmp_path / wrong[-1], base_model=wrong)
    out = staged(local, tmp_path / "b", base_model="org/base")
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"
    everything = b"".join(path.read_bytes() for path in out.iterdir())
    assert str(place["folder"]).encode() not in everything
    assert str(local.parent).encode() not in everything


def test_the_folder_itself_stays_as_it_was(local, tmp_path, place):
    before = {path.name: path.read_bytes() for path in local.iterdir() if path.is_file()}
    staged(local, tmp_path / "out", base_model="org/base")
    assert {path.name: path.read_bytes() for path in local.iterdir() if path.is_file()} == before
    assert json.loads(before["adapter_config.json"])["base_model_name_or_path"] == str(place["backbone"])


def test_short_names_become_hub_ids_where_the_weights_are_the_same(local):
    run = {"model_name_or_path": "minilm"}
    assert find_base(local, {"run": run}).name == "sentence-transformers/all-MiniLM-L6-v2"
    base = find_base(local, {"run": {"model_name_or_path": "smollm2-135m"}})
    assert (base.name, base.on_hub) == ("smollm2-135m", False)


def test_a_short_name_stays_in_the_options_of_the_run(local, tmp_path):
    metrics = json.loads((local / "metrics.json").read_text())
    copy = tmp_path / "copy"
    shutil.copytree(local, copy, ignore=shutil.ignore_patterns("checkpoint-*"))
    metrics["run"] |= {"model_name_or_path": "minilm", "deepspeed": "/data/cluster/ds.json"}
    (copy / "metrics.json").write_text(json.dumps(metrics))
    out = staged(copy, tmp_path / "out")
    run = yaml.safe_load((out / "run.yaml").read_text())
    assert (run["model_name_or_path"], run["deepspeed"]) == ("minilm", "ds.json")
    assert not [path.name for path in out.iterdir() if b"/data/cluster" in path.read_bytes()]
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "sentence-transformers/all-MiniLM-L6-v2"


def test_results_on_data_of_the_hub_are_evaluation_results(local, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(local, copy, ignore=shutil.ignore_patterns("checkpoint-*", "task.yaml"))
    metrics = json.loads((copy / "metrics.json").read_text())
    metrics["run"] |= {"task": "glue-rte", "model_name_or_path": "org/base"}
    metrics["metrics"]["test"] = {"loss": 1.0, "accuracy": 0.625}
    (copy / "metrics.json").write_text(json.dumps(metrics))
    out = staged(copy, tmp_path / "out")
    (entry,) = parse_eval_result_entries(yaml.safe_load((out / ".eval_results" / "glue-rte.yaml").read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("nyu-mll/glue", "rte", 0.625)
    assert "seed 42" in entry.notes
    assert not (out / "task.yaml").exists()
    assert yaml.safe_load((out / "run.yaml").read_text())["task"] == "glue-rte"


def test_an_adapter_of_peft_alone_gets_a_card_of_what_is_known(tmp_path):
    import peft

    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0"]))
    model.peft_config["default"].base_model_name_or_path = "org/base"
    model.save_pretrained(tmp_path / "plain")
    out = staged(tmp_path / "plain", tmp_path / "out")
    assert {path.name for path in out.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    card = ModelCard.load(out / "README.md")
    assert card.data.base_model == "org/base"
    assert "More Information Needed" not in card.text
    assert 'AutoPeftModel.from_pretrained("someone/name")' in card.text


def test_a_file_that_still_names_a_path_stops_the_push(local, tmp_path):
    (local / "labels.json").write_text(json.dumps({"id2label": {"0": str(local.resolve().parent / "x")}}))
    with pytest.raises(ConfigError, match=r"labels\.json would give away"):
        staged(local, tmp_path / "out", base_model="org/base")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.json").write_text("a secret token")
    with pytest.raises(ConfigError, match=r"a\.json"):
        refuse_private(tmp_path / "one", ["secret token"])
