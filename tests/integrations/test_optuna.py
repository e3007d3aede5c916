"""Search of hyper-parameters by `Trainer.hyperparameter_search`, which trains a new adapter for each trial."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from support.backbones import tiny, tiny_inputs
from support.properties import EVERY, UNTRAINED, adapt, as_read, config, text_or_image
from transformers import Trainer, TrainingArguments

pytest.importorskip("optuna")

TRAINED = sorted({*EVERY} - {*UNTRAINED})


@pytest.mark.integration(library="optuna", use="`Trainer.hyperparameter_search` over the learning rate")
@pytest.mark.parametrize("method", TRAINED)
def test_each_trial_trains_an_adapter_of_its_own(method: str, tmp_path: Path) -> None:
    family = text_or_image(method)
    base = tiny(family)
    inputs = as_read(adapt(method, base), tiny_inputs(base))
    rows = [{**{name: value[i % 2] for name, value in inputs.items()}, "labels": i % 2} for i in range(8)]
    trained = []

    def model_init(trial: object) -> torch.nn.Module:
        torch.manual_seed(0)
        model = copy.deepcopy(base)
        model = get_peft_model(model, config(method, model))
        trained.append(model)
        return model

    arguments = TrainingArguments(
        tmp_path,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="no",
        per_device_train_batch_size=4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model_init=model_init, args=arguments, train_dataset=rows, eval_dataset=rows)
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True)},
        backend="optuna",
        n_trials=2,
        direction="minimize",
    )
    assert best.hyperparameters.keys() == {"learning_rate"}
    assert len({id(model) for model in trained}) >= 2
