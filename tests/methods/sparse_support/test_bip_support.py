"""Sparse supports that BiP chooses on training data: which entries, when, what is stored, what is refused."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.backbones import TINY, VARIANTS, tiny_inputs
from support.operations import One
from support.properties import adapt, config, output
from torch import Tensor, nn

import peft_lab
from peft_lab.adapters.weight.sparse_support.method import _drawn
from peft_lab.errors import ConfigError
from peft_lab.training.read_training_data import reads_training_data
from peft_lab.tuners.pruning import solve_bip

QUICK = {"support": "bip", "density": 0.2, "bip_steps": 3, "bip_mask_learning_rate": 0.5}


def _base(family: str = "bert") -> nn.Module:
    torch.manual_seed(0)
    return (TINY | VARIANTS)[family]().requires_grad_(False)


def _batches(base: nn.Module, count: int = 6) -> list[dict[str, Any]]:
    batches = []
    for number in range(count):
        torch.manual_seed(number)
        batches.append(tiny_inputs(base, batch=4) | {"labels": torch.randint(3, (4,))})
        if "input_ids" in batches[-1]:
            batches[-1]["input_ids"] = batches[-1]["input_ids"].roll(number, 1)
    return batches


def _supports(model: Any) -> dict[str, Tensor]:
    return {
        path: model.base_model.model.get_submodule(path).sparse_support_indices["default"] for path in _paths(model)
    }


def _paths(model: Any) -> list[str]:
    return sorted(model.targeted_module_names)


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[path], other[path]) for path in one)


@pytest.mark.parametrize("family", ["bert", "gpt2_classifier", "vit"])
def test_entries_are_those_with_the_highest_scores_of_bip(family: str) -> None:
    base = _base(family)
    batches, held = _batches(base), copy.deepcopy(base.state_dict())
    model = adapt("sparse_support", base, **QUICK)
    before = output(model, tiny_inputs(base))
    with pytest.raises(ConfigError, match=r"nobody has handed them over: add peft_lab\.ReadTrainingData\(\)"):
        model.train()(**batches[0])
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    peft_lab.read_training_data(model, batches)
    found = _supports(model)
    # the plain base with a trained head, on the batches in the order of the seed
    order = list(batches)
    random.Random(0).shuffle(order)
    for name, value in base.named_parameters():
        value.requires_grad_(any(f"{head}." in name for head in model.peft_config["default"].modules_to_save))
    modules = {path: base.get_submodule(path) for path in _paths(model)}
    wanted = solve_bip(base, modules, order, 0.8, steps=3, mask_learning_rate=0.5, by_layer=True).scores
    by_magnitude = _supports(adapt("sparse_support", base, support="magnitude", density=0.2))
    assert not _same(found, by_magnitude)
    for path, scores in wanted.items():
        flat = (scores.T if family == "gpt2_classifier" else scores).flatten()
        count = round(0.2 * len(flat))
        assert found[path].dtype == torch.int32
        assert found[path].tolist() == sorted(flat.topk(count).indices.tolist())
    # nothing else has changed, and the entries are what is trained
    assert {name for name, value in model.named_parameters() if value.requires_grad} == trained
    assert torch.equal(output(model.eval(), tiny_inputs(base)), before)
    state = model.base_model.model.state_dict()
    for name, value in held.items():
        assert any(torch.equal(value, state[key]) for key in _names(name) if key in state), name
    model.train()(**batches[0]).loss.backward()
    assert all(
        p.grad.abs().sum() > 0 for n, p in model.named_parameters() if n.endswith("sparse_support_values.default")
    )


def _names(name: str) -> list[str]:
    """Names of a base's entry with an adapter on it: as it is, in a wrapped layer, or in a wrapped head."""
    path, _, own = name.rpartition(".")
    parts = name.split(".")
    heads = [".".join([*parts[:at], "original_module", *parts[at:]]) for at in range(1, len(parts))]
    return [name, f"{path}.base_layer.{own}", *heads]


def test_the_choice_is_saved_and_not_made_again(tmp_path: Any) -> None:
    base = _base()
    model = adapt("sparse_support", base, **QUICK)
    assert reads_training_data(model)
    model.save_pretrained(tmp_path / "unread")
    peft_lab.read_training_data(model, _batches(base))
    assert not reads_training_data(model)
    found = _supports(model)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "sparse_support_values" in name:
                value.normal_()
    before = output(model, tiny_inputs(base))
    model.save_pretrained(tmp_path / "read")
    again = PeftModel.from_pretrained(_base(), tmp_path / "read", is_trainable=True).eval()
    assert torch.equal(output(again, tiny_inputs(base)), before)
    peft_lab.read_training_data(again, iter(()))
    assert _same(_supports(again), found)
    again.train()(**_batches(base)[0]).loss.backward()
    # one that was saved before the data were read, reads them
    late = PeftModel.from_pretrained(_base(), tmp_path / "unread", is_trainable=True)
    peft_lab.read_training_data(late, _batches(base))
    assert _same(_supports(late), found)


def test_values_without_entries_are_refused(tmp_path: Any) -> None:
    adapt("sparse_support", _base(), **QUICK).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    name = next(key for key in state if "sparse_support_values" in key)
    save_file(state | {name: state[name] + 1}, file)
    with pytest.raises(ConfigError, match=r"has values for .* and no support of them; train it again"):
        PeftModel.from_pretrained(_base(), tmp_path)


def test_a_second_adapter_chooses_for_itself() -> None:
    base = _base()
    model = adapt("sparse_support", base, support="magnitude", density=0.2)
    assert not reads_training_data(model)
    model.add_adapter("second", config("sparse_support", base, **QUICK))
    assert not reads_training_data(model)
    model.set_adapter("second")
    peft_lab.read_training_data(model, _batches(base))
    alone = adapt("sparse_support", base, **QUICK)
    peft_lab.read_training_data(alone, _batches(base))
    for path, support in _supports(alone).items():
        layer = model.base_model.model.get_submodule(path)
        assert torch.equal(layer.sparse_support_indices["second"], support)
        assert not torch.equal(layer.sparse_support_indices["default"], support)


@pytest.mark.parametrize(
    "changed",
    [
        {"bip_steps": 2},
        {"bip_learning_rate": 1.0},
        {"bip_mask_learning_rate": 0.05},
        {"bip_penalty": 0.01},
        {"support_seed": 1},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_every_field_changes_the_choice(changed: dict[str, Any]) -> None:
    base, found = _base(), []
    for fields in ({}, {}, changed):
        model = adapt("sparse_support", base, **QUICK | fields)
        peft_lab.read_training_data(model, _batches(base))
        found.append(_supports(model))
    assert _same(found[0], found[1])
    assert not _same(found[0], found[2])


def test_defaults_are_those_that_the_fields_name() -> None:
    base = _base()
    found = []
    fields = {"bip_steps": 20, "bip_learning_rate": 0.01, "bip_mask_learning_rate": 0.1, "bip_penalty": 10.0}
    for given in ({}, fields):
        model = adapt("sparse_support", base, support="bip", layers_to_transform=[0], **given)
        peft_lab.read_training_data(model, _batches(base, 2))
        found.append(_supports(model))
    assert _same(*found)
    assert all(len(support) == round(0.01 * 16 * 16) for support in found[0].values())


def test_batches_are_drawn_from_all_data() -> None:
    """Each of 40 batches is as likely as any other, by 300 seeds."""
    counts = torch.zeros(40)
    for seed in range(300):
        drawn = _drawn(iter([{"at": at} for at in range(40)]), 10, seed)
        assert drawn == _drawn(iter([{"at": at} for at in range(40)]), 10, seed)
        places = [batch["at"] for batch in drawn]
        assert len(set(places)) == 10
        counts[places] += 1
    assert counts.mean() == 75
    assert (counts - 75).abs().max() < 4.5 * (300 * 0.25 * 0.75) ** 0.5
    assert sorted(batch["at"] for batch in _drawn([{"at": at} for at in range(3)], 10, 0)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"support": "bip", "density": 1.0}, 'density=1 leaves support="bip" no choice'),
        ({"bip_steps": 4}, 'bip_steps=4 goes with support="bip", not "random"'),
        ({"support": "zeros", "bip_penalty": 1.0}, 'bip_penalty=1.0 goes with support="bip", not "zeros"'),
        ({"support": "bip", "bip_steps": 0}, "bip_steps=0 must be above 0"),
        ({"support": "bip", "bip_learning_rate": -1.0}, r"bip_learning_rate=-1\.0 must be above 0 and finite"),
        ({"support": "bip", "largest": False}, 'largest=False goes with support="magnitude", not "bip"'),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        config("sparse_support", **fields)


def test_too_few_rows_are_refused() -> None:
    base = _base()
    model = adapt("sparse_support", base, **QUICK)
    with pytest.raises(ConfigError, match=r"two batches, for weights and scores, and there are 1; give more rows"):
        peft_lab.read_training_data(model, _batches(base, 1))
    assert reads_training_data(model)
    with pytest.raises(ConfigError, match="needs batches with labels"):
        peft_lab.read_training_data(model, [{"input_ids": torch.arange(1, 9).view(2, 4)}] * 2)
    # the deltas are on again
    assert not any(model.base_model.model.get_submodule(path).disable_adapters for path in _paths(model))
    single = One(nn.Linear(6, 4))
    assert reads_training_data(adapt("sparse_support", single, target_modules=["op"], **QUICK))
