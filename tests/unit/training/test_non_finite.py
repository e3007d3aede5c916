"""The guard of a step: what is normal under a loss scaler, and the cause that it names."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from peft_lab.errors import DivergedError
from peft_lab.training.non_finite import NonFiniteGuard, check_evaluation, check_weights

NAN, INF = torch.tensor(float("nan")), torch.tensor(float("inf"))


def trainer(tmp_path, step=1, scale=None, dtype=torch.float32, fp16=False, head=None):
    """As much of a Trainer as the guard looks at."""
    scaler = None if scale is None else SimpleNamespace(is_enabled=lambda: True, get_scale=lambda: scale)
    return SimpleNamespace(
        accelerator=SimpleNamespace(scaler=scaler),
        state=SimpleNamespace(global_step=step),
        args=SimpleNamespace(output_dir=str(tmp_path), world_size=1, fp16=fp16, learning_rate=0.5),
        model=nn.Linear(2, 2).to(dtype),
        optimization=SimpleNamespace(head_learning_rate=head),
    )


@pytest.mark.parametrize("scale", [2.0**16, 1.0])
def test_an_overflow_that_a_loss_scaler_mends_is_normal(scale, tmp_path):
    guard, found = NonFiniteGuard(), trainer(tmp_path, scale=scale)
    guard.add_loss(torch.tensor(1.0))
    guard.check_step(found, INF)
    # a loss that is not finite is no matter of the scale, in whichever batch of the step it was
    guard.add_loss(NAN)
    guard.add_loss(torch.tensor(1.0))
    with pytest.raises(DivergedError, match="the loss is not finite"):
        guard.check_step(found, torch.tensor(1.0))
    guard.check_step(found, torch.tensor(1.0))  # the next step starts anew


def test_an_overflow_at_every_scale_is_not(tmp_path):
    with pytest.raises(DivergedError, match="norm of the gradient"):
        NonFiniteGuard().check_step(trainer(tmp_path, scale=0.5), INF)
    with pytest.raises(DivergedError, match="norm of the gradient"):
        NonFiniteGuard().check_step(trainer(tmp_path), float("inf"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "learning rate 0.5 is too high"),
        ({"head": 3.0}, "learning rate 0.5 or that of the head, 3, is too high"),
        ({"step": 0}, "the data or in the base"),
        ({"dtype": torch.float16}, "float16 ends at 65504"),
        ({"fp16": True}, "float16 ends at 65504"),
    ],
    ids=str,
)
def test_the_likely_cause_is_named(changes, words, tmp_path):
    guard, found = NonFiniteGuard(), trainer(tmp_path, **changes)
    guard.add_loss(NAN)
    with pytest.raises(DivergedError, match=words) as error:
        guard.check_step(found, None)
    assert f"step {found.state.global_step + 1} " in str(error.value)
    assert "no checkpoint from before" in str(error.value)


def test_frozen_weights_may_be_anything(tmp_path):
    found = trainer(tmp_path)
    check_weights(found)
    with torch.no_grad():
        found.model.weight[0, 0] = INF
    with pytest.raises(DivergedError, match="a trained weight"):
        check_weights(found)
    found.model.weight.requires_grad_(False)
    check_weights(found)


def test_an_evaluation_without_labels_has_no_loss():
    check_evaluation(None, "eval", 3)
    check_evaluation(1.0, "eval", 3)
    with pytest.raises(DivergedError, match="eval rows is not finite after 3"):
        check_evaluation(float("inf"), "eval", 3)
