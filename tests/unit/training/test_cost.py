"""The meters against small steps whose cost is known by hand."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peft_lab.training.step_cost import (
    count_flops,
    floor,
    frozen_floor,
    kept_activations,
    measure_step,
    peak_memory,
)

TOKENS, WIDTH = 64, 32
ACTIVATION = 4 * TOKENS * WIDTH


def mlp(layers: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(part for _ in range(layers) for part in (nn.Linear(WIDTH, WIDTH), nn.GELU())))


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(TOKENS, WIDTH)


def test_flops_of_a_step_are_those_of_its_products(inputs: Tensor) -> None:
    product = 2 * TOKENS * WIDTH * WIDTH
    model = mlp(3)
    assert measure_step(model, inputs, repeats=1).flops == product * (3 + 2 + 3)  # the input itself needs no gradient
    assert floor(model, inputs, repeats=1).flops == product * (3 + 2)
    model[:4].requires_grad_(False)
    assert measure_step(model, inputs, repeats=1).flops == product * (3 + 1)


def test_saved_bytes_are_counted_once_per_storage(inputs: Tensor) -> None:
    model = mlp(1)
    cost = measure_step(model, inputs, lambda out: out.sum(), repeats=1)
    assert cost.saved_bytes == ACTIVATION  # GELU's input; the batch and the weights are not autograd's to keep
    shared = nn.Sequential(nn.Linear(WIDTH, WIDTH), Shared())
    assert measure_step(shared, inputs, lambda out: out.sum(), repeats=1).saved_bytes == ACTIVATION


class Shared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x) + torch.sin(x[:, :4]).sum() * 0 + x * x.T.T


@dataclass
class Bases:
    u: Tensor


@pytest.mark.parametrize("holder", ["buffer", "plain", "list", "dict", "dataclass", "frozen parameter"])
def test_tensors_the_model_holds_are_not_activations(holder: str, inputs: Tensor) -> None:
    value = torch.randn(WIDTH, WIDTH)

    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            if holder == "buffer":
                self.register_buffer("u", value)
            elif holder == "frozen parameter":
                self.u = nn.Parameter(value, requires_grad=False)
            else:
                self.u = {"plain": value, "list": [value], "dict": {"a": [value]}, "dataclass": Bases(value)}[holder]

        def forward(self, x: Tensor) -> Tensor:
            return x @ value.T

    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Frozen())
    assert measure_step(model, inputs, lambda out: out.sum(), repeats=1).saved_bytes == 0


def test_only_what_is_still_kept_counts(inputs: Tensor) -> None:
    model = mlp(4)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.model[2:], self.model[:2](x), use_reentrant=True)

    whole = measure_step(model, inputs, lambda out: out.sum(), repeats=1)
    less = measure_step(Checkpointed(), inputs, lambda out: out.sum(), repeats=1)
    assert less.saved_bytes == 2 * ACTIVATION  # the first GELU's input and the checkpoint's
    assert less.saved_bytes < whole.saved_bytes
    assert less.flops > whole.flops


def test_meta_tensors_have_sizes(inputs: Tensor) -> None:
    with torch.device("meta"):
        model, batch = mlp(2), torch.empty(TOKENS, WIDTH)
    with kept_activations(model, batch) as kept:
        loss = model(batch).sum()
        assert kept.bytes() == 3 * ACTIVATION  # two GELU inputs, one Linear input
    del loss
    assert count_flops(lambda: model(batch).sum().backward()) == 2 * TOKENS * WIDTH * WIDTH * 5


def test_attention_counts_forward_and_backward() -> None:
    query = torch.randn(2, 3, 16, 8, requires_grad=True)
    product = 2 * 2 * 3 * 16 * 16 * 8
    forward = count_flops(lambda: F.scaled_dot_product_attention(query.detach(), query.detach(), query.detach()))
    both = count_flops(lambda: F.scaled_dot_product_attention(query, query, query).sum().backward())
    assert forward == 2 * product
    assert both >= (2 + 4) * product


@pytest.mark.parametrize(("kind", "groups"), [(nn.Conv2d, 1), (nn.Conv2d, 4), (nn.ConvTranspose2d, 1)])
def test_convolutions_cost_the_same_three_times(kind: type[nn.Conv2d], groups: int) -> None:
    conv = kind(8, 12, 3, stride=2, groups=groups, bias=False)
    x = torch.randn(5, 8, 9, 9)
    forward = count_flops(lambda: conv(x))
    positions = 5 * (16 if kind is nn.Conv2d else 81)
    assert forward == 2 * positions * 9 * 8 * 12 // groups
    assert count_flops(lambda: conv(x).sum().backward()) == 2 * forward
    assert count_flops(lambda: conv(x.requires_grad_()).sum().backward()) == 3 * forward
    conv.requires_grad_(False)
    assert count_flops(lambda: conv(x).sum().backward()) == 2 * forward


def test_peak_memory_sees_what_is_freed_again() -> None:
    def run() -> None:
        for _ in range(3):
            torch.empty(1 << 20, dtype=torch.uint8).zero_()

    assert 1 << 20 <= peak_memory(run) < 2 << 20


def test_floor_reaches_the_first_layer_and_restores(inputs: Tensor) -> None:
    model = mlp(3)
    model[2].requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with frozen_floor(model):
        out = model(inputs)
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert out.requires_grad
        out.sum().backward()
    assert before == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert not model(inputs).detach().requires_grad
    assert not any(module._forward_hooks for module in model.modules())


def test_a_step_leaves_no_gradients_and_moves_only_by_the_optimiser(inputs: Tensor) -> None:
    model = mlp(2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measure_step(model, inputs, repeats=1)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    optimizer = torch.optim.AdamW(model.parameters())
    with_optimizer = measure_step(model, inputs, optimizer=optimizer, repeats=1)
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert with_optimizer.peak_bytes > 0


@pytest.mark.parametrize("as_", ["tensor", "tuple", "mapping"])
def test_inputs_and_losses(as_: str, inputs: Tensor) -> None:
    class Output(dict):
        loss: Tensor

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, 1)

        def forward(self, x: Tensor) -> Output:
            out = Output()
            out.loss = self.linear(x).mean()
            return out

    given = {"tensor": inputs, "tuple": (inputs,), "mapping": {"x": inputs}}[as_]
    assert measure_step(Model(), given, repeats=1).flops == 2 * 2 * TOKENS * WIDTH
