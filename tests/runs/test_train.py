"""One run: what it writes, that it repeats itself, that a killed one continues to the same weights."""

from __future__ import annotations

import importlib.metadata
import json
import math
import multiprocessing
import shutil
import signal

import pytest
import torch
from support.tiny_runs import make_backbone, make_task, options, same_weights, train_and_die, weights

import peft_lab
from peft_lab import registry
from peft_lab.adapter_files.names import write_json
from peft_lab.errors import ConfigError, PeftLabError, TaskError
from peft_lab.export.merge import merge
from peft_lab.loading.load_run import load
from peft_lab.training.evaluate import evaluate, predict
from peft_lab.training.run import train

X = {"input_ids": torch.tensor([[2, 4, 14, 3], [2, 17, 5, 3]]), "attention_mask": torch.ones(2, 4, dtype=torch.long)}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    return {
        "task": make_task(folder / "data"),
        "backbone": make_backbone(folder / "bert"),
        "dropout": make_backbone(folder / "dropout", dropout=0.2),
    }


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    """One finished LoRA run, which several tests only look at."""
    out = tmp_path_factory.mktemp("finished") / "out"
    return train(options(place["task"], place["backbone"], out, max_steps=40, hub_token="secret-token"))


def test_the_output_folder_holds_all_that_is_promised(finished):
    folder, metrics = finished.output_dir, json.loads((finished.output_dir / "metrics.json").read_text())
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "metrics.json", "run.yaml", "README.md"} <= names
    assert {"labels.json", "tokenizer.json", "tokenizer_config.json", "task.yaml"} <= names
    assert not {name for name in names if name.endswith((".bin", ".pt", ".pkl"))}
    assert json.loads((folder / "labels.json").read_text())["label2id"] == {"food": 0, "music": 1, "weather": 2}
    trained = [p for p in finished.model.parameters() if p.requires_grad]
    assert metrics["parameters"]["trainable"] == sum(p.numel() for p in trained)
    assert metrics["adapter_bytes"] == (folder / "adapter_model.safetensors").stat().st_size
    assert metrics["learning_rate"] == 1e-2
    assert metrics["seed"] == 42
    assert metrics["global_step"] == 40
    assert metrics["data"]["rows"] == {"train": 96, "validation": 24, "test": 24}
    assert metrics["versions"]["torch"] == importlib.metadata.version("torch")
    assert 2**20 < metrics["memory_before_training_bytes"] <= metrics["peak_memory_bytes"]
    assert 0 < metrics["train_seconds"] < metrics["wall_seconds"]
    assert metrics["metrics"]["validation"]["accuracy"] > 0.6  # chance is 0.33
    assert set(metrics["metrics"]["test"]) == {"loss", "accuracy"}
    assert metrics["method_config"]["peft_type"] == "LORA"
    assert json.loads((folder / "metrics.json").read_text())["method_config"] == metrics["method_config"]
    assert all("secret-token" not in path.read_text() for path in folder.glob("*.[jmy]*"))


@pytest.mark.full
def test_a_run_file_that_was_written_repeats_the_run_bit_for_bit(finished, tmp_path):
    again = train(finished.output_dir / "run.yaml", output_dir=str(tmp_path / "again"))
    assert same_weights(finished.output_dir, tmp_path / "again")
    assert again.metrics["metrics"] == finished.metrics["metrics"]
    assert again.metrics["data"]["fingerprint"] == finished.metrics["data"]["fingerprint"]


@pytest.mark.full
def test_another_seed_gives_other_weights_on_the_same_data(finished, tmp_path):
    other = train(finished.output_dir / "run.yaml", output_dir=str(tmp_path / "other"), seed=1)
    assert not same_weights(finished.output_dir, tmp_path / "other", tolerance=1e-4)
    assert other.metrics["data"]["fingerprints"] == finished.metrics["data"]["fingerprints"]


def test_train_says_what_is_missing(place):
    with pytest.raises(ConfigError, match="Missing in"):
        peft_lab.train(task=str(place["task"]))


def test_evaluate_and_predict_give_what_training_measured(finished):
    assert evaluate(finished.output_dir)["accuracy"] == finished.metrics["metrics"]["test"]["accuracy"]
    with pytest.raises(ConfigError, match=r'Unknown split "tset".* Did you mean "test"'):
        evaluate(finished.output_dir, split="tset")
    found = evaluate(finished.output_dir, split="validation")
    assert found["loss"] == pytest.approx(finished.metrics["metrics"]["validation"]["loss"], abs=1e-5)
    answers = predict(finished.output_dir, ["the rain", "a song"])
    assert [set(answer) for answer in answers] == [{"label", "score"}] * 2


def test_predict_refuses_what_training_refuses(finished, tmp_path):
    """A row is named by its number; a file that is none of inputs is not taken for a text."""
    (tmp_path / "rows.csv").write_text("sentence\nthe rain\n\na song\n")
    with pytest.raises(TaskError, match=r"1 inputs have an empty text \(row 2\)"):
        predict(finished.output_dir, str(tmp_path / "rows.csv"))
    (tmp_path / "rows.csv").write_text("sentence,topic\nthe rain, weather, sun\n")
    with pytest.raises(TaskError, match=r"1 of 1 rows do not have the 2 cells of the header"):
        predict(finished.output_dir, tmp_path / "rows.csv")
    (tmp_path / "rows.xlsx").write_text("the rain")
    with pytest.raises(ConfigError, match=r"rows.xlsx\" is a file, and not one of inputs"):
        predict(finished.output_dir, ["a song", str(tmp_path / "rows.xlsx")])


def test_a_merged_model_answers_as_the_adapter_does(finished, tmp_path):
    from transformers import AutoModelForSequenceClassification

    merged = AutoModelForSequenceClassification.from_pretrained(merge(finished.output_dir, tmp_path / "merged"))
    with torch.no_grad():
        difference = merged.eval()(**X).logits - finished.model.eval()(**X).logits
    assert difference.abs().max() < 1e-5
    assert merged.config.id2label == {0: "food", 1: "music", 2: "weather"}


def test_an_adapter_on_another_base_is_refused_in_one_sentence(finished, place, tmp_path):
    from transformers import BertConfig, BertModel

    wide = tmp_path / "wide"
    BertModel(BertConfig(vocab_size=30, hidden_size=64, num_hidden_layers=2, num_attention_heads=2)).save_pretrained(
        wide
    )
    for path in place["backbone"].glob("tokenizer*"):
        (wide / path.name).write_bytes(path.read_bytes())
    with pytest.raises(PeftLabError) as error:
        load(finished.output_dir, model_name_or_path=str(wide))
    assert len(str(error.value).splitlines()) == 1


def test_a_checkpoint_can_be_evaluated_when_the_task_is_named(finished, place):
    checkpoint = finished.output_dir / "checkpoint-40"
    with pytest.raises(ConfigError, match="does not say which task"):
        evaluate(checkpoint)
    assert evaluate(checkpoint, place["task"])["accuracy"] == finished.metrics["metrics"]["test"]["accuracy"]


@pytest.mark.parametrize(
    "run", [{"dtype": "__import__"}, {"model_name_or_path": ["a"]}, {"task": {"name": "x"}}, "text", []], ids=str
)
def test_a_folder_with_a_strange_origin_is_refused(run, finished, tmp_path):
    shutil.copytree(finished.output_dir, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoint-*"))
    (tmp_path / "copy" / "metrics.json").write_text(json.dumps({"run": run}))
    (tmp_path / "copy" / "task.yaml").unlink()
    with pytest.raises(PeftLabError):
        load(tmp_path / "copy")


def test_a_baseline_cannot_be_merged(place, tmp_path):
    train(options(place["task"], place["backbone"], tmp_path / "out", method="full", do_predict=False))
    with pytest.raises(ConfigError, match="no adapter to merge"):
        merge(tmp_path / "out", tmp_path / "merged")


def test_full_trains_everything_and_head_only_the_head(place, tmp_path):
    start = load(_untrained(place, tmp_path)).model.merge_and_unload().state_dict()
    for method in ("full", "head"):
        run = options(place["task"], place["backbone"], tmp_path / method, method=method, max_steps=2, weight_decay=0.1)
        model = train(run).model
        trained = (model.merge_and_unload() if method == "head" else model).state_dict()
        changed = {n for n, v in trained.items() if not torch.equal(v, start[n])}
        if method == "head":
            assert changed == {"classifier.weight", "classifier.bias"}
        else:
            # a key's bias shifts all scores of a row alike, and unused positions get no gradient but decay
            assert len(changed) > 0.8 * len(start)


def _untrained(place, folder):
    run = options(place["task"], place["backbone"], folder / "start", method="head", max_steps=1, learning_rate=0.0)
    return train(run).output_dir


def test_the_default_learning_rate_is_the_methods_own(place, tmp_path):
    values = options(place["task"], place["backbone"], tmp_path / "out", method="svfit", max_steps=1, do_predict=False)
    del values["learning_rate"]
    assert train(values).metrics["learning_rate"] == registry.method("svfit").learning_rate


def test_do_predict_false_leaves_the_test_rows_alone(place, tmp_path, monkeypatch):
    from peft_lab.training import run as module

    asked = []
    original = module.load_splits
    monkeypatch.setattr(module, "load_splits", lambda task, **kw: asked.append(kw) or original(task, **kw))
    result = train(options(place["task"], place["backbone"], tmp_path / "out", max_steps=1, do_predict=False))
    assert asked == [{"test": False}]
    assert set(result.metrics["metrics"]) == {"validation"}


@pytest.mark.full
def test_limits_draw_from_all_classes_and_the_same_rows_each_time(place, tmp_path):
    limits = {"max_train_samples": 20, "max_eval_samples": 9, "max_test_samples": 6}
    result = train(options(place["task"], place["backbone"], tmp_path / "out", max_steps=1, **limits))
    assert result.metrics["data"]["rows"] == {"train": 20, "validation": 9, "test": 6}
    assert len(set(result.trainer.train_dataset.raw["label"])) == 3


# ---- folders that hold something already --------------------------------------------------------------------------


def test_a_finished_run_is_not_repeated_and_another_one_does_not_replace_it(place, tmp_path):
    values = options(place["task"], place["backbone"], tmp_path / "out", max_steps=2)
    first = train(values)
    before = {p.name: p.stat().st_mtime_ns for p in first.output_dir.iterdir()}
    again = train(values)
    assert again.trainer is None
    assert again.metrics == first.metrics | {"run": again.metrics["run"]}
    with pytest.raises(ConfigError, match=r"learning_rate: 0\.01 there, 0\.5 here.*--overwrite_output_dir"):
        train({**values, "learning_rate": 0.5})
    assert {p.name: p.stat().st_mtime_ns for p in first.output_dir.iterdir()} == before
    other = train({**values, "method": "full", "learning_rate": 0.5, "overwrite_output_dir": True})
    assert other.metrics["run"]["method"] == "full"
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_a_folder_with_other_files_is_refused_and_overwriting_keeps_them(place, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    values = options(place["task"], place["backbone"], out, max_steps=1, do_predict=False)
    with pytest.raises(ConfigError, match="not empty"):
        train(values)
    train({**values, "overwrite_output_dir": True})
    assert (out / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({"lr_scheduler_type": "lineer"}, "lineer"),
        ({"optim": "adamx"}, "adamx"),
        ({"model_name_or_path": "./nowhere"}, "nowhere"),
        ({"method_args": {"target_modules": ["nothing"]}}, "nothing"),
        ({"method_args": {"r": -1}}, "r"),
        ({"resume_from_checkpoint": "true"}, "no complete checkpoint"),
        ({"resume_from_checkpoint": "elsewhere/checkpoint-1"}, "elsewhere"),
        ({"load_best_model_at_end": True}, "eval"),
        ({"eval_strategy": "steps", "metric_for_best_model": "acuracy"}, '"accuracy"'),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_before_anything_is_written(changes, answer, place, tmp_path):
    values = options(place["task"], place["backbone"], tmp_path / "out", **changes)
    with pytest.raises(PeftLabError, match=answer) as error:
        train(values)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


# ---- interruption ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server():
    """A process that has imported everything and forks one child per run: a killed child takes nothing with it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.tiny_runs", "peft_lab.training.run"])
    return context


def run_killed(server, values, where, count) -> None:
    process = server.Process(target=train_and_die, args=(values, where, count))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


@pytest.fixture(scope="module")
def interrupted(place):
    """Options of a run with dropout, so that the random state matters, over more than one epoch."""

    def build(out, **changes):
        schedule = {"max_steps": 9, "max_train_samples": 40, "save_steps": 2, "gradient_accumulation_steps": 2}
        return options(
            place["task"], place["dropout"], out, **(schedule | {"per_device_train_batch_size": 4} | changes)
        )

    return build


@pytest.fixture(scope="module")
def alone(interrupted, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "out"
    train(interrupted(out))
    return out


KILLS = {
    "before the first checkpoint": [("compute_loss", 2)],
    "in mid epoch": [("compute_loss", 8)],
    "while a checkpoint is written": [("_save_rng_state", 2)],
    "before the checkpoint's state is written": [("_save_scaler", 3)],
    "at the end of an epoch": [("compute_loss", 11)],
    "three times": [("compute_loss", 7), ("compute_loss", 5), ("_save_rng_state", 1)],
    "after the last step": [("evaluate", 1)],
    "before the test rows": [("evaluate", 2)],
}


@pytest.mark.full
@pytest.mark.parametrize("name", KILLS)
def test_a_killed_run_continues_to_the_same_weights(name, server, interrupted, alone, tmp_path):
    values = interrupted(tmp_path / "out")
    for where, count in KILLS[name]:
        run_killed(server, values, where, count)
    result = train(values)
    assert result.metrics["global_step"] == 9
    assert same_weights(tmp_path / "out", alone)
    assert result.metrics["metrics"] == json.loads((alone / "metrics.json").read_text())["metrics"]
    assert result.metrics["resumed_from"] == (
        None if name.startswith("before the first") else result.metrics["resumed_from"]
    )


@pytest.mark.full
@pytest.mark.parametrize("method", ["svfit", "ssf", "full", "head"])
def test_a_killed_run_of_other_methods_continues_to_the_same_weights(method, server, interrupted, tmp_path):
    train(interrupted(tmp_path / "alone", method=method))
    values = interrupted(tmp_path / "out", method=method)
    run_killed(server, values, "compute_loss", 9)
    result = train(values)
    assert result.metrics["resumed_from"] == "checkpoint-4"
    assert same_weights(tmp_path / "out", tmp_path / "alone")


@pytest.mark.full
def test_resuming_counts_on_towards_early_stopping_and_keeps_the_best(server, interrupted, tmp_path):
    """A learning rate that ruins the model: the first evaluation is the best, and patience ends the run soon."""
    ruin = {
        "early_stopping_patience": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "learning_rate": 3.0,
    }
    ruin |= {"lr_scheduler_type": "constant", "max_steps": 30}
    left_alone = train(interrupted(tmp_path / "alone", **ruin))
    stopped = left_alone.metrics["global_step"]
    best = int(left_alone.metrics["best_checkpoint"].rpartition("-")[2])
    assert stopped == best + 2 < 30
    assert same_weights(tmp_path / "alone", tmp_path / "alone" / f"checkpoint-{best}")
    assert not same_weights(tmp_path / "alone", tmp_path / "alone" / f"checkpoint-{stopped}")
    for where, count in (("compute_loss", 2 * (stopped - 1) + 24), ("_load_best_model", 1)):
        values = interrupted(tmp_path / where, **ruin)
        process = server.Process(target=train_and_die, args=(values, where, count))
        process.start()
        process.join(120)
        resumed = train(values)
        assert resumed.metrics["global_step"] == stopped
        assert same_weights(tmp_path / where, tmp_path / "alone")


@pytest.mark.full
def test_the_best_model_at_the_end_is_the_best_with_its_head(interrupted, tmp_path):
    result = train(
        interrupted(
            tmp_path / "out",
            method="svfit",
            load_best_model_at_end=True,
            eval_strategy="steps",
            eval_steps=1,
            save_steps=1,
            max_steps=6,
            learning_rate=1.0,
            metric_for_best_model="loss",
        )
    )
    history = [(e["eval_loss"], e["step"]) for e in result.trainer.state.log_history if "eval_loss" in e][:6]
    best = min(history)[1]
    assert best < 6  # else this shows nothing: the last one would be the best
    saved = weights(tmp_path / "out" / f"checkpoint-{best}")
    assert same_weights(tmp_path / "out", tmp_path / "out" / f"checkpoint-{best}")
    assert any("classifier" in name for name in saved)
    assert result.metrics["metrics"]["validation"]["loss"] == pytest.approx(min(history)[0], abs=1e-6)


@pytest.mark.full
def test_another_run_does_not_continue_an_unfinished_one(server, interrupted, tmp_path):
    run_killed(server, interrupted(tmp_path / "out"), "compute_loss", 8)
    with pytest.raises(ConfigError, match="an unfinished run with other options"):
        train(interrupted(tmp_path / "out", seed=7))
    assert (tmp_path / "out" / "checkpoint-2").is_dir()
    with pytest.raises(ConfigError, match="start afresh"):
        train(interrupted(tmp_path / "out", resume_from_checkpoint="false"))


@pytest.mark.full
def test_a_checkpoint_can_be_continued_for_longer_in_another_folder(interrupted, alone, tmp_path):
    longer = interrupted(tmp_path / "out", max_steps=11, resume_from_checkpoint=str(alone / "checkpoint-9"))
    result = train(longer)
    assert result.metrics["global_step"] == 11
    assert (alone / "checkpoint-9").is_dir()
    assert not same_weights(tmp_path / "out", alone)


# ---- precision and trackers -----------------------------------------------------------------------------------------


@pytest.mark.full
def test_bf16_trains_on_a_cpu_and_keeps_the_adapter_in_float32(place, tmp_path):
    values = options(place["task"], place["backbone"], tmp_path / "out", bf16=True, dtype="bfloat16", max_steps=20)
    del values["use_cpu"]
    result = train(values)
    assert {v.dtype for n, v in weights(tmp_path / "out").items() if "lora_" in n} == {torch.float32}
    assert math.isfinite(result.metrics["metrics"]["test"]["loss"])
    assert result.model.get_base_model().bert.embeddings.word_embeddings.weight.dtype == torch.bfloat16


@pytest.mark.full
def test_gradient_checkpointing_gives_the_same_weights(place, tmp_path):
    for name, on in (("plain", False), ("saving", True)):
        train(options(place["task"], place["backbone"], tmp_path / name, activation_checkpointing=on, do_predict=False))
    assert same_weights(tmp_path / "plain", tmp_path / "saving", tolerance=1e-6)


@pytest.mark.full
def test_accumulating_gradients_equals_larger_batches(place, tmp_path):
    small = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    train(options(place["task"], place["backbone"], tmp_path / "small", **small, do_predict=False))
    train(options(place["task"], place["backbone"], tmp_path / "large", do_predict=False))
    assert same_weights(tmp_path / "small", tmp_path / "large", tolerance=1e-5)


def test_a_tracker_that_is_not_installed_is_named(place, tmp_path):
    with pytest.raises(ConfigError, match="wandbb"):
        train(options(place["task"], place["backbone"], tmp_path / "out", report_to="wandbb"))
    assert not (tmp_path / "out").exists()


def test_run_folder_files_are_written_whole(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {("not", "a key"): 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
