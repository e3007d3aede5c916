"""BiP against its equations on explicit tensors, on a problem where magnitude is wrong, and with what it refuses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_lab.errors import ConfigError, DivergedError
from peft_lab.tuners.pruning import bip_masks, solve_bip


class Net(nn.Module):
    """Two layers, dropout between, and the mean square error as loss."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.drop, self.second = first, nn.Dropout(0.5), second

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        out = self.second(self.drop(self.first(x).tanh()).flatten(1))
        return SimpleNamespace(loss=None if labels is None else F.mse_loss(out, labels))


def _net(frozen: bool = True) -> Net:
    torch.manual_seed(0)
    return Net(nn.Linear(6, 8), nn.Linear(8, 3)).train().requires_grad_(not frozen)


def _layers(net: Net) -> dict[str, nn.Module]:
    return {"first": net.first, "second": net.second}


def _batches(count: int, rows: int = 5) -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(1)
    drawn = [torch.randn(rows, 9, generator=random) for _ in range(count)]
    return [{"x": values[:, :6], "labels": values[:, 6:]} for values in drawn]


# The equations ------------------------------------------------------------------------------------------------------


def _top(scores: list[Tensor], share: float, by_layer: bool) -> list[Tensor]:
    if by_layer:
        return [_top([score], share, False)[0] for score in scores]
    threshold = torch.cat([score.flatten() for score in scores]).quantile(share)
    return [(score > threshold).float() for score in scores]


def _reference(
    net: Net, batches: list[dict[str, Tensor]], steps: int, structured: bool
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """θ, s and m of BiP with α 0.05, β 0.2, γ 0.3, λ 0.1, and half of all pruned."""
    theta, biases = [net.first.weight.detach(), net.second.weight.detach()], [net.first.bias, net.second.bias]
    trained = biases[0].requires_grad

    def gradients(batch: dict[str, Tensor]) -> list[Tensor]:
        z = [(m * w).requires_grad_() for m, w in zip(masks, theta, strict=True)]
        b = [bias.detach().clone().requires_grad_() for bias in biases]
        F.mse_loss(F.linear(F.linear(batch["x"], z[0], b[0]).tanh(), z[1], b[1]), batch["labels"]).backward()
        return [value.grad for value in (*z, *b)]

    scores = [w.norm(dim=1, keepdim=True) if structured else w.abs() for w in theta]
    masks, scale = _top(scores, 0.5, structured), []
    for step in range(steps):
        g = gradients(batches[2 * step % len(batches)])
        theta = [theta[i] - 0.05 * (masks[i] * g[i] + 0.1 * theta[i]) for i in range(2)]
        if trained:
            biases = [biases[i] - 0.05 * g[2 + i] for i in range(2)]
        g = gradients(batches[(2 * step + 1) % len(batches)])
        upper = [(theta[i] - masks[i] * g[i] / 0.3) * g[i] for i in range(2)]
        upper = [value.sum(1, keepdim=True) for value in upper] if structured else upper
        if not scale:
            flat = lambda values: torch.cat([value.flatten() for value in values])  # noqa: E731
            ranked = [(0, 1), (1, 2)] if structured else [(0, 2), (0, 2)]
            scale = [flat(scores[i:j]).norm() / flat(upper[i:j]).norm() for i, j in ranked]
        scores = [scores[i] - 0.2 * scale[i] * upper[i] for i in range(2)]
        masks = _top(scores, 0.5, structured)
    return theta, scores, masks


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize(("count", "frozen"), [(12, True), (12, False), (3, True)])
def test_equals_the_equations_on_explicit_tensors(structured: bool, count: int, frozen: bool) -> None:
    net, batches = _net(frozen), _batches(count)
    rates = {"learning_rate": 0.05, "mask_learning_rate": 0.2, "penalty": 0.3, "weight_decay": 0.1}
    found = solve_bip(net, _layers(net), iter(batches), 0.5, structured=structured, steps=6, **rates)
    theta, scores, masks = _reference(net, batches, 6, structured)
    for i, name in enumerate(("first", "second")):
        torch.testing.assert_close(found.weights[name], theta[i].detach())
        torch.testing.assert_close(found.scores[name], scores[i].detach().view(found.scores[name].shape))
        assert torch.equal(found.masks[name], masks[i].bool().expand(theta[i].shape))
    before = solve_bip(net, _layers(net), batches, 0.5, structured=structured, steps=1, mask_learning_rate=1e-9)
    changed = {name: bool((mask != found.masks[name]).any()) for name, mask in before.masks.items()}
    assert any(changed.values())  # or the masks above would be those of magnitude


# What it finds ------------------------------------------------------------------------------------------------------


class Line(nn.Module):
    """One linear or convolution layer with the mean square error as loss."""

    def __init__(self, op: nn.Module) -> None:
        super().__init__()
        self.op = op

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        return SimpleNamespace(loss=F.mse_loss(self.op(x).flatten(1), labels.flatten(1)))


@pytest.mark.parametrize("family", ["linear", "conv1d"])
def test_small_weights_that_are_useful_are_found_where_magnitude_keeps_the_large_ones(family: str) -> None:
    """The answer depends on the first four inputs alone, whose weights are the smaller ones."""
    useful = torch.arange(8).lt(4)
    op = nn.Linear(8, 1, bias=False) if family == "linear" else Conv1D(1, 8)
    op.weight.data = torch.where(useful, 0.2, 0.3).view(op.weight.shape)
    random = torch.Generator().manual_seed(0)
    inputs = [torch.randn(64, 8, generator=random) for _ in range(30)]
    batches = [{"x": x, "labels": x[:, :4].sum(1, keepdim=True)} for x in inputs]
    by_magnitude = op.weight.abs().flatten() > 0.25
    assert not (by_magnitude & useful).any()
    found = bip_masks(Line(op), {"op": op}, batches, 0.5, steps=15)["op"]
    assert torch.equal(found.flatten(), useful)
    # with scores that hardly move it is magnitude
    still = bip_masks(Line(op), {"op": op}, batches, 0.5, steps=15, mask_learning_rate=1e-6)["op"]
    assert torch.equal(still.flatten(), by_magnitude)


def test_small_filters_that_are_useful_are_found() -> None:
    """Two filters of a convolution have what the answer needs; the answer of the others, larger ones, is zero."""
    torch.manual_seed(0)
    op = nn.Conv2d(2, 5, 3, bias=False)
    target = op.weight.detach().clone()
    with torch.no_grad():
        op.weight[:2] *= 0.5
        target[2:] = 0
    batches = [{"x": x, "labels": F.conv2d(x, target)} for x in torch.randn(20, 16, 2, 5, 5)]
    mask = bip_masks(Line(op), {"op": op}, batches, 0.6, structured=True, steps=10)["op"]
    assert mask.shape == op.weight.shape
    assert mask.flatten(1).all(1).tolist() == [True, True, False, False, False]
    assert not mask[2:].any()
    large = op.weight.flatten(1).norm(dim=1).argsort()[-2:]
    assert set(large.tolist()) != {0, 1}


@pytest.mark.parametrize("share", [0.1, 0.5, 0.85, 0.99])
def test_counts(share: float) -> None:
    net, batches = _net(), _batches(4)
    layers = _layers(net)
    sizes = {name: layer.weight.numel() for name, layer in layers.items()}
    whole = bip_masks(net, layers, batches, share, steps=2)
    assert sum(int((~mask).sum()) for mask in whole.values()) == round(share * sum(sizes.values()))
    by_layer = bip_masks(net, layers, batches, share, steps=2, by_layer=True)
    for name, mask in by_layer.items():
        assert int((~mask).sum()) == min(round(share * sizes[name]), sizes[name] - 1)
    if round(share * 3):
        by_filter = bip_masks(net, layers, batches, share, structured=True, steps=2)
        for mask in by_filter.values():
            pruned = min(round(share * len(mask)), len(mask) - 1)
            assert (~mask).all(1).sum() == pruned
            assert (~mask).any(1).sum() == pruned


@pytest.mark.parametrize("frozen", [True, False])
def test_the_model_is_as_before(frozen: bool) -> None:
    """Also after an error, and with modes that differ within the model."""
    net = _net(frozen)
    net.drop.eval()
    held = {name: (value.data_ptr(), value.clone(), value.requires_grad) for name, value in net.named_parameters()}
    batches = _batches(4)
    first = solve_bip(net, _layers(net), batches, 0.5, steps=3)
    with pytest.raises(DivergedError, match=r"loss of BiP is nan at step 2; give a smaller learning rate"):
        solve_bip(net, _layers(net), [*batches[:2], {**batches[2], "x": batches[2]["x"] * torch.nan}, batches[3]], 0.5)
    for name, value in net.named_parameters():
        assert (value.data_ptr(), value.requires_grad) == (held[name][0], held[name][2])
        assert torch.equal(value, held[name][1])
        assert value.grad is None
    assert net.training
    assert not net.drop.training
    # dropout, which is on in this mode, draws nothing
    torch.manual_seed(5)
    again = solve_bip(net, _layers(net), batches, 0.5, steps=3)
    assert all(torch.equal(first.scores[name], again.scores[name]) for name in first.scores)


def test_a_base_in_half_precision_keeps_its_bits() -> None:
    net, batches = _net().bfloat16(), _batches(4)
    before = net.first.weight.clone()
    halves = [{name: value.bfloat16() for name, value in batch.items()} for batch in batches]
    found = solve_bip(net, _layers(net), halves, 0.5, steps=2)
    assert torch.equal(net.first.weight.view(torch.int16), before.view(torch.int16))
    assert found.weights["first"].dtype == found.scores["first"].dtype == torch.float32
    assert not torch.equal(found.weights["first"], before.float())


# Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"share": 0.0}, "share=0.0 of what BiP prunes must be above 0 and below 1"),
        ({"share": 1.0}, "share=1.0"),
        ({"share": float("nan")}, "share=nan"),
        ({"steps": 0}, "steps=0 of BiP must be at least 1"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 of BiP must be above 0 and finite"),
        ({"mask_learning_rate": 0.0}, "mask_learning_rate=0.0"),
        ({"penalty": float("inf")}, "penalty=inf"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 of BiP must be at least 0 and finite"),
        ({"batches": 1}, "two batches, for weights and scores, and there are 1; give more rows"),
        ({"batches": 0}, "and there are 0"),
        ({"layers": []}, "no layers to prune; name some"),
        ({"layers": ["drop"]}, r'"drop" \(Dropout\) has no weight'),
        ({"layers": ["embedding"]}, 'cannot prune "embedding", a Embedding; it prunes Linear, Conv1D and Conv2d'),
        ({"layers": ["unused"]}, "The loss does not depend on the layers"),
        ({"layers": ["first", "tied"]}, '"first" and "tied" have one weight together'),
        ({"layers": ["normed"]}, 'weight of "normed" is computed from others'),
        ({"share": 0.01, "structured": True}, 'share=0.01 prunes none of 8 in "first"; give a larger share'),
        ({"unlabelled": True}, "needs batches with labels, and the model returned no loss"),
        ({"meta": True}, 'needs the values of "first", which are not loaded'),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], match: str) -> None:
    net = _net()
    net.tied, net.unused, net.embedding = nn.Linear(6, 8), nn.Linear(3, 2), nn.Embedding(3, 2)
    net.tied.weight = net.first.weight
    net.normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    batches = _batches(options.pop("batches", 4))
    if options.pop("unlabelled", False):
        batches = [{"x": batch["x"]} for batch in batches]
    if options.pop("meta", False):
        net.to("meta")
    layers = {name: net.get_submodule(name) for name in options.pop("layers", ["first", "second"])}
    with pytest.raises(ConfigError, match=match):
        bip_masks(net, layers, batches, options.pop("share", 0.5), **options)
