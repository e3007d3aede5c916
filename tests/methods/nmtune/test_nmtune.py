"""NMTune: the transformed features and the loss by hand, views, the count, and where its terms hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from support.backbones import MODELS, tiny_inputs
from support.properties import adapt, adapter_parameters, assert_close, config, move, output
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from peft_lab.errors import ConfigError
from peft_lab.training.trainer import LabTrainer
from peft_lab.tuners import shifted

LABELS = torch.tensor([0, 2, 1, 2])


class Reference(nn.Module):
    """The method in modules of torch."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        v = {
            n.partition("nmtune_")[2].removesuffix(".default"): p.detach() for n, p in adapter_parameters(model).items()
        }
        width = len(v["scale"])
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.BatchNorm1d(4 * width), nn.ReLU(), nn.Linear(4 * width, width)
        )
        self.head, self.scale = nn.Linear(width, len(v["head"])), v["scale"]
        names = {"0.weight": "up", "0.bias": "up_bias", "1.weight": "norm", "1.bias": "norm_bias"}
        names |= {"3.weight": "down", "3.bias": "down_bias"}
        self.mlp.load_state_dict({name: v[own] for name, own in names.items()}, strict=False)
        self.head.load_state_dict({"weight": v["head"], "bias": v["head_bias"]})

    def z(self, f: Tensor) -> Tensor:
        return self.scale * self.mlp(f) + f

    def loss(self, w: Tensor, s: Tensor | None) -> Tensor:
        both = w if s is None else torch.cat([w, s])
        z, labels = self.z(both), LABELS if s is None else LABELS.repeat(2)
        of_s = z[-len(w) :]
        consistency = (of_s / of_s.norm(dim=1, keepdim=True) - w / w.norm(dim=1, keepdim=True)).square().mean()
        covariance = torch.cov(z.T)
        off = (covariance - covariance.diag().diag()).square().sum() / z.shape[1]
        sigma = torch.linalg.svd(z).S
        dominant = (sigma[:5] / sigma.sum()).mean()
        return F.cross_entropy(self.head(z), labels) + consistency + 0.04 * off - 0.001 * dominant


def images(base: Any) -> dict[str, Tensor]:
    return {**tiny_inputs(base, batch=4), "labels": LABELS}


@torch.no_grad()
def test_loss_and_running_statistics_of_a_training_step() -> None:
    base = MODELS["vit"]().eval()
    model, inputs = move(adapt("nmtune", base)).train(), images(base)
    reference = Reference(model).train()
    features = base.vit(inputs["pixel_values"]).last_hidden_state[:, 0]
    assert_close(model(**inputs).loss, reference.loss(features, None))
    del inputs["labels"]
    assert_close(output(model, inputs), reference.eval().head(reference.z(features)))


@torch.no_grad()
def test_two_views_of_shifted_images(monkeypatch: pytest.MonkeyPatch) -> None:
    base = MODELS["vit"]().eval()
    model, inputs = move(adapt("nmtune", base, second_view="shift")).train(), images(base)
    reference = Reference(model).train()
    torch.manual_seed(3)
    other = shifted(inputs["pixel_values"])
    assert not torch.equal(other, inputs["pixel_values"])
    w, s = (base.vit(pixels).last_hidden_state[:, 0] for pixels in (inputs["pixel_values"], other))
    torch.manual_seed(3)
    assert_close(model(**inputs).loss, reference.loss(w, s))


def test_two_views_by_dropout_differ_and_leave_the_backbone_without_gradient() -> None:
    base = MODELS["bert"]()
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    model = move(adapt("nmtune", base, preset="dropout_views")).train()
    inputs = {**tiny_inputs(base, batch=4), "labels": LABELS}
    losses = [model(**inputs).loss for _ in range(2)]
    assert losses[0] != losses[1]
    losses[0].backward()
    assert all(p.grad is not None for p in adapter_parameters(model).values())
    assert all(p.grad is None for n, p in model.named_parameters() if "nmtune" not in n)


def test_count() -> None:
    with torch.device("meta"):
        base = ViTForImageClassification(ViTConfig(num_labels=100))
    model = get_peft_model(base, config("nmtune", base))
    expected = 8 * 768**2 + 14 * 768 + 100 * 769
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


def test_running_statistics_are_saved(tmp_path: Path) -> None:
    base = MODELS["resnet"]()
    model = move(adapt("nmtune", base)).train()
    inputs = images(base)
    model(**inputs).loss.backward()
    model.save_pretrained(tmp_path)
    del inputs["labels"]
    assert torch.equal(output(PeftModel.from_pretrained(MODELS["resnet"](), tmp_path), inputs), output(model, inputs))


def _arguments(tmp_path: Path, **changes: Any) -> TrainingArguments:
    return TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, **changes)


@pytest.mark.parametrize("cls", [Trainer, LabTrainer])
@pytest.mark.parametrize("family", ["bert", "vit"])
def test_the_terms_hold_in_a_trainer_and_in_its_accumulation_steps(cls: Any, family: str, tmp_path: Path) -> None:
    """A ViT divides its loss by the items of all batches of a step, BERT does not: the terms follow the loss."""
    base = MODELS[family]()
    model = move(adapt("nmtune", base)).train()
    trainer = cls(model, _arguments(tmp_path))
    inputs = {**tiny_inputs(base, batch=4), "labels": LABELS}
    own = model(**{**inputs, "labels": LABELS}).loss
    assert_close(trainer.compute_loss(model, dict(inputs)), own)
    if family == "vit":
        assert_close(trainer.compute_loss(model, dict(inputs), num_items_in_batch=torch.tensor(8)), own / 2)
    model.eval()
    logits = model(**inputs).logits
    assert_close(trainer.compute_loss(model, dict(inputs)), F.cross_entropy(logits, LABELS))


def test_a_loss_outside_of_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="label_smoothing_factor"):
        LabTrainer(adapt("nmtune", MODELS["vit"]()), _arguments(tmp_path, label_smoothing_factor=0.1))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"second_view": "flip"}, "must be one of"),
        ({"second_view": "dropout"}, "backbone_eval=False"),
        ({"covariance_weight": -1.0}, "at least 0"),
    ],
)
def test_fields_out_of_range_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config("nmtune", **fields)


def test_shifted_texts_are_refused() -> None:
    model, inputs = (
        adapt("nmtune", MODELS["bert"](), second_view="shift").train(),
        tiny_inputs(MODELS["bert"](), batch=4),
    )
    with pytest.raises(ConfigError, match="is for images"):
        model(**inputs, labels=LABELS)
