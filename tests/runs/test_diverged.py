"""A run that meets a number that is not finite fails in one sentence, and leaves nothing that looks finished."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file
from support.cover import cover, each_method
from support.method_runs import TRAINABLE, options_for
from support.tiny_runs import command, flags
from transformers import TrainerCallback

from peft_lab import registry
from peft_lab.errors import DivergedError
from peft_lab.training.run import train
from peft_lab.training.trainer import LabTrainer

NAN, INF = float("nan"), float("inf")


def trained(model):
    return next(parameter for parameter in model.parameters() if parameter.requires_grad)


class Poison(TrainerCallback):
    """Puts an infinite number into a gradient, or into a weight, at a step."""

    def __init__(self, what, step):
        self.what, self.step = what, step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if self.what == "gradient" and state.global_step + 1 == self.step:
            trained(model).register_hook(lambda gradient: gradient * INF + INF)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.what == "weight" and state.global_step == self.step:
            trained(model).data.view(-1)[-1] = INF


def poisoned_loss(step, micro, value):
    """`compute_loss` whose loss is not finite in one of the two batches of a step."""
    compute, calls = LabTrainer.compute_loss, 0

    def poisoned(self, model, inputs, return_outputs=False, **kwargs):
        nonlocal calls
        found = compute(self, model, inputs, return_outputs=return_outputs, **kwargs)
        calls += model.training
        if return_outputs or not model.training or calls != 2 * (step - 1) + micro:
            return found
        return found * 0 + value

    return poisoned


def poison(what, step, monkeypatch):
    """Let a training meet `what` at a step, whatever the method."""
    if what.startswith("loss"):
        micro, value = {"loss": (1, NAN), "loss that is infinite": (2, INF)}[what]
        monkeypatch.setattr(LabTrainer, "compute_loss", poisoned_loss(step, micro, value))
        return
    build = LabTrainer.__init__

    def with_poison(self, *args, callbacks=(), **kwargs):
        build(self, *args, callbacks=[*callbacks, Poison(what, step)], **kwargs)

    monkeypatch.setattr(LabTrainer, "__init__", with_poison)


WHAT = {
    "loss": "step 3 because the loss",
    "loss that is infinite": "step 3 because the loss",
    "gradient": "step 3 because the norm of the gradient",
    "weight": "step 3 because a trained weight",
}
CASES = [(method, what) for method in TRAINABLE for what in WHAT]


def needs(case):
    return {registry.method(case[0]).place, case[1]}


@pytest.mark.full
@pytest.mark.parametrize(("method", "what"), cover(CASES, needs, full=each_method))
def test_a_run_of_any_method_stops_before_anything_is_lost(method, what, place, tmp_path, monkeypatch):
    poison(what, 3, monkeypatch)
    schedule = {"max_steps": 6, "save_steps": 1, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    schedule |= {"do_eval": False, "do_predict": False}
    # without clipping and with it, because clipping by an infinite norm makes a gradient zero
    values = options_for(method, place, tmp_path, **schedule, max_grad_norm=1.0 if len(method) % 2 else 0.0)
    with pytest.raises(DivergedError, match=WHAT[what]) as error:
        train(values)
    sentence = str(error.value)
    assert len(sentence.splitlines()) == 1
    assert "learning rate 0.01" in sentence
    assert f'the last checkpoint is "{tmp_path / "checkpoint-2"}"' in sentence
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"run.yaml", "checkpoint-1", "checkpoint-2"}
    (weights,) = (tmp_path / "checkpoint-2").glob("*model*.safetensors")
    assert all(weight.isfinite().all() for weight in load_file(weights).values())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("diverged")


@pytest.mark.parametrize("save", ["no", "steps"])
def test_weights_that_are_not_finite_after_the_last_step_are_not_saved(save, place, tmp_path, monkeypatch):
    poison("weight", 2, monkeypatch)
    with pytest.raises(DivergedError, match="step 2 because a trained weight"):
        train(options_for("lora", place, tmp_path, max_steps=2, save_strategy=save))
    assert not [*tmp_path.rglob("*.safetensors")]


@pytest.mark.full
@pytest.mark.parametrize("when", ["while it trains", "at its end"])
def test_an_evaluation_alone_that_is_not_finite_ends_the_run_too(when, place, tmp_path, monkeypatch):
    compute = LabTrainer.prediction_step
    calls = 0

    def poisoned(self, *args, **kwargs):
        nonlocal calls
        loss, logits, labels = compute(self, *args, **kwargs)
        calls += 1
        return (loss * NAN if calls == 2 else loss), logits, labels

    monkeypatch.setattr(LabTrainer, "prediction_step", poisoned)
    strategy = {"eval_strategy": "steps", "eval_steps": 1} if when == "while it trains" else {}
    with pytest.raises(DivergedError, match="eval rows is not finite"):
        train(options_for("lora", place, tmp_path, max_steps=2, **strategy))
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.full
def test_the_command_says_the_cause_and_leaves_an_unfinished_run(place, tmp_path):
    values = options_for("svfit", place, tmp_path / "out", learning_rate=1e38, max_steps=4, save_steps=1)
    done = command("train", *flags(values))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "learning rate 1e+38" in " ".join(done.stderr.split())
    again = command("evaluate", str(tmp_path / "out"))
    assert again.returncode == 2
    assert "JSON" not in again.stderr


def test_an_undefined_metric_is_null_in_every_file_and_a_word_in_the_card(place, tmp_path, monkeypatch):
    """A metric that is not finite although the loss is, for instance a correlation of one value."""
    from peft_lab.metrics.table import METRICS

    monkeypatch.setattr(type(METRICS["accuracy"]), "compute", lambda self, **_: {self.name: NAN})
    values = options_for("lora", place, tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1)
    result = train(values)
    assert result.metrics["metrics"]["test"]["accuracy"] is None
    assert result.metrics["beats_baseline"] is None

    def refuse(text):
        raise AssertionError(f"{text} is no JSON")

    files = [path for path in tmp_path.rglob("*.json") if "tokenizer" not in path.name]
    assert {"metrics.json", "trainer_state.json", "manifest.json"} <= {path.name for path in files}
    for path in files:
        json.loads(path.read_text(), parse_constant=refuse)
    assert "| test | accuracy | undefined |" in (tmp_path / "README.md").read_text()
    monkeypatch.undo()
    assert train(values).trainer is None, "the folder can be read again"
