"""The Trainer subclass: decay groups, frozen normalisation, learning rate of the head, complete checkpoints, memory."""

from __future__ import annotations

import json
import mmap
import time

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.backbones import TINY, tiny_inputs
from support.properties import EVERY_OWN, adapt, adapter_parameters, move, output, text_or_image
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    TrainingArguments,
)

from peft_lab.backbones.frozen_norms import frozen_norms
from peft_lab.runs.optimization import OptimizationOptions
from peft_lab.training.checkpoints import last_whole_checkpoint
from peft_lab.training.peak_memory import PeakMemory
from peft_lab.training.trainer import LabTrainer


def tiny_bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3
    )
    return BertForSequenceClassification(config)


def tiny_resnet() -> ResNetForImageClassification:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=3)
    return ResNetForImageClassification(config)


def images(count: int = 8) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [
        {"pixel_values": 5 + torch.randn(3, 32, 32, generator=draw), "labels": torch.tensor(i % 3)}
        for i in range(count)
    ]


def trainer(model: nn.Module, folder, rows=None, optimization=None, **flags) -> LabTrainer:
    values = {"max_steps": 2, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "learning_rate": 0.1, **flags}
    arguments = TrainingArguments(output_dir=str(folder), per_device_train_batch_size=4, save_strategy="no", **values)
    options = OptimizationOptions(**(optimization or {}))
    return LabTrainer(
        model=model, args=arguments, train_dataset=rows, optimization=options, head_modules=["classifier"]
    )


def group_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict:
    (group,) = [g for g in optimizer.param_groups if any(p is parameter for p in g["params"])]
    return group


def test_vectors_get_no_weight_decay_and_matrices_do_whatever_their_names(tmp_path):
    model = tiny_bert()
    # Trainer alone goes by these names, and would treat both the wrong way round.
    model.bert.pooler.register_parameter("scale", nn.Parameter(torch.ones(16)))
    model.bert.embeddings.register_parameter("layernorm_prompt", nn.Parameter(torch.ones(4, 16)))
    optimizer = trainer(model, tmp_path, weight_decay=0.3).create_optimizer()
    for name, parameter in model.named_parameters():
        expected = 0.3 if parameter.ndim > 1 else 0.0
        assert group_of(optimizer, parameter)["weight_decay"] == expected, name


@pytest.mark.parametrize("method", ["ln_tuning", *EVERY_OWN])
@torch.no_grad()
def test_vectors_of_an_adapter_decay_where_zero_is_the_base(method, tmp_path):
    """Matrices decay; a vector does exactly if the adapter with this one at zero gives the base's output."""
    base = TINY[text_or_image(method)]()
    adapted = move(adapt(method, base))
    optimizer = trainer(adapted, tmp_path, weight_decay=0.3).create_optimizer()
    adapters = {n: p for n, p in adapter_parameters(adapted).items() if p.requires_grad}
    wanted, inputs = output(base, tiny_inputs(base)), tiny_inputs(base)
    for kind in {name.rsplit(".", 2)[-2] for name in adapters}:
        named = {n: p for n, p in adapters.items() if n.rsplit(".", 2)[-2] == kind}
        vector = all(p.ndim <= 1 for p in named.values())
        kept = {n: p.clone() for n, p in named.items()}
        for parameter in named.values():
            parameter.zero_()
        is_base = torch.allclose(output(adapted, inputs), wanted, atol=1e-6)
        for name, parameter in named.items():
            parameter.copy_(kept[name])
            decay = group_of(optimizer, parameter)["weight_decay"]
            assert (decay > 0) == (not vector or is_base), (name, decay)


def test_the_head_has_its_own_learning_rate_and_it_acts(tmp_path):
    rows = [{"input_ids": torch.arange(4) + i, "labels": torch.tensor(i % 3)} for i in range(8)]

    def change(head):
        model = get_peft_model(
            tiny_bert(), LoraConfig(target_modules=["query"], modules_to_save=["classifier"], init_lora_weights=False)
        )
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        run = trainer(
            model, tmp_path, rows, {"head_learning_rate": head}, max_steps=1, lr_scheduler_type="constant", optim="sgd"
        )
        run.train()
        moved = {n: (p.detach() - before[n]).abs().max().item() for n, p in model.named_parameters() if p.requires_grad}
        return moved

    alone, faster = change(None), change(1.0)
    for name, size in alone.items():
        factor = 10 if "classifier" in name else 1
        assert faster[name] == pytest.approx(factor * size, rel=1e-3, abs=1e-9), name
    assert any("classifier" in name and size > 0 for name, size in alone.items())


def running_statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: b.clone() for n, b in model.named_buffers() if "running" in n or "tracked" in n}


def test_frozen_batchnorm_keeps_its_statistics_and_a_trained_one_does_not(tmp_path):
    for trained in (False, True):
        model = tiny_resnet()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained or "classifier" in name)
        before = running_statistics(model)
        trainer(model, tmp_path, images()).train()
        after = running_statistics(model)
        assert before
        assert all(torch.equal(before[n], after[n]) for n in before) != trained


def test_frozen_batchnorm_below_an_adapter_keeps_its_statistics(tmp_path):
    model = get_peft_model(tiny_resnet(), LoraConfig(target_modules=["convolution"], modules_to_save=["classifier.1"]))
    before = running_statistics(model)
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer(model, tmp_path, images()).train()
    assert all(torch.equal(value, running_statistics(model)[name]) for name, value in before.items())
    assert any(not torch.equal(value, dict(model.named_parameters())[name]) for name, value in weights.items())


def test_a_norm_without_parameters_counts_as_frozen_only_in_a_frozen_model():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False))
    assert frozen_norms(model) == []
    model[0].bias.requires_grad_(False)
    assert frozen_norms(model) == [model[1]]


def test_peak_memory_sees_an_allocation_that_is_gone_at_the_end():
    with PeakMemory() as memory:
        block = mmap.mmap(-1, 256 * 2**20)  # fresh pages, where numpy may be given what was freed before
        np.frombuffer(block, dtype=np.uint8)[:] = 1
        time.sleep(1.0)
        block.close()
    assert memory.peak - memory.before > 128 * 2**20


def test_peak_memory_of_a_training_is_not_that_of_an_earlier_one():
    """The peak of the process, which `ru_maxrss` gives, would still count what was freed before."""
    with mmap.mmap(-1, 512 * 2**20) as block:
        np.frombuffer(block, dtype=np.uint8)[:] = 1
    with PeakMemory() as memory:
        time.sleep(0.1)
    assert memory.peak - memory.before < 256 * 2**20


def test_no_pickle_is_written_beside_the_weights(tmp_path):
    run = trainer(tiny_bert(), tmp_path / "out")
    run.save_model()
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not list((tmp_path / "out").glob("*.bin"))


def test_the_state_file_of_trainer_has_the_fields_that_resuming_reads(tmp_path):
    rows = [{"input_ids": torch.arange(4), "labels": torch.tensor(0)} for _ in range(8)]
    run = trainer(tiny_bert(), tmp_path, rows)
    run.args.save_strategy = "steps"
    run.train()
    path = last_whole_checkpoint(tmp_path)
    assert path is not None
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"] is True
    assert run._is_finished(path)
    run.args.max_steps = 3
    assert not run._is_finished(path)
