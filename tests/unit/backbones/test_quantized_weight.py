"""Quantised modules whose library gives no values, as those of GPTQ and AWQ, by peft's own backend for these."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from support.properties import assert_close, config, move
from torch import Tensor, nn

from peft_lab.backbones.quantized_weight import dequantise, quantization, stored_weight, weight_shape
from peft_lab.errors import AdapterMismatchError, ConfigError


class Packed(nn.Module):
    """Linear layer with eight 4-bit values in an integer, in the shape of GPTQ's."""

    in_features, out_features, bias = 16, 12, None

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.register_buffer("qweight", torch.randint(-(2**31), 2**31 - 1, (2, 12), generator=random).int())

    def forward(self, x: Tensor) -> Tensor:
        parts = [(self.qweight >> (4 * place)) & 15 for place in range(8)]
        return x @ (0.05 * (torch.cat(parts).float() - 7.5))


class Model(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.first, self.packed = nn.Linear(4, 16), Packed(seed)

    def forward(self, x: Tensor) -> Tensor:
        return self.packed(self.first(x))


@pytest.fixture(autouse=True)
def gptq(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let peft know the module of this file as it knows GPTQ's."""

    def resolve(module: nn.Module, **kwargs: Any) -> Any:
        return ForwardOnlyQuantizationBackend("gptq") if isinstance(module, Packed) else None

    monkeypatch.setattr("peft.utils.resolve_quantization_backend", resolve)


def make(seed: int = 0) -> Model:
    torch.manual_seed(0)
    return Model(seed)


def test_module_is_described_without_its_values() -> None:
    module = make().packed
    assert quantization(module) == "gptq"
    assert stored_weight(module) is module.qweight
    assert weight_shape(module) == (12, 16)
    with pytest.raises(ConfigError, match="does not dequantise"):
        dequantise(make())


def test_adapter_behind_it_is_trained_saved_and_reloaded(tmp_path: Path) -> None:
    x, base = torch.randn(3, 4), make()
    before = base(x)
    model = move(get_peft_model(base, config("ssf", target_modules=["packed"])))
    layer: Any = model.base_model.model.packed
    assert (layer.in_features, layer.out_features, layer.op.op_type) == (16, 12, "linear")
    trained = model(x)
    assert_close(trained, before * layer.ssf_scale["default"] + layer.ssf_shift["default"])
    trained.sum().backward()
    assert bool(layer.ssf_scale["default"].grad.any())
    model.save_pretrained(tmp_path)
    assert_close(PeftModel.from_pretrained(make(), tmp_path)(x), trained)
    with pytest.raises(AdapterMismatchError, match="sha256"):
        PeftModel.from_pretrained(make(seed=1), tmp_path)
    with pytest.raises(ConfigError, match="quantised"):
        model.merge_and_unload()
    assert_close(model.unload()(x), before)


def test_method_that_reads_the_values_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not dequantise"):
        get_peft_model(make(), config("svfit", target_modules=["packed"]))
