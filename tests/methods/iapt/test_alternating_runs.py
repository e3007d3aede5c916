"""Bi-level training as an option of a run: held-out training rows for the activation, the others for all else."""

from __future__ import annotations

import pytest
import torch
from support.backbones import TINY
from support.properties import OWN, adapt, text_or_image
from support.tiny_runs import make_backbone, make_decoder, make_task, make_writing_task, options, weights

from peft_lab import registry
from peft_lab.comparison.run.measures import cost_of_step
from peft_lab.comparison.study.schema import from_mapping
from peft_lab.errors import ConfigError
from peft_lab.runs.run_config import RunConfig
from peft_lab.training.callbacks.bilevel import activation_parameters
from peft_lab.training.run import prepare, train
from peft_lab.training.trainer import LabTrainer


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alternating")
    return {
        "writing": make_writing_task(folder / "data"),
        "llama": make_decoder(folder / "llama"),
        "topics": make_task(folder / "topics"),
        "bert": make_backbone(folder / "bert"),
    }


def _run(place, out, **changes):
    return options(place["writing"], place["llama"], out, method="iapt", max_steps=4, **changes)


@pytest.mark.parametrize("method", OWN)
def test_the_capability_is_true(method):
    """Declared where there is an activation that learns, and nowhere else."""
    model = adapt(method, TINY[text_or_image(method)]())
    assert bool(activation_parameters(model)) == registry.learns_activation(registry.method(method))


@pytest.mark.full
def test_held_out_rows_train_the_activation_alone(place, tmp_path):
    """Until its own first step the activation stands still, bit for bit, while all else moves."""
    still = train(_run(place, tmp_path / "still"), alternating_every=9)
    moved = train(_run(place, tmp_path / "moved"), alternating_every=2, alternating_learning_rate=1e-3)
    plain = train(_run(place, tmp_path / "plain"))
    left, right, other = (weights(run.output_dir) for run in (still, moved, plain))
    with prepare(_run(place, tmp_path / "start")) as trainer:
        start = {n.replace(".default", ""): p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}
    for name, value in start.items():
        of_activation = "numerator" in name or "denominator" in name
        assert torch.equal(left[name], value) == of_activation
        assert not torch.equal(right[name], value)
        assert not torch.equal(other[name], value)
    assert still.metrics["data"]["rows"] == {"train": 86, "validation": 24, "test": 24, "held_out": 10}
    assert plain.metrics["data"]["rows"]["train"] == 96


@pytest.mark.full
def test_an_interrupted_run_goes_on_to_the_same_weights(place, tmp_path, monkeypatch, caplog):
    """The moments of the activations and the order of the held-out batches lie in the checkpoint."""
    run = _run(place, tmp_path / "out", alternating_every=1, alternating_learning_rate=1e-2, save_steps=2)
    run |= {"max_steps": 6, "save_strategy": "steps", "per_device_train_batch_size": 4}
    alone = train({**run, "output_dir": str(tmp_path / "alone")})
    step, steps = LabTrainer.training_step, iter(range(5))

    def broken(self, *args, **kwargs):
        next(steps)  # ends in the sixth step
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LabTrainer, "training_step", broken)
        with pytest.raises(StopIteration):
            train(run)
    resumed = train(run)
    assert resumed.metrics["resumed_from"] == "checkpoint-4"
    assert "start anew" not in caplog.text
    left, right = weights(alone.output_dir), weights(resumed.output_dir)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_the_cost_of_a_step_is_counted_with_one_row_a_batch(place, tmp_path):
    """A few rows are prepared for it, too few to hold any out."""
    run = _run(place, tmp_path / "out", per_device_train_batch_size=1)
    assert cost_of_step({**run, "alternating_every": 1, "alternating_fraction": 0.1}) == cost_of_step(run)


@pytest.mark.parametrize("fraction", [None, 0.25])
def test_held_out_rows_are_disjoint_and_drawn_by_the_seed(place, tmp_path, fraction):
    drawn = []
    for seed in (0, 0, 1):
        flags = {"method": "iapt", "alternating_every": 1, "seed": seed, "max_steps": 100}  # more than an epoch
        run = options(place["topics"], place["bert"], tmp_path, **flags)
        with prepare(run | ({"alternating_fraction": fraction} if fraction else {})) as trainer:
            callback = next(c for c in trainer.callback_handler.callbacks if hasattr(c, "dev_dataset"))
            held, rest = (list(map(tuple, rows["input_ids"])) for rows in (callback.dev_dataset, trainer.train_dataset))
        with prepare({k: v for k, v in run.items() if k != "alternating_every"}) as trainer:
            every = list(map(tuple, trainer.train_dataset["input_ids"]))
            validation = list(map(tuple, trainer.eval_dataset["input_ids"]))
        assert sorted(held + rest) == sorted(every)  # every training row is in one of them, and no other row
        assert len(held) == round(96 * (fraction or 0.1))
        assert sorted(held) != sorted(validation)
        drawn.append(held)
    assert drawn[0] == drawn[1] != drawn[2]


WRONG = [
    ("lora", {"alternating_every": 1}, 'for methods that learn an activation, and "lora" has none'),
    ("iapt", {"alternating_every": 0}, "alternating_every must be at least 1, got 0"),
    ("iapt", {"alternating_learning_rate": 1e-3}, "alternating_learning_rate=0.001 has no effect without"),
    ("iapt", {"alternating_every": 1, "alternating_learning_rate": 0}, "must be positive, got 0"),
    ("iapt", {"alternating_every": 1, "alternating_fraction": 0.6}, "over 0 and at most 0.5, got 0.6"),
]


@pytest.mark.parametrize(("method", "values", "message"), WRONG)
def test_wrong_options_are_refused(method, values, message):
    run = {"task": "snips", "model_name_or_path": "minilm", "method": method, "output_dir": "-"}
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_mapping(run | values).check()


def test_an_activation_that_does_not_learn_is_refused_before_anything_is_written(place, tmp_path):
    run = _run(place, tmp_path / "out", method_args={"activation": "relu"}, alternating_every=1)
    with pytest.raises(ConfigError, match=r"with \{'activation': 'relu'\} learns no activation"):
        train(run)
    assert not (tmp_path / "out").exists()


def test_an_arm_of_a_study_takes_the_options(place, tmp_path):
    study = {"name": "s", "tasks": [{"task": str(place["writing"]), "model_name_or_path": str(place["llama"])}]}
    arm = {"method": "iapt", "training": {"alternating_every": 2}}
    found = from_mapping(study | {"methods": ["lora", arm]}, "the study", tmp_path)
    shown = [found.options(found.cells[0], arm).get("alternating_every") for arm in found.arms]
    assert shown == [None, 2]
    assert from_mapping(found.to_dict(), "the study", tmp_path) == found
    with pytest.raises(ConfigError, match='"lora" has none'):
        from_mapping(study | {"methods": ["lora"], "training": {"alternating_every": 2}}, "the study", tmp_path)
    with pytest.raises(ConfigError, match='Unknown key "max_steps" for training of the arm of method "iapt"'):
        from_mapping(study | {"methods": [{**arm, "training": {"max_steps": 9}}]}, "the study", tmp_path)
