"""Single operations of every type, each in a model of its own, with inputs for them."""

from __future__ import annotations

import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D


class One(nn.Module):
    """A model of one op, so that peft can put an adapter on `op`."""

    def __init__(self, op: nn.Module) -> None:
        super().__init__()
        self.op = op

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.op(x)


def _batch_norm() -> nn.Module:
    norm = nn.BatchNorm2d(6)
    norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    return norm


FEATURES, IMAGE, TOKENS = torch.Size((4, 5, 6)), torch.Size((4, 6, 7, 7)), torch.Size((4, 5))
#: name -> (kind, factory, input shape); None as input means token ids.
OPS = {
    "linear": ("linear", lambda: nn.Linear(6, 10), FEATURES),
    "linear without bias": ("linear", lambda: nn.Linear(6, 3, bias=False), FEATURES),
    "linear on vectors": ("linear", lambda: nn.Linear(6, 6), torch.Size((4, 6))),
    "conv1d": ("conv1d", lambda: Conv1D(10, 6), FEATURES),
    "conv2d": ("conv2d", lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1), IMAGE),
    "conv2d without bias": ("conv2d", lambda: nn.Conv2d(6, 4, 2, bias=False, dilation=2), IMAGE),
    "pointwise": ("conv2d", lambda: nn.Conv2d(6, 8, 1), IMAGE),
    "grouped": ("conv2d", lambda: nn.Conv2d(6, 9, 3, groups=3, padding=1, padding_mode="reflect"), IMAGE),
    "depthwise": ("conv2d", lambda: nn.Conv2d(6, 6, 3, groups=6, padding="same"), IMAGE),
    "embedding": ("embedding", lambda: nn.Embedding(11, 6, padding_idx=0), TOKENS),
    "layer norm": ("norm", lambda: nn.LayerNorm(6), FEATURES),
    "layer norm without bias": ("norm", lambda: nn.LayerNorm(6, bias=False), FEATURES),
    "batch norm": ("norm", _batch_norm, IMAGE),
    "llama norm": ("norm", lambda: LlamaRMSNorm(6), FEATURES),
    "gemma norm": ("norm", lambda: GemmaRMSNorm(6), FEATURES),
}


def make(op: str) -> tuple[One, torch.Tensor]:
    torch.manual_seed(0)
    _, factory, shape = OPS[op]
    model = One(factory()).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.3 if parameter.dim() > 1 else 1.0, 0.5)
    x = torch.randint(0, 11, shape) if op == "embedding" else torch.randn(shape)
    return model, x
