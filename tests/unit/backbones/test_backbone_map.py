"""The map of a model is made once, notices changed modules, and has no hold on the model."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import sys
import weakref
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from support.backbones import MODELS, TINY, bare, found, tiny
from torch import nn

import peft_lab
from peft_lab.backbones import backbone_map as backbone_map_module
from peft_lab.backbones.backbone_map import backbone_map
from peft_lab.backbones.module_roles import (
    class_heads,
    head_modules,
    module_locations,
    modules_by_role,
    target_modules,
    target_regex,
)

FOLDER = str(Path(backbone_map_module.__file__).parent)


def _calls(function: Any) -> int:
    """Number of calls of functions in peft_lab/backbones, frames of comprehensions and generators included."""
    count = 0

    def count_call(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(FOLDER)

    sys.setprofile(count_call)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def test_an_adapter_is_put_in_with_few_calls() -> None:
    model, config = TINY["bert"](), peft_lab.SVFitConfig(task_type="SEQ_CLS")
    assert _calls(lambda: get_peft_model(model, config)) <= 400


def test_a_second_question_is_answered_from_the_map() -> None:
    model = TINY["bert"]()
    assert module_locations(model)
    assert backbone_map(model) is backbone_map(model)
    assert _calls(lambda: module_locations(model)) < 10
    assert _calls(lambda: modules_by_role(model, "attn.q")) < 60
    assert _calls(lambda: modules_by_role(model, "attn.q")) < 10


def test_answers_are_copies() -> None:
    model = TINY["bert"]()
    modules_by_role(model, "attn.q").clear()
    head_modules(model).clear()
    path = next(iter(module_locations(model)))
    module_locations(model)[path]["role"] = "other"
    assert len(modules_by_role(model, "attn.q")) == 2
    assert head_modules(model) == ["classifier"]
    assert module_locations(model)[path]["role"] != "other"


# Changed modules ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "vit", "llama", "t5", "clip", "swin", "convnext"])
def test_an_adapter_changes_no_role(name: str) -> None:
    model = TINY[name]()
    before, targets = module_locations(model), target_modules(model, ["linear"])
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
    assert module_locations(adapted) == before
    assert module_locations(adapted.unload()) == before


def test_blocks_that_are_wrapped_keep_their_modules() -> None:
    model = TINY["vit"]()
    queries, blocks = modules_by_role(model, "attn.q"), modules_by_role(model, "block")
    adapted = get_peft_model(model, peft_lab.VPTConfig(num_prompts=2))
    assert modules_by_role(adapted, "block") == blocks
    wrapped = modules_by_role(adapted, "attn.q")
    assert [path.replace(".base_layer", "") for path in wrapped] == queries
    assert all(isinstance(adapted.get_base_model().get_submodule(path), nn.Linear) for path in wrapped)


def test_a_new_head_is_noticed() -> None:
    model = TINY["bert"]()
    assert head_modules(model) == ["classifier"]
    model.classifier = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 3))
    assert head_modules(model) == ["classifier.0", "classifier.1"]
    assert class_heads(model) == ["classifier.1"]
    model.classifier = nn.Linear(16, 3)
    assert class_heads(model) == ["classifier"]


def test_a_norm_that_becomes_an_identity_is_noticed() -> None:
    model = TINY["vit"]()
    norms = modules_by_role(model, "norm")
    model.vit.layers[0].layernorm_before = nn.Identity()
    assert modules_by_role(model, "norm") == norms[1:]


# The model is free --------------------------------------------------------------------------------------------------


def test_a_map_keeps_no_model_alive() -> None:
    model = TINY["bert"]()
    head_modules(model)
    module_locations(model)
    rest = backbone_map(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert rest.heads == ("classifier",)


def test_copies_of_a_model_have_maps_of_their_own() -> None:
    model = TINY["bert"]()
    before = module_locations(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert module_locations(copied) == before
        copied.bert.encoder.layer = copied.bert.encoder.layer[:1]
        assert len(modules_by_role(copied, "attn.q")) == 1
        assert module_locations(model) == before


# Names in place of the regex ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "roles", "names"),
    [
        ("bert", ["attn.q", "attn.v"], ["query", "value"]),
        ("bert", ["linear"], ["intermediate.dense", "key", "output.dense", "query", "value"]),
        ("bert", ["attn.out"], ["attention.output.dense"]),
        ("llama", ["attn.q", "mlp.up"], ["q_proj", "up_proj"]),
        ("t5", ["attn.q", "attn.v"], ["q", "v"]),
        ("gpt2", ["attn.out"], ["attn.c_proj"]),
        ("clip", ["attn.out"], ["self_attn.out_proj"]),
        ("t5", ["cross.q"], ["EncDecAttention.q"]),
    ],
)
def test_targets_are_names_where_these_are_enough(name: str, roles: list[str], names: list[str]) -> None:
    assert target_modules(tiny(name), roles) == names


def test_targets_are_a_regex_where_names_find_more() -> None:
    assert isinstance(target_modules(tiny("bert"), ["block"]), str)
    assert isinstance(target_modules(tiny("bert"), ["attn.q"], layers=[1]), str)
    # "norm" alone would also find the norm in the head of ModernBERT.
    assert isinstance(target_modules(tiny("llama"), ["norm.final"]), str)


@pytest.mark.parametrize("roles", [("attn.q", "attn.v"), ("linear",), ("op",)])
@pytest.mark.parametrize("name", MODELS)
def test_names_find_the_modules_of_the_regex(name: str, roles: tuple[str, ...]) -> None:
    """By peft's rule, on the model and on its bare backbone."""
    model = tiny(name)
    targets, pattern = target_modules(model, roles), target_regex(model, roles)
    if isinstance(targets, str):
        assert targets == pattern
        return
    ends = re.compile(rf"(?:.*\.)?(?:{'|'.join(map(re.escape, targets))})")
    parts = [model]
    if model.base_model_prefix in dict(model.named_children()) and not name.startswith("dinov3"):
        parts.append(bare(model))
    for part in parts:
        assert [path for path, _ in part.named_modules() if ends.fullmatch(path)] == found(part, pattern)


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_an_adapter_saved_with_a_regex_still_loads(task_type: str | None, tmp_path: Path) -> None:
    model = TINY["bert"]()
    pattern = target_regex(model, ["attn.q", "attn.v"])
    names = sorted(found(model, pattern))
    config = peft_lab.SVFitConfig(target_modules=pattern, task_type=task_type)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    ids = torch.tensor([[5, 6, 7]])
    expected = adapted.eval()(input_ids=ids).logits
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(TINY["bert"](), tmp_path).eval()
    assert again.peft_config["default"].target_modules == names
    torch.testing.assert_close(again(input_ids=ids).logits, expected)


def test_a_known_backbone_in_a_custom_model() -> None:
    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = hf.ViTModel(tiny("vit").config)
            self.query_proj = nn.Linear(16, 3)

    assert target_modules(Custom(), ["attn.q"]) == ["q_proj"]
