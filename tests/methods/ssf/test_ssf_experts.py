"""SSF on stacked weights of experts: a scale behind each expert's own op."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_lab import SSFConfig


class Experts(nn.Module):
    """Three experts, each a linear layer, in one of the two layouts that transformers knows."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.num_experts, self.is_transposed = 3, transposed
        self.up_proj = nn.Parameter(torch.randn(3, 4, 5) if transposed else torch.randn(3, 5, 4))

    def forward(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        weight = self.up_proj if self.is_transposed else self.up_proj.mT
        return torch.einsum("ni,nio->no", x, weight[chosen])


class One(nn.Module):
    """A model that holds experts."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.experts = Experts(transposed)

    def forward(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        return self.experts(x, chosen)


@pytest.mark.parametrize("transposed", [False, True])
def test_an_output_channel_of_an_expert_is_scaled(transposed):
    torch.manual_seed(0)
    base = One(transposed)
    x, chosen = torch.randn(7, 4), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    before = base(x, chosen).detach()
    model = get_peft_model(base, SSFConfig(target_parameters=["experts.up_proj"], target_modules=[]))
    (scale,) = [p for p in model.parameters() if p.requires_grad]
    assert scale.shape == (3, 5)
    torch.testing.assert_close(model(x, chosen), before * scale[chosen])
