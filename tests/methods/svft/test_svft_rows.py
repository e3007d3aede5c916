"""SVFT by row: diagonals, bands, gates and ranks side by side, each as the adapter alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.operations import OPS, make
from support.properties import config, move

import peft_lab
from peft_lab.errors import ConfigError

RECIPES: dict[str, dict[str, Any]] = {
    "plain": {"author_gate": True},
    "small": {"rank": 3},
    "band": {"pattern": "banded", "off_diagonals": 1},
    "gated": {"pattern": "banded", "off_diagonals": 2, "rank": 4, "author_gate": True},
    "wide": {"pattern": "banded", "off_diagonals": 9, "rank": 3},
    "energy": {"pattern": "banded", "rank": "energy:0.9"},
}
SERVED = [op for op, (kind, *_) in OPS.items() if kind in ("linear", "conv1d", "conv2d", "embedding")]


def saved(base: Any, folder: Path, seed: int, **fields: Any) -> Path:
    model = move(get_peft_model(copy.deepcopy(base), config("svft", target_modules=["op"], **fields)), seed=seed)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("op", SERVED)
@torch.no_grad()
def test_rows_of_several_patterns_answer_as_alone(op, tmp_path):
    base, x = make(op)
    folders = {}
    for seed, (name, fields) in enumerate(RECIPES.items()):
        folders[name] = saved(base, tmp_path / name, seed, **fields)
    tenants = peft_lab.load_many(copy.deepcopy(base), folders)
    names = [*folders, "__base__"]
    for start in range(0, len(names), len(x) - 1):
        chosen = (names[start:] + names)[: len(x)]
        mixed = tenants(x, adapter_names=chosen)
        for row, name in enumerate(chosen):
            plain = copy.deepcopy(base)
            alone = plain if name == "__base__" else PeftModel.from_pretrained(plain, folders[name]).eval()
            torch.testing.assert_close(mixed[row], alone(x)[row], atol=2e-5, rtol=2e-5)
            assert name == "__base__" or not torch.allclose(mixed[row], base(x)[row], atol=1e-4)


@pytest.mark.parametrize("pattern", ["random", "top_k"])
def test_entries_at_places_of_their_own_are_refused(pattern, tmp_path):
    torch.manual_seed(0)
    base = torch.nn.ModuleDict({"op": torch.nn.Linear(6, 6)})
    with pytest.raises(ConfigError, match=f'pattern="{pattern}" have entries at places of their own'):
        peft_lab.load_many(base, {"a": saved(base, tmp_path, 0, pattern=pattern)})


@pytest.mark.parametrize("fields", [RECIPES["band"], RECIPES["gated"], {"pattern": "random"}])
@torch.no_grad()
def test_adapters_of_one_model_mix_by_row(fields):
    base, x = make("linear")
    model = get_peft_model(copy.deepcopy(base), config("svft", target_modules=["op"], **fields))
    model.add_adapter("other", config("svft", target_modules=["op"], **fields))
    move(model).eval()
    names = ["default", "other", "__base__", "default"][: len(x)]
    mixed = model(x, adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                expected = model(x)[row]
        else:
            model.set_adapter(name)
            expected = model(x)[row]
        torch.testing.assert_close(mixed[row], expected, atol=2e-5, rtol=2e-5)
