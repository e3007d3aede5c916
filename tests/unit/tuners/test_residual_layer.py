"""Branches on the residual stream: the formula at pre-norm and post-norm blocks, checkpointing, mixed batches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model
from support.backbones import MODELS, TINY, tiny_inputs
from support.fixture_methods import load
from support.properties import adapter_parameters, assert_close, move, output
from torch import Tensor
from torch.nn.functional import linear, relu

from peft_lab.errors import ConfigError

Config = load("parallel_bottleneck").ParallelBottleneckConfig
Layer = load("parallel_bottleneck").ParallelBottleneckLayer
FAMILIES = ["vit", "dinov2", "clip", "swin", "bert", "roberta", "distilbert", "mpnet", "albert", "bart", "gpt2"]
FAMILIES += ["llama", "gemma2", "phi", "t5", "whisper", "modernbert"]


def branched(family: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    return move(get_peft_model(MODELS[family](), Config(**fields))).eval()


class Reference(torch.nn.Module):
    """What reads the stream of one block by itself: a module's input or output, and adds the branch to another's."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.down = layer.parallel_bottleneck_down["default"].detach()
        self.bias = layer.parallel_bottleneck_bias["default"].detach()
        self.up = layer.parallel_bottleneck_up["default"].detach()

    def forward(self, stream: Tensor) -> Tensor:
        return 0.1 * linear(relu(linear(stream, self.down, self.bias)), self.up)


@torch.no_grad()
def test_post_norm_formula() -> None:
    """BERT: LayerNorm(x + mlp(x) + branch(x)) with x behind the norm of attention."""
    model, inputs = branched("bert"), tiny_inputs(TINY["bert"]())
    layers = [m for m in model.modules() if isinstance(m, Layer)]
    base = MODELS["bert"]().eval()
    for block, layer in zip(base.bert.encoder.layer, layers, strict=True):
        branch, kept = Reference(layer), []
        block.attention.output.LayerNorm.register_forward_hook(lambda m, a, out, kept=kept: kept.append(out))
        block.output.dropout.register_forward_hook(lambda m, a, out, kept=kept, branch=branch: out + branch(kept.pop()))
    assert_close(output(model, inputs), output(base, inputs))


@torch.no_grad()
def test_pre_norm_formula() -> None:
    """ViT: x + mlp(norm(x)) + branch(x)."""
    model, inputs = branched("vit"), tiny_inputs(TINY["vit"]())
    layers = [m for m in model.modules() if isinstance(m, Layer)]
    base = MODELS["vit"]().eval()
    for block, layer in zip(base.vit.layers, layers, strict=True):
        branch, kept = Reference(layer), []
        block.layernorm_after.register_forward_pre_hook(lambda m, args, kept=kept: kept.append(args[0]))
        block.mlp.register_forward_hook(lambda m, a, out, kept=kept, branch=branch: out + branch(kept.pop()))
    assert_close(output(model, inputs), output(base, inputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_acts_and_starts_at_the_base(family: str) -> None:
    base, inputs = MODELS[family]().eval(), tiny_inputs(MODELS[family]())
    model = get_peft_model(copy.deepcopy(base), Config()).eval()
    expected = output(base, inputs)
    assert torch.equal(output(model, inputs), expected)
    assert not torch.allclose(output(move(model), inputs), expected, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(output(model, inputs), expected)
    assert torch.equal(output(model.unload(), inputs), expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["bert", "vit", "llama"])
def test_checkpointed_gradients_are_the_same(family: str, reentrant: bool) -> None:
    """Two forwards with other adapters before one backward."""
    model, inputs = branched(family).train(), tiny_inputs(MODELS[family]())
    model.add_adapter("other", Config(bottleneck=3))
    move(model, "other", seed=4)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        outs = []
        for name in ("default", "other"):
            model.set_adapter(name)
            outs.append(model(**inputs).logits.square().sum())
        model.base_model.set_requires_grad(["default", "other"])
        sum(outs).backward()
        parameters = {**adapter_parameters(model), **adapter_parameters(model, "other")}
        return [p.grad.clone() for p in parameters.values() if p.grad is not None]

    expected = gradients()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = gradients()
    assert len(found) == len(expected) > 0
    for got, wanted in zip(found, expected, strict=True):
        assert_close(got, wanted, 1e-4)


@pytest.mark.parametrize("family", ["bert", "vit", "swin"])
def test_mixed_batch(family: str) -> None:
    model, inputs = branched(family), tiny_inputs(MODELS[family](), batch=3)
    model.add_adapter("other", Config(bottleneck=3))
    move(model, "other", seed=4)
    got = output(model, inputs, adapter_names=["other", "__base__", "default"])
    assert_close(got[2], output(model, inputs)[2])
    model.set_adapter("other")
    assert_close(got[0], output(model, inputs)[0])
    with model.disable_adapter():
        assert_close(got[1], output(model, inputs)[1])


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no place for its branch beside mlp of ConvNextLayer"):
        get_peft_model(MODELS["convnext"](), Config())
    block = next(m for m in branched("bert").modules() if isinstance(m, Layer))
    with pytest.raises(ConfigError, match="called without its backbone"):
        block(torch.zeros(1, 3, 16))


def test_generate_runs_the_encoder_alone() -> None:
    model, ids = branched("t5"), torch.tensor([[5, 6, 7], [8, 9, 10]])
    settings = {"max_new_tokens": 3, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    written = model.generate(input_ids=ids, **settings)
    start = written.sequences[:, :1]
    assert_close(written.scores[0], model(input_ids=ids, decoder_input_ids=start).logits[:, -1])
    with model.disable_adapter():
        without = model.generate(input_ids=ids, **settings)
    assert not torch.allclose(written.scores[0], without.scores[0], atol=1e-4)
