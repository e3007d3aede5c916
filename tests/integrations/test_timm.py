"""Backbones of timm, through the wrapper of transformers.

timm needs a torchvision that goes with the installed torch; where it cannot be imported these tests are skipped.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

try:
    import timm  # noqa: F401
except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision was built for another torch
    pytest.skip(f"timm cannot be imported: {str(error).splitlines()[0]}", allow_module_level=True)

import torch
from peft import PeftModel, get_peft_model
from support.properties import SEQUENCE
from support.tiny_runs import options
from torch import Tensor

import peft_lab
from peft_lab import registry
from peft_lab.backbones import module_roles
from peft_lab.errors import AdapterMismatchError, ConfigError
from peft_lab.tuners.registration import make_config

METHODS = ("lora", "ssf", "svfit")
_VIT = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2}
_SWIN = {"img_size": 32, "embed_dim": 12, "depths": (1, 2), "num_heads": (1, 2), "window_size": 4}
#: Architecture -> its settings, the task head, and leaf names of what SVFit adapts by default.
MODELS: dict[str, tuple[dict[str, Any], list[str], set[str]]] = {
    "vit_tiny_patch16_224": (_VIT, ["timm_model.head"], {"qkv"}),
    "deit_tiny_distilled_patch16_224": (_VIT, ["timm_model.head", "timm_model.head_dist"], {"qkv"}),
    "swin_tiny_patch4_window7_224": (_SWIN, ["timm_model.head.fc"], {"qkv", "proj", "fc1", "fc2", "reduction"}),
    "convnext_atto": ({"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}, ["timm_model.head.fc"], {"fc1", "fc2", "1"}),
}


def build(architecture: str) -> tuple[Any, dict[str, Tensor]]:
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    torch.manual_seed(0)
    config = TimmWrapperConfig(architecture=architecture, num_labels=3, model_args=MODELS[architecture][0])
    model = TimmWrapperForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model, {"pixel_values": torch.randn(2, 3, 32, 32)}


@torch.no_grad()
def output(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model.eval()(**inputs).logits


@pytest.mark.integration(
    library="timm", use="`TimmWrapperForImageClassification`: default targets, a step, save, reload"
)
@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_train_save_and_reload(method: str, architecture: str, tmp_path: Path) -> None:
    base, inputs = build(architecture)
    heads, adapted = MODELS[architecture][1:]
    assert module_roles.head_modules(base) == heads
    start = output(base, inputs)
    model = get_peft_model(copy.deepcopy(base), make_config(method, {}, model=base))
    assert sorted(model.peft_config["default"].modules_to_save) == heads
    if registry.method(method).can("identity_start"):
        assert torch.equal(output(model, inputs), start)
    if method == "svfit":
        assert {path.rpartition(".")[2] for path in model.peft_config["default"].recorded_fingerprints} == adapted
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train()(**inputs, labels=torch.tensor([0, 1])).loss.backward()
    # The head of distillation answers in training mode alone.
    assert sum(parameter.grad is None for parameter in trained) <= 2 * (len(heads) - 1)
    torch.optim.SGD(trained, lr=0.1).step()
    moved = output(model, inputs)
    assert not torch.equal(moved, start)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(peft_lab.load_adapter(copy.deepcopy(base), tmp_path), inputs), moved)
    if method != "lora":
        with torch.no_grad():
            for parameter in base.timm_model.parameters():
                parameter.add_(1)
        with pytest.raises(AdapterMismatchError, match="differs from the one the adapter was trained on"):
            PeftModel.from_pretrained(base, tmp_path)


@pytest.mark.integration(library="timm", use="`TimmWrapperForImageClassification`: prompts in the sequence")
@pytest.mark.parametrize("method", SEQUENCE)
def test_prompts_are_refused(method: str, refused: Callable[[str], None]) -> None:
    base, _ = build("vit_tiny_patch16_224")
    with pytest.raises(ConfigError, match="no stack of transformer blocks with hidden_size"):
        get_peft_model(base, make_config(method, {}, model=base))
    refused("its config does not describe the blocks")


@pytest.mark.integration(library="timm", use="`peft_lab.train`, `evaluate`, `merge` on a checkpoint of timm")
@pytest.mark.parametrize("method", METHODS)
def test_train_by_a_task(method: str, tmp_path: Path) -> None:
    base, _ = build("vit_tiny_patch16_224")
    base.config.pretrained_cfg = {
        **{"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3},
        **{"interpolation": "bicubic", "crop_pct": 1.0},
    }
    base.save_pretrained(tmp_path / "base")
    few = {"max_train_samples": 8, "max_eval_samples": 8, "max_test_samples": 8}
    run = options("local-cifar10-small", tmp_path / "base", tmp_path / "run", method=method, max_steps=1, **few)
    trained = peft_lab.train(run)
    again = peft_lab.evaluate(tmp_path / "run", split="test", max_samples=8)
    assert again["loss"] == pytest.approx(trained.metrics["metrics"]["test"]["loss"])
    # A shift of SSF becomes a bias, which timm's layers all have here.
    peft_lab.merge(tmp_path / "run", tmp_path / "merged")
