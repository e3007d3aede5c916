"""Plugins of FSDP and DeepSpeed, made ready for a model with an adapter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.backbones import TINY
from support.properties import adapt

from peft_lab.errors import ConfigError
from peft_lab.training.sharding import check_processes, prepare_sharding


class Plugin(SimpleNamespace):
    """FSDP's plugin as accelerate makes it."""

    def set_state_dict_type(self, name: str) -> None:
        self.state_dict_type = name


def prepared(model: Any, processes: int = 2, **values: Any) -> Plugin:
    given = {"fsdp_version": 2, "cpu_ram_efficient_loading": False, "transformer_cls_names_to_wrap": None, **values}
    plugin = Plugin(**given)
    state = SimpleNamespace(fsdp_plugin=plugin)
    trainer = SimpleNamespace(
        args=SimpleNamespace(world_size=processes),
        accelerator=SimpleNamespace(state=state),
        is_deepspeed_enabled=False,
        model=model,
    )
    prepare_sharding(trainer)
    return plugin


def test_blocks_are_units_and_what_is_around_the_embeddings_is_none():
    """BERT names its embeddings among the classes that stay together, and accelerate shards them by themselves."""
    model = adapt("svfit", TINY["bert"]())
    assert "BertEmbeddings" in model._no_split_modules
    plugin = prepared(model)
    assert plugin.transformer_cls_names_to_wrap == ["BertLayer"]
    assert plugin.state_dict_type == "FULL_STATE_DICT"
    assert prepared(model, transformer_cls_names_to_wrap=["Mine"]).transformer_cls_names_to_wrap == ["Mine"]


def test_a_head_of_another_dtype_is_a_unit_of_its_own():
    model = adapt("vpt", TINY["bert"]().to(torch.bfloat16))
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    assert dtypes == {torch.float32, torch.bfloat16}
    units = prepared(model).transformer_cls_names_to_wrap
    assert units == ["BertLayer", type(model.base_model.model.classifier).__name__]


@pytest.mark.parametrize(
    ("values", "words"),
    [({"fsdp_version": 1}, "fsdp_version: 2"), ({"cpu_ram_efficient_loading": True}, "set it to false")],
)
def test_what_would_train_otherwise_is_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        prepared(adapt("ssf", TINY["bert"]()), **values)


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_processes(2)
    with pytest.raises(ConfigError, match="2 processes were started, but they do not train together"):
        check_processes(1)
