"""Weights of quantised modules: recognised and dequantised.

peft's quantisation backends know the libraries; all of peft-lab reads quantised weights through this module.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from peft_lab.backbones.sharded_weights import whole_shape
from peft_lab.errors import ConfigError

_LOG = logging.getLogger("peft_lab")
#: Values that share a scale in bitsandbytes' 4-bit weights.
_BLOCK = 64
#: Mark of a module that has been warned of.
_SEEN = "_peft_lab_wrong_scales"


def quantization(module: nn.Module) -> str:
    """Name of a module's quantisation ("nf4", "int8", "torchao-int8", ...), "" without one."""
    backend = _backend(module)
    if backend is None:
        return ""
    weight: Any = getattr(module, "weight", None)
    name = str(backend.backend_name)
    if name == "bnb 4bit":
        return str(weight.quant_type)
    if name == "bnb 8bit":
        return "int8"
    if name == "torchao":
        return f"torchao-{type(weight).__name__.removesuffix('Tensor').lower()}"
    return f"hqq-{module.meta['nbits']}bit" if name == "hqq" else name  # type: ignore[index]


def is_plain(tensor: Any) -> bool:
    """True for a tensor of plain floating-point values, which is neither packed nor a subclass."""
    return type(tensor) in (nn.Parameter, Tensor) and tensor.is_floating_point()


def stored_weight(module: nn.Module) -> Tensor | None:
    """Tensor that holds a module's weight: packed where it is quantised, and None if there is none."""
    own = getattr(module, "weight", None)
    if isinstance(own, Tensor):
        return own
    if _backend(module) is None:
        return None
    # Libraries without a `weight` keep packed integers first, then scales: HQQ, GPTQ, AWQ, AQLM.
    return next((tensor for tensor in (*module.parameters(False), *module.buffers(False))), None)


def dense_weight(module: nn.Module) -> Tensor:
    """Weight of a module as its values (out, in), float32 where it is quantised.

    Raises:
        ConfigError: the library of a quantised weight gives no values.
    """
    backend, weight = _backend(module), stored_weight(module)
    assert weight is not None, "a module with a weight"
    if backend is None:
        return weight
    keep_layout(module)
    try:
        with torch.no_grad():
            return backend.get_base_weight(module).detach().float()
    # peft's answer for libraries that cannot dequantise
    except (TypeError, NotImplementedError) as error:
        raise ConfigError(
            f"The values of a {type(module).__name__} ({quantization(module)}) cannot be read, because its library "
            "does not dequantise; load the backbone unquantised, or choose a method that does not read the weights."
        ) from error


def weight_shape(module: nn.Module) -> torch.Size:
    """Shape of a module's weight before it was packed."""
    if _backend(module) is not None:
        quantised: Any = module
        return torch.Size((quantised.out_features, quantised.in_features))
    weight = stored_weight(module)
    assert weight is not None, "a module with a weight"
    return whole_shape(weight)


def keep_layout(model: nn.Module) -> None:
    """Keep 4-bit weights of a model in the layout that training and dequantising need.

    On CPUs with AVX512-BF16, bitsandbytes packs such weights anew at the first forward in evaluation mode. What is
    dequantised then is wrong, and no gradient passes the module any more, so it is turned off, and undone where it has
    happened. Undoing keeps the scales in bfloat16, as packing has rounded them. Weights that bitsandbytes reads by
    wrong scales on a CPU (`has_wrong_scales`) are warned of.
    """
    wrong = []
    for path, module in model.named_modules():
        # Of bitsandbytes' 4-bit layers alone.
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        weight: Any = module.weight
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            module.state_dict()  # saving is what unpacks
        # said once, for the model may be looked at for each adapter
        if weight.device.type == "cpu" and has_wrong_scales(module) and _SEEN not in vars(module):
            wrong.append(path)
            vars(module)[_SEEN] = True
    if wrong:
        _LOG.warning(
            "bitsandbytes reads 4-bit weights by wrong scales on a CPU where the number of inputs is no multiple of "
            'the block of 64, as in "%s" (%d modules): the model is not what it is on a GPU. Leave them out with '
            "llm_int8_skip_modules.",
            wrong[0],
            len(wrong),
        )


def has_wrong_scales(linear: Any) -> bool:
    """True if bitsandbytes would read this layer's 4-bit weight by wrong scales on a CPU.

    As of 0.50 its kernel takes each row to begin a new block of scales, which the quantised weight does not.
    """
    return linear.in_features % _BLOCK != 0


def stored_parts(weight: Tensor) -> list[Tensor]:
    """Plain tensors that a weight consists of: itself, or the parts of a tensor subclass."""
    if type(weight) in (nn.Parameter, Tensor) or not hasattr(weight, "__tensor_flatten__"):
        return [weight]
    names, _ = weight.__tensor_flatten__()
    parts: list[Tensor] = []
    for name in names:
        parts += stored_parts(getattr(weight, name))
    return parts


def count_values(parameter: Tensor) -> int:
    """Number of values of a parameter, also where several are packed into one or it is sharded."""
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return (whole_shape(parameter) if shape is None else torch.Size(shape)).numel()


def dequantise(model: Any) -> list[str]:
    """Replace the quantised linear layers of a transformers model by plain ones of the same values.

    Returns:
        Paths of the replaced modules; their weights are float32.

    Raises:
        ConfigError: the library of one of them gives no values.
    """
    found = {path: module for path, module in model.named_modules() if _backend(module) is not None}
    for path, module in found.items():
        with torch.device("meta"):
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        plain.weight = nn.Parameter(dense_weight(module), requires_grad=False)
        if module.bias is not None:
            plain.bias = nn.Parameter(module.bias.detach().float(), requires_grad=False)
        model.set_submodule(path, plain.train(module.training))
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        # transformers would refuse to cast and write the model as a quantised one.
        for mark in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
            vars(model).pop(mark, None)
        quantizer.remove_quantization_config(model)
    return [*found]


def _backend(module: nn.Module) -> Any:
    """Quantisation backend of peft for a module, None for plain ones."""
    weight = getattr(module, "weight", None)
    # Plain tensors need no look into all the libraries that are installed, which peft would import.
    if weight is not None and is_plain(weight):
        return None
    own = [] if weight is not None else [*module._parameters.values(), *module._buffers.values()]
    if weight is None and all(tensor is None or is_plain(tensor) for tensor in own):
        return None
    from peft.utils import resolve_quantization_backend

    # torchao's backend takes a function for merging into the quantised weight, which peft-lab does not do.
    return resolve_quantization_backend(module, get_apply_tensor_subclass=_never)


def _never() -> None:
    raise NotImplementedError("Adapters are not merged into quantised weights.")
