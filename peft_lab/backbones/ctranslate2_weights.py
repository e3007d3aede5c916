"""Weights of Whisper in the file format of CTranslate2, under the names of transformers.

The format is a list of named arrays behind a short head; CTranslate2 itself is not needed.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from peft_lab.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

#: Version of the file format that is read here.
_VERSION = 6
#: Number of a dtype in the file -> dtype of numpy.
_DTYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}
#: Names of both formats: parts outside of the layers, and parts of one layer.
_OUTSIDE = {
    "encoder/conv1/weight": "model.encoder.conv1.weight",
    "encoder/conv1/bias": "model.encoder.conv1.bias",
    "encoder/conv2/weight": "model.encoder.conv2.weight",
    "encoder/conv2/bias": "model.encoder.conv2.bias",
    "encoder/position_encodings/encodings": "model.encoder.embed_positions.weight",
    "encoder/layer_norm/gamma": "model.encoder.layer_norm.weight",
    "encoder/layer_norm/beta": "model.encoder.layer_norm.bias",
    "decoder/embeddings/weight": "model.decoder.embed_tokens.weight",
    "decoder/position_encodings/encodings": "model.decoder.embed_positions.weight",
    "decoder/layer_norm/gamma": "model.decoder.layer_norm.weight",
    "decoder/layer_norm/beta": "model.decoder.layer_norm.bias",
}
_NORMS = {"self_attention": "self_attn_layer_norm", "attention": "encoder_attn_layer_norm", "ffn": "final_layer_norm"}
_ATTENTIONS = {"self_attention": "self_attn", "attention": "encoder_attn"}


def read_weights(path: Path) -> dict[str, Tensor]:
    """Arrays of a file of CTranslate2, by name.

    Raises:
        ConfigError: the file is of another version, or is cut off.
    """
    try:
        with path.open("rb") as file:
            return _read(file, path)
    except (struct.error, ValueError, UnicodeDecodeError) as error:
        raise ConfigError(f'"{path}" is no whole file of CTranslate2: {error}.') from error


def whisper_state(weights: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """State dict of `WhisperForConditionalGeneration`; projections that are one matrix there are taken apart."""
    state = {new: weights[old] for old, new in _OUTSIDE.items()}
    for stack in ("encoder", "decoder"):
        for layer in range(layers):
            state |= _layer(weights, f"{stack}/layer_{layer}", f"model.{stack}.layers.{layer}")
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    return state


def _layer(weights: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for part, norm in _NORMS.items():
        if f"{old}/{part}/layer_norm/gamma" in weights:
            found[f"{new}.{norm}.weight"] = weights[f"{old}/{part}/layer_norm/gamma"]
            found[f"{new}.{norm}.bias"] = weights[f"{old}/{part}/layer_norm/beta"]
    for index, name in enumerate(("fc1", "fc2")):
        found |= _linear(weights, f"{old}/ffn/linear_{index}", f"{new}.{name}")
    for part, name in _ATTENTIONS.items():
        if f"{old}/{part}/linear_0/weight" not in weights:
            continue
        # self-attention holds query, key and value in one matrix, cross-attention key and value
        fused = [("q_proj", "k_proj", "v_proj")] if part == "self_attention" else [("q_proj",), ("k_proj", "v_proj")]
        for index, projections in enumerate(fused):
            for kind in ("weight", "bias"):
                parts = weights[f"{old}/{part}/linear_{index}/{kind}"].chunk(len(projections))
                # Whisper's keys have no bias, and here one of zeros
                pairs = [pair for pair in zip(projections, parts, strict=True) if (pair[0], kind) != ("k_proj", "bias")]
                found |= {f"{new}.{name}.{projection}.{kind}": value for projection, value in pairs}
        found |= _linear(weights, f"{old}/{part}/linear_{len(fused)}", f"{new}.{name}.out_proj")
    return found


def _linear(weights: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {f"{new}.{kind}": weights[f"{old}/{kind}"] for kind in ("weight", "bias")}


def _read(file: BinaryIO, path: Path) -> dict[str, Any]:
    import numpy as np
    import torch

    version = _number(file, "<I")
    if version != _VERSION:
        raise ConfigError(
            f'"{path}" is a file of CTranslate2 of version {version}, and version {_VERSION} is read here.'
        )
    _text(file)  # the name of the architecture, and its revision
    _number(file, "<I")
    found: dict[str, Tensor] = {}
    for _ in range(_number(file, "<I")):
        name = _text(file)
        shape = [_number(file, "<I") for _ in range(_number(file, "<B"))]
        dtype, size = _number(file, "<B"), _number(file, "<I")
        values = np.frombuffer(file.read(size), dtype=_DTYPES[dtype]).reshape(shape)
        found[name] = torch.from_numpy(values.copy())
    return found


def _number(file: BinaryIO, form: str) -> int:
    return struct.unpack(form, file.read(struct.calcsize(form)))[0]


def _text(file: BinaryIO) -> str:
    # texts end with a zero, as in C
    return file.read(_number(file, "<H")).rstrip(b"\0").decode()
