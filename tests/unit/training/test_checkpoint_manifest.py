"""Damages of a checkpoint, each with its outcome; the files of a real run are not needed for that."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors.torch import save_file

from peft_lab.errors import ConfigError
from peft_lab.training.checkpoint_manifest import MANIFEST, STATE, fault_of, write_manifest
from peft_lab.training.checkpoints import checkpoint_to_resume, last_whole_checkpoint, remove_checkpoints


def checkpoint(folder, step, processes=1, manifest=True, **state):
    """A folder with all that Trainer writes."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    save_file({"weight": torch.arange(8.0)}, path / "adapter_model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.save({"step": step}, path / name)
    for name in ["rng_state.pth"] if processes == 1 else [f"rng_state_{i}.pth" for i in range(processes)]:
        torch.save({}, path / name)
    (path / STATE).write_text(json.dumps({"global_step": step, **state}))
    if manifest:
        write_manifest(path, step, processes, {})
    return path


def edit(path, name, text):
    (path / name).write_text(text)


def cut(path, name):
    (path / name).write_bytes((path / name).read_bytes()[:-20])


def zero_tail(path, name):
    """The right length, and zeros at the end: what a power cut leaves of a file."""
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[:-8] + bytes(8))


def not_finite(path):
    save_file({"weight": torch.tensor([1.0, float("nan")])}, path / "adapter_model.safetensors")


#: Name -> (damage, words of the fault, whether a checkpoint without manifest shows it too).
DAMAGES = {
    "no optimizer": (lambda p: (p / "optimizer.pt").unlink(), "optimizer.pt", True),
    "no schedule": (lambda p: (p / "scheduler.pt").unlink(), "scheduler.pt", True),
    "no random state": (lambda p: (p / "rng_state.pth").unlink(), "rng_state.pth", True),
    "no weights": (lambda p: (p / "adapter_model.safetensors").unlink(), "weights|adapter_model", True),
    "no state": (lambda p: (p / STATE).unlink(), STATE, True),
    "optimizer cut": (lambda p: cut(p, "optimizer.pt"), "optimizer.pt", True),
    "random state cut": (lambda p: cut(p, "rng_state.pth"), "rng_state.pth", True),
    "weights cut": (lambda p: cut(p, "adapter_model.safetensors"), "adapter_model.safetensors", True),
    "tail of the weights zeroed": (lambda p: zero_tail(p, "adapter_model.safetensors"), "adapter_model", False),
    "tail of the optimizer zeroed": (lambda p: zero_tail(p, "optimizer.pt"), "optimizer.pt", False),
    "weights not finite": (not_finite, "adapter_model.safetensors", True),
    "state cut": (lambda p: cut(p, STATE), STATE, True),
    "step edited": (lambda p: edit(p, STATE, '{"global_step": 3}'), STATE, True),
    "renamed": (lambda p: p.rename(p.with_name("checkpoint-7")), "step 6", True),
    "manifest cut": (lambda p: cut(p, MANIFEST), MANIFEST, False),
    "manifest of another form": (lambda p: edit(p, MANIFEST, '{"files": 1}'), MANIFEST, False),
}


CASES = [(name, True) for name in DAMAGES] + [(name, False) for name, (*_, shown) in DAMAGES.items() if shown]


@pytest.mark.parametrize(("name", "manifest"), CASES)
def test_a_damaged_checkpoint_is_named_and_the_last_whole_one_taken(name, manifest, tmp_path, caplog):
    damage, words, _ = DAMAGES[name]
    older, newest = (checkpoint(tmp_path, step, manifest=manifest) for step in (4, 6))
    assert fault_of(newest, 1) == ""
    damage(newest)
    with caplog.at_level(logging.WARNING, logger="peft_lab"):
        assert checkpoint_to_resume(tmp_path, None) == str(older)
    (line,) = [r.getMessage() for r in caplog.records if "passed over" in r.getMessage()]
    assert "checkpoint-" in line
    assert any(word in line for word in words.split("|"))
    named = next(p for p in tmp_path.iterdir() if p != older)
    with pytest.raises(ConfigError, match=r"cannot be continued|no trainer_state") as error:
        checkpoint_to_resume(tmp_path / "elsewhere", str(named))
    assert len(str(error.value).splitlines()) == 1


def test_without_a_whole_one_a_complete_checkpoint_is_kept_and_a_half_written_one_is_not(tmp_path, caplog):
    path = checkpoint(tmp_path, 4)
    zero_tail(path, "adapter_model.safetensors")
    for asked in (None, True, "true"):
        with pytest.raises(ConfigError, match=r"checkpoint-4: adapter_model.*--overwrite_output_dir"):
            checkpoint_to_resume(tmp_path, asked)
    assert checkpoint_to_resume(tmp_path, None, overwrite=True) is None
    (path / MANIFEST).unlink()
    (path / STATE).unlink()
    assert checkpoint_to_resume(tmp_path, None) is None
    assert "starts afresh" in caplog.text
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        checkpoint_to_resume(tmp_path, "true")
    with pytest.raises(ConfigError, match="start afresh"):
        checkpoint_to_resume(tmp_path, "false")


def test_a_checkpoint_without_the_manifest_of_its_run_was_being_written(tmp_path, caplog):
    older = checkpoint(tmp_path, 4)
    checkpoint(tmp_path, 6, manifest=False)
    assert checkpoint_to_resume(tmp_path, None) == str(older)
    assert MANIFEST in caplog.text


def test_a_checkpoint_of_plain_trainer_is_taken_with_a_line(tmp_path, caplog):
    path = checkpoint(tmp_path, 4, manifest=False)
    assert checkpoint_to_resume(tmp_path / "other", str(path)) == str(path)
    assert checkpoint_to_resume(tmp_path, None) == str(path)
    assert caplog.text.count("has no manifest") == 2


def test_every_process_needs_its_own_random_state(tmp_path, caplog):
    path = checkpoint(tmp_path, 5, processes=2)
    assert last_whole_checkpoint(tmp_path, world_size=2) == str(path)
    with pytest.raises(ConfigError, match="2 processes wrote it, and 1 train now"):
        checkpoint_to_resume(tmp_path, None)
    assert checkpoint_to_resume(tmp_path, str(path)) == str(path)
    assert "random states start anew" in caplog.text
    (path / "rng_state_1.pth").unlink()
    assert last_whole_checkpoint(tmp_path, world_size=2) is None


def test_a_damaged_best_checkpoint_is_found_before_it_is_needed(tmp_path):
    best = checkpoint(tmp_path, 2)
    older = checkpoint(tmp_path, 4)
    newest = checkpoint(tmp_path, 6, best_model_checkpoint=f"/elsewhere/{best.name}")
    assert checkpoint_to_resume(tmp_path, None) == str(newest)
    zero_tail(best, "adapter_model.safetensors")
    assert checkpoint_to_resume(tmp_path, None) == str(older)


def test_weights_alone_are_no_checkpoint_to_go_on_from(tmp_path):
    path = checkpoint(tmp_path, 4, manifest=False)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (path / name).unlink()
    write_manifest(path, 4, 1, {})
    with pytest.raises(ConfigError, match="save_only_model"):
        checkpoint_to_resume(tmp_path, None)


def test_a_checkpoint_that_overwriting_would_remove_is_refused(tmp_path):
    path = checkpoint(tmp_path, 4)
    with pytest.raises(ConfigError, match="--overwrite_output_dir"):
        checkpoint_to_resume(tmp_path, str(path), overwrite=True)


def test_removal_leaves_folders_of_other_names(tmp_path):
    good = checkpoint(tmp_path, 9)
    checkpoint(tmp_path, 10)
    (tmp_path / "checkpoint-best").mkdir()
    remove_checkpoints(tmp_path, after=str(good))
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-9", "checkpoint-best"}
    remove_checkpoints(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-best"}
    assert last_whole_checkpoint(tmp_path) is None
