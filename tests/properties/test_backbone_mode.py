"""Mode of the frozen backbone in training: as `backbone_eval` says, by default as the method's authors have it."""

from __future__ import annotations

import copy
import itertools
import json
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import PeftModel
from support.backbones import TINY, tiny_inputs
from support.cover import cover, each_place
from support.properties import (
    DRAWS,
    EVERY_OWN,
    IMAGES,
    KEEPS_HEAD,
    OWN,
    SEQUENCE,
    TRAINED,
    UNTRAINED,
    adapt,
    adapter_parameters,
    as_read,
    assert_close,
    config,
    main_tensor,
    move,
    text_or_image,
)
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from peft_lab.tuners import AdapterLayer
from peft_lab.tuners.registration import config_class

#: As the authors' code trains: VPT, Prompt-CAM and NMTune put the backbone into evaluation mode, ILM-VP the classifier.
IN_EVALUATION = {"vpt", "prompt_cam", "pixel_prompt", "nmtune"}
ALL = [*EVERY_OWN, *KEEPS_HEAD]
#: BERT drops hidden states, Swin whole branches, and a method for images alone is on a ViT.
CASES = [
    *((m, "bert") for m in OWN),
    *((m, "swin") for m in (*OWN, *KEEPS_HEAD)),
    *((m, "vit") for m in (*IMAGES, *DRAWS)),
]


def _dropping(method: str, family: str, **fields: Any) -> Any:
    """An adapter on a backbone whose dropout and drop path are on in training mode, none of the adapter's own."""
    base = TINY[family]()
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
        if type(module).__name__.endswith("DropPath"):
            module.drop_prob = 0.5
    return move(adapt(method, base, **fields, **_own_draws(method)))


def _own_draws(method: str) -> dict[str, Any]:
    """Fields by which an adapter draws nothing of its own in training, but for the prompts that it is made of."""
    if (
        method in SEQUENCE and method in UNTRAINED
    ):  # a prompt that is the mean of all its particles is sampled from nothing
        return {"domain_draws": 2, "domain_particles": 2}
    return {"azimuth": [9.0, 9.0], "elevation": [45.0, 45.0]} if method in DRAWS else {}


def _hidden(model: Any, batch: int = 4) -> Tensor:
    """What the backbone makes in a training-mode forward, which is all but the head with its dropout."""
    base, seen = model.get_base_model(), []
    handle = base.base_model.register_forward_hook(lambda module, args, out: seen.append(out.last_hidden_state))
    out = model(**as_read(model, tiny_inputs(base, batch)))
    handle.remove()
    return seen[0] if seen else main_tensor(out)


def _twice_equal(model: Any) -> bool:
    torch.manual_seed(3)
    return torch.equal(_hidden(model), _hidden(model))


def test_the_default_is_that_of_the_authors():
    assert {m for m in ALL if config_class(m)().backbone_eval} == IN_EVALUATION & set(ALL)


@pytest.mark.parametrize(("method", "family"), cover(CASES))
def test_two_forwards_in_training_mode_are_equal_exactly_in_evaluation_mode(method, family):
    for evaluated in (True, False):
        model = _dropping(method, family, backbone_eval=evaluated).train()
        assert _twice_equal(model) == evaluated
        assert model.training
        assert all(m.training for m in model.modules() if isinstance(m, AdapterLayer))
        wrapped = [m for n, m in model.named_modules() if "modules_to_save.default" in n]
        assert all(module.training for module in wrapped)
        model.eval()
        assert _twice_equal(model)


@pytest.mark.parametrize("method", cover(EVERY_OWN, each_place))
def test_the_active_adapter_decides(method):
    family = text_or_image(method)
    model = _dropping(method, family, backbone_eval=True)
    model.add_adapter("other", config(method, backbone_eval=False, **_own_draws(method)))
    move(model, "other")
    for name in ("other", "default", "other"):
        model.set_adapter(name)
        assert _twice_equal(model.train()) == (name == "default")


CHECKPOINTED = [
    *((m, "bert") for m in TRAINED),
    *((m, "vit") for m in (*IMAGES, *DRAWS)),
    *((m, "opt") for m in TRAINED),
]


@pytest.mark.parametrize(
    ("method", "family", "reentrant"), cover((*case, reentrant) for case in CHECKPOINTED for reentrant in (True, False))
)
def test_blocks_are_checkpointed_in_evaluation_mode_too(method, family, reentrant):
    """Blocks that drop by themselves (OPT) included: the gradients are the same, and the last block runs twice."""
    grads, runs = [], []
    for checkpointing in (False, True):
        model = _dropping(method, family, backbone_eval=True)
        for module in model.modules():
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.3
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if family != "vit":
                model.enable_input_require_grads()
        model.train()
        inside = next(m for n, m in model.named_modules() if ".1." in n and isinstance(m, nn.LayerNorm))
        inside.register_forward_hook(lambda module, args, out: runs.append(module.training))
        hidden = _hidden(model)
        hidden.square().mean().backward()
        grads.append({n: p.grad for n, p in adapter_parameters(model).items()})
    assert runs == [False] * 3
    for name, grad in grads[0].items():
        if grads[1][name] is not None:
            assert_close(grads[1][name], grad)


class _Modes(TrainerCallback):
    """Modes of a model's modules at the end of each step's forward."""

    def __init__(self, model: Any) -> None:
        self.seen: list[tuple[bool, bool]] = []
        dropout = next(m for n, m in model.named_modules() if isinstance(m, nn.Dropout) and "output.dropout" in n)
        dropout.register_forward_hook(lambda module, args, out: self.seen.append((model.training, module.training)))


@pytest.mark.parametrize(
    ("door", "method", "evaluated"),
    cover(itertools.product(["trainer", "accelerate"], ["vpt", "svfit"], [True, False])),
)
def test_trainer_and_accelerate(door, method, evaluated, tmp_path):
    model = _dropping(method, "bert", backbone_eval=evaluated)
    modes = _Modes(model)
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 4, "labels": [0, 1, 2, 0]})
    if door == "trainer":
        arguments = TrainingArguments(str(tmp_path), max_steps=2, report_to=[], save_strategy="no", use_cpu=True)
        Trainer(model, arguments, train_dataset=rows).train()
    else:
        accelerator = Accelerator(cpu=True)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        prepared, optimizer = accelerator.prepare(model, optimizer)
        for _ in range(2):
            prepared.train()
            accelerator.backward(prepared(**tiny_inputs(model.get_base_model(), labels=True)).loss)
            optimizer.step()
    assert modes.seen
    assert all(mode == (True, not evaluated) for mode in modes.seen)


@pytest.mark.parametrize("method", ALL)
def test_the_choice_is_saved_and_a_file_without_it_trains_on_as_before(method, tmp_path):
    family = "vit" if method in KEEPS_HEAD else text_or_image(method)
    base = TINY[family]()
    model = adapt(method, base)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    assert values["backbone_eval"] == (method in IN_EVALUATION)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert loaded.peft_config["default"].backbone_eval == (method in IN_EVALUATION)
    del values["backbone_eval"]
    path.write_text(json.dumps(values))
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert loaded.peft_config["default"].backbone_eval is False


@pytest.mark.parametrize("method", ["vpt"])
def test_unloading_gives_the_base_its_mode_back(method):
    model = _dropping(method, "bert", backbone_eval=True)
    _hidden(model.train())
    bare: PreTrainedModel = model.unload()
    bare.train()
    torch.manual_seed(0)
    one, two = (bare(**tiny_inputs(bare)).logits for _ in range(2))
    assert not torch.equal(one, two)
