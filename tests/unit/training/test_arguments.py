"""Defaults of Trainer's arguments that a run sets."""

from __future__ import annotations

import pytest

from peft_lab import registry
from peft_lab.metrics import METRICS
from peft_lab.runs.run_config import RunConfig
from peft_lab.training.arguments import training_arguments


def arguments(tmp_path, **flags):
    run = {"task": "snips", "model_name_or_path": "minilm", "method": "lora", "output_dir": str(tmp_path / "out")}
    return training_arguments(RunConfig.from_mapping(run | flags), registry.method("lora"))


@pytest.mark.parametrize("metric", [*METRICS, "loss"])
def test_the_best_checkpoint_is_chosen_in_the_direction_of_its_metric(metric, tmp_path):
    better = METRICS[metric].greater_is_better if metric in METRICS else False
    assert arguments(tmp_path, metric_for_best_model=metric).greater_is_better is better
    assert arguments(tmp_path, metric_for_best_model=f"eval_{metric}").greater_is_better is better
    # what the run itself says counts
    assert arguments(tmp_path, metric_for_best_model=metric, greater_is_better=not better).greater_is_better != better


def test_no_batch_is_left_out_of_the_loss_of_an_evaluation(tmp_path):
    assert arguments(tmp_path).logging_nan_inf_filter is False


@pytest.mark.parametrize(("flags", "warm_up"), [({}, 0.1), ({"max_steps": 20}, 0.1), ({"max_steps": 19}, 0.0)])
def test_runs_of_some_length_warm_up(flags, warm_up, tmp_path):
    assert arguments(tmp_path, **flags).warmup_steps == warm_up
    assert arguments(tmp_path, **flags, warmup_steps=0.5).warmup_steps == 0.5  # what the run itself says counts
