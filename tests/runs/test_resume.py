"""A run that was interrupted goes on to the same weights, or says why it does not."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file, save_file
from support.cover import cover
from support.method_runs import TRAINABLE, interrupt, options_for
from support.tiny_runs import same_weights

from peft_lab import registry
from peft_lab.errors import AdapterMismatchError, ConfigError
from peft_lab.training.run import train

SCHEDULE = {"max_steps": 5, "save_steps": 2, "per_device_train_batch_size": 4, "do_predict": False, "do_eval": False}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("resume")


@pytest.mark.full
@pytest.mark.parametrize("method", cover(TRAINABLE, lambda case: {registry.method(case[0]).place == "sequence"}))
def test_a_run_of_any_method_goes_on_from_its_last_whole_checkpoint_bit_for_bit(method, place, tmp_path, caplog):
    alone = train(options_for(method, place, tmp_path / "alone", **SCHEDULE)).output_dir
    manifest = json.loads((alone / "checkpoint-5" / "manifest.json").read_text())
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= manifest["files"].keys()
    assert manifest["data"].keys() == {"train", "validation"}
    newest = interrupt(alone, tmp_path / "out", 4)
    (newest / "optimizer.pt").unlink()
    result = train(options_for(method, place, tmp_path / "out", **SCHEDULE))
    assert "optimizer.pt is missing" in caplog.text
    assert result.metrics["resumed_from"] == "checkpoint-2"
    assert same_weights(tmp_path / "out", alone)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run in a place of its own."""
    folder = tmp_path_factory.mktemp("inputs")
    train(options_for("svfit", folder, folder / "run", **SCHEDULE))
    return folder


@pytest.fixture
def folder(finished):
    """The same place, whose data and base are restored afterwards."""
    kept = {path: path.read_bytes() for name in ("texts", "bert") for path in (finished / name).iterdir()}
    yield finished
    for path, content in kept.items():
        path.write_bytes(content)


def swap_labels(folder):
    path = folder / "texts" / "train.csv"
    path.write_text(path.read_text().replace("music", "other").replace("weather", "music").replace("other", "weather"))


def change_row(split):
    def change(folder):
        path = folder / "texts" / f"{split}.csv"
        head, first, *rest = path.read_text().splitlines(keepends=True)
        path.write_text("".join([head, f"now {first}", *rest]))

    return change


def change_base(folder):
    """Another value of a weight that no adapter is on."""
    path = folder / "bert" / "model.safetensors"
    weights = load_file(path)
    weights["embeddings.LayerNorm.bias"][0] += 1e-6
    save_file(weights, path, metadata={"format": "pt"})


def change_tokenizer(folder):
    path = folder / "bert" / "tokenizer.json"
    path.write_text(path.read_text().replace('"rain"', '"hail"'))


#: Name -> (change of a file, words of the refusal, or "" if the run goes on).
FILES = {
    "labels": (swap_labels, "the train rows"),
    "a row of train": (change_row("train"), "the train rows"),
    "a row of validation": (change_row("validation"), "the validation rows"),
    "a row of test": (change_row("test"), ""),
    "base": (change_base, "the weights of the base"),
    "tokenizer": (change_tokenizer, "the train rows, the validation rows"),
}
#: The same for options. A run's own folder is only taken with the same options, whatever they are.
OPTIONS = {
    "seed": ({"seed": 1}, r"seed \(unset there, 1 here\)"),
    "learning rate": ({"learning_rate": 0.5}, r"learning_rate \(0\.01 there, 0\.5 here\)"),
    "batch size": ({"per_device_train_batch_size": 2}, "per_device_train_batch_size"),
    "rank": ({"method_args": {"rank": 1}}, "method_args"),
    "steps": ({"max_steps": 7}, ""),
    "evaluations": ({"eval_strategy": "steps", "eval_steps": 1}, ""),
}


def check_refusal(words, values, checkpoint):
    """A run goes on where there are no words, and else leaves all as it is."""
    if not words:
        assert train(values).metrics["resumed_from"] == checkpoint.name
        return
    before = sorted(checkpoint.parent.rglob("*"))
    with pytest.raises(ConfigError, match=words) as error:
        train(values)
    assert len(str(error.value).splitlines()) == 1
    assert "cannot be continued" in str(error.value) or "other options" in str(error.value)
    assert sorted(checkpoint.parent.rglob("*")) == before


@pytest.mark.full
@pytest.mark.parametrize("name", cover(FILES, lambda case: {FILES[case[0]][1]} & {"the weights of the base", ""}))
def test_a_checkpoint_goes_on_with_the_data_and_the_base_it_was_trained_on(name, folder, tmp_path):
    change, words = FILES[name]
    checkpoint = interrupt(folder / "run", tmp_path / "out", 4)
    change(folder)
    values = options_for("svfit", folder, tmp_path / "out", **SCHEDULE)
    check_refusal(words, values, checkpoint)
    other = {"output_dir": str(tmp_path / "other"), "resume_from_checkpoint": str(checkpoint)}
    check_refusal(words, values | other, checkpoint)
    assert (tmp_path / "other").exists() == (words == "")


@pytest.mark.full
@pytest.mark.parametrize("name", cover(OPTIONS, lambda case: {case[0]} & {"learning rate", "steps"}))
def test_a_checkpoint_goes_on_with_the_options_that_decide_its_weights(name, finished, tmp_path):
    options, words = OPTIONS[name]
    checkpoint = interrupt(finished / "run", tmp_path / "out", 4)
    values = options_for("svfit", finished, tmp_path / "other", **SCHEDULE | options)
    check_refusal(words, values | {"resume_from_checkpoint": str(checkpoint)}, checkpoint)
    check_refusal(next(iter(options)), values | {"output_dir": str(tmp_path / "out")}, checkpoint)


def test_a_finished_run_on_other_rows_or_another_base_is_not_taken_for_this_one(folder, tmp_path):
    values = options_for("svfit", folder, folder / "run", **SCHEDULE)
    assert train(values).trainer is None
    swap_labels(folder)
    with pytest.raises(ConfigError, match=r"finished run on other rows \(train\).*--overwrite_output_dir"):
        train(values)
    swap_labels(folder)
    path = folder / "bert" / "model.safetensors"
    save_file({name: 2 * weight for name, weight in load_file(path).items()}, path, metadata={"format": "pt"})
    with pytest.raises(AdapterMismatchError, match=r"finished run on another base.*--overwrite_output_dir"):
        train(values)


@pytest.mark.full
def test_a_script_with_plain_trainer_is_continued_by_the_command(finished, tmp_path, caplog):
    """Its checkpoints have no manifest."""
    checkpoint = interrupt(finished / "run", tmp_path / "out", 4)
    (checkpoint / "manifest.json").unlink()
    values = options_for("svfit", finished, tmp_path / "other", **SCHEDULE, resume_from_checkpoint=str(checkpoint))
    assert train(values).metrics["resumed_from"] == "checkpoint-4"
    assert "has no manifest" in caplog.text
    assert same_weights(tmp_path / "other", finished / "run")
