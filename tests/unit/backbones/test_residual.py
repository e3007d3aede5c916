"""Residual connections of the families against the tensors that flow in tiny models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from support.backbones import _GROUPED, _IMAGE, _TEXT, EXPERTS, MODELS, WAVEFORM, _build, tiny_inputs
from torch import Tensor, nn

from peft_lab.backbones.family import Family, ResidualConnection
from peft_lab.backbones.family_table import FAMILIES
from peft_lab.backbones.module_roles import modules_by_role
from peft_lab.backbones.residual_stream import residual_connections

#: Families of the table, or settings of one, that the tiny models of other tests do not have.
FURTHER: dict[str, tuple[str, dict[str, Any]]] = {
    "ijepa": ("IJepaForImageClassification", _IMAGE),
    "vit_scaled": ("Dinov2ForImageClassification", {**_IMAGE, "drop_path_rate": 0.1}),
    "ernie": ("ErnieForSequenceClassification", _TEXT),
    "data2vec-text": ("Data2VecTextForSequenceClassification", _TEXT),
    "hubert": ("HubertForSequenceClassification", WAVEFORM),
    "unispeech": ("UniSpeechForSequenceClassification", WAVEFORM),
    "unispeech-sat": ("UniSpeechSatForSequenceClassification", {**WAVEFORM, "do_stable_layer_norm": True}),
    "data2vec-audio": ("Data2VecAudioForSequenceClassification", WAVEFORM),
    "wavlm": ("WavLMForSequenceClassification", WAVEFORM),
    "ministral": ("MinistralForCausalLM", _GROUPED),
    "smollm3": ("SmolLM3ForCausalLM", _GROUPED),
    "granite": ("GraniteForCausalLM", {**_GROUPED, "residual_multiplier": 0.5}),
    "olmo": ("OlmoForCausalLM", {**_TEXT, "num_key_value_heads": 1}),
    "olmo2": ("Olmo2ForCausalLM", {**_TEXT, "num_key_value_heads": 1}),
    "seed_oss": ("SeedOssForCausalLM", _GROUPED),
    "opt_post_norm": (
        "OPTForCausalLM",
        {**_TEXT, "ffn_dim": 32, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
}
#: Blocks whose sub-layers run side by side on one norm.
PARALLEL = ("phi",)
CONVOLUTIONAL = ("resnet", "efficientnet", "mobilenet_v2")


class Recorder:
    """First input and output of every module of a block, in the order of the calls."""

    def __init__(self, block: nn.Module) -> None:
        self.calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for name, module in block.named_modules():
            module.register_forward_hook(self._hook(name), with_kwargs=True)

    def _hook(self, name: str) -> Any:
        def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = args[0] if args else kwargs.get("hidden_states")
            made = output[0] if isinstance(output, tuple) else output
            # ALBERT runs one block several times: the first run counts.
            if "" not in self.calls and isinstance(given, Tensor) and isinstance(made, Tensor):
                self.calls.setdefault(name, []).append((given.detach().clone(), made.detach().clone()))

        return record

    def output(self, connections: tuple[ResidualConnection, ...], index: int) -> Tensor:
        """The summand of a sub-layer: each call of a shared module belongs to the next sub-layer."""
        calls = self.calls[connections[index].output]
        shared = [c.output for c in connections].count(connections[index].output) > 1
        if not shared:
            return calls[-1][1]  # Swin's dropout also runs behind attention, before the MLP
        return calls[[c.output for c in connections[:index]].count(connections[index].output)][1]


def _family(model: Any, path: str) -> tuple[Family, Any]:
    """Family and config of the innermost known model around a block."""
    parts = path.split(".")
    around = [model.get_submodule(".".join(parts[:i])) for i in range(len(parts))]
    known = [m for m in around if getattr(getattr(m, "config", None), "model_type", None) in FAMILIES]
    return FAMILIES[known[-1].config.model_type], known[-1].config


def _model(name: str) -> Any:
    if name in MODELS or name in EXPERTS:
        return (MODELS | EXPERTS)[name]()
    cls, settings = FURTHER[name]
    return _build(getattr(hf, cls), **settings)


@pytest.mark.parametrize("name", [*MODELS, *FURTHER, *EXPERTS])
@torch.no_grad()
def test_stream_plus_output_is_what_comes_next(name: str) -> None:
    """Behind each sub-layer, the next norm or the block's output gets the stream with the summand."""
    model = _model(name)
    blocks = modules_by_role(model, "block")
    recorders = {path: Recorder(model.get_submodule(path)) for path in blocks}
    model(**tiny_inputs(model))
    for path, recorder in recorders.items():
        family, config = _family(model, path)
        connections = residual_connections(family, model.get_submodule(path), config)
        if family.name in CONVOLUTIONAL:
            assert not connections
            continue
        assert {c.sub_layer for c in connections} >= ({"mlp"} if "convnext" in name else {"attention", "mlp"})
        scale = getattr(config, family.residual_multiplier) if family.residual_multiplier else 1.0
        stream, result = recorder.calls[""][0]
        if family.name in PARALLEL:
            added = [recorder.output(connections, index) for index in range(len(connections))]
            torch.testing.assert_close(stream + sum(added), result)
            continue
        for index, connection in enumerate(connections):
            if connection.norm_before:
                read = recorder.calls[connection.norm_before][0][0]
                torch.testing.assert_close(read.reshape(stream.shape), stream)
            summed = stream + scale * recorder.output(connections, index).reshape(stream.shape)
            if connection.norm_after:
                given, stream = recorder.calls[connection.norm_after][0]
                torch.testing.assert_close(given.reshape(summed.shape), summed)
                stream = stream.reshape(summed.shape)
            else:
                stream = summed
        torch.testing.assert_close(stream, result)


def test_every_family_declares_its_residual_connections() -> None:
    without = {name for name, family in FAMILIES.items() if not family.residual}
    assert without == set(CONVOLUTIONAL)
