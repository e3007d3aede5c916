"""What the property tests share: the registered methods, ways to move an adapter off its start, model outputs."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from peft_lab import read_training_data, registry
from peft_lab.tuners import AdapterLayer, HeadLayer
from peft_lab.tuners.estimators import EstimatorHead
from peft_lab.tuners.registration import has_trait, make_config, newer_peft_needed
from support.backbones import tiny_inputs
from support.cover import Needs, cover, each_family

#: For tests of transformers' own `add_adapter`, which some releases refuse to every method beside the newest peft.
needs_add_adapter = pytest.mark.skipif(bool(newer_peft_needed()), reason="transformers asks for a newer peft")

_ALL = [name for name, info in registry.list_methods().items() if info.place not in ("peft", "baseline")]
#: Those that keep the head of an image classifier: in none of the next lists.
KEEPS_HEAD = [name for name in _ALL if has_trait(registry.method(name), "uses_source_head")]
#: Those that make the images themselves, of another input, which `as_read` gives them: in `ON_BLOCKS` and `EVERY`.
DRAWS = [name for name in _ALL if has_trait(registry.method(name), "image_source")]
#: Those that are for images alone: in `pairs`, `ON_BLOCKS` and `EVERY`, and in none of the other lists.
IMAGES = [name for name in _ALL if registry.method(name).can("images") and name not in (*KEEPS_HEAD, *DRAWS)]
#: Those that leave the head of an image classifier untrained.
IMAGE_LOGITS = [name for name in IMAGES if has_trait(registry.method(name), "produces_logits")]
#: Those that replace the head of a classifier of whole rows: in `EVERY`, and in none of the next lists.
HEADS = [name for name in _ALL if has_trait(registry.method(name), "replaces_head")]
#: Those that also act in each block.
HEADS_AND_BLOCKS = [name for name in HEADS if "block" in registry.method(name).roles]
#: Those that are for text encoders alone: in `pairs` and `EVERY`, and in none of the next lists.
TEXTS = [name for name in _ALL if registry.method(name).can("texts")]
#: Every other registered method with an adapter of its own; LoRA stands among them as the yardstick.
METHODS = [name for name in _ALL if name not in (*IMAGES, *KEEPS_HEAD, *DRAWS, *HEADS, *TEXTS)]
#: Those built on peft-lab's shared layers.
OWN = [name for name in METHODS if not registry.method(name).module.startswith("peft.")]
#: Those that put prompts into the sequence of a stack of blocks; all others are put on single ops.
SEQUENCE = [name for name in OWN if registry.method(name).place == "sequence"]
#: Those that put branches beside the sub-layers of a block.
RESIDUAL = [name for name in OWN if "block" in registry.method(name).roles and name not in SEQUENCE]
ON_OPS = [name for name in OWN if name not in (*SEQUENCE, *RESIDUAL)]
#: Those that act on one stack or on the whole model, and those that are put on whole blocks.
ON_STACKS = [*SEQUENCE, *IMAGES, *DRAWS]
ON_BLOCKS = [*ON_STACKS, *RESIDUAL]
#: Those that choose their modules themselves.
ON_FIXED = [*ON_BLOCKS, *HEADS, *TEXTS]
#: Those that leave out convolutions, and so conv nets.
NO_CONVOLUTION = [name for name in ON_OPS if not registry.method(name).can("conv2d")]
#: All of them, and those of peft-lab; `text_or_image` names a family of `backbones.TINY` that goes with each.
EVERY = [*METHODS, *IMAGES, *DRAWS, *HEADS, *TEXTS]
EVERY_OWN = [*OWN, *IMAGES, *DRAWS, *HEADS, *TEXTS]
#: Those whose values come from the training data: in a test, from `fill`.
UNTRAINED = [name for name in [*OWN, *HEADS] if has_trait(registry.method(name), "values_from_data")]
TRAINED = [name for name in OWN if name not in UNTRAINED]
TRAINED_HEADS = [name for name in HEADS if name not in UNTRAINED]
#: Those that take no gradient steps, and have no parameters.
FITTED = [name for name in HEADS if not registry.method(name).takes_steps]
#: Families of `backbones.TINY` whose blocks have no linear layer.
CONVOLUTIONAL = ("resnet", "efficientnet", "mobilenet_v2")
CONV_NETS = ("convnext", *CONVOLUTIONAL)
#: Families of `backbones.TINY` with no place for prompts: their blocks are convolutions, or are left out at random.
NO_SEQUENCE = (*CONV_NETS, "segformer", "wav2vec2")
#: Families of `backbones.TINY` that classify images and have a place for prompts.
IMAGE_CLASSIFIERS = ("vit", "deit", "dinov2", "dinov2_with_registers", "beit")
#: Families of `backbones.TINY` with a text encoder whose output is that of one norm.
TEXT_ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "deberta-v2", "modernbert")
TEXT_ENCODERS += ("mpnet", "t5", "clip", "siglip")
#: Those that classify images.
CLASSIFIERS = (*IMAGE_CLASSIFIERS, "swin", *CONV_NETS)
#: Those that classify texts.
TEXT_CLASSIFIERS = (
    *("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "deberta-v2", "modernbert", "mpnet"),
    *("albert", "gpt2_classifier", "llama_classifier", "t5_classifier"),
)
#: Those with a place for a branch between attention and MLP.
PRE_NORM = (*IMAGE_CLASSIFIERS, "dinov3_vit", "clip", "siglip")


def config(method: str, model: nn.Module | None = None, **fields: Any) -> Any:
    """A method's config; text and list fields are taken as they are."""
    if method in DRAWS and model is not None and not hasattr(getattr(model, "config", None), "image_size"):
        fields.setdefault("image_size", 32)  # 224 is the default, and takes seconds
    return make_config(method, fields, model=model)


def text_or_image(method: str) -> str:
    """A family with a head that the method goes with: a text encoder, or for images alone a vision transformer."""
    return "vit" if method in (*IMAGES, *DRAWS) else "bert"


def home(method: str) -> str:
    """A family that the method goes with: a vision transformer, or for texts alone a text encoder."""
    return "bert" if method in TEXTS else "vit"


def pairs(methods: Iterable[str], families: Iterable[str], needs: Needs = each_family) -> pytest.MarkDecorator:
    """Parametrise a test over methods and the families that they go with, daily over a cover of `needs`."""
    families = list(families)
    found = [(m, f) for f in families for m in methods if not (m in (*SEQUENCE, *RESIDUAL) and f in NO_SEQUENCE)]
    found = [(m, f) for m, f in found if not (m in NO_CONVOLUTION and f in CONVOLUTIONAL)]
    found = [(m, f) for m, f in found if m not in (*KEEPS_HEAD, *DRAWS) or f in CLASSIFIERS]
    found = [(m, f) for m, f in found if m not in HEADS or f in (*CLASSIFIERS, *TEXT_CLASSIFIERS)]
    found = [(m, f) for m, f in found if m not in HEADS_AND_BLOCKS or f not in NO_SEQUENCE]
    found += [(m, f) for f in families for m in IMAGES if f in (IMAGE_CLASSIFIERS if m in IMAGE_LOGITS else PRE_NORM)]
    found += [(m, f) for f in families for m in TEXTS if f in TEXT_ENCODERS]
    return pytest.mark.parametrize(("method", "family"), cover(found, needs))


def adapt(method: str, model: nn.Module, seed: int = 0, **fields: Any) -> Any:
    """A copy of `model` with a fresh adapter on it, which has read data if it wants to; in evaluation mode."""
    torch.manual_seed(seed)
    model = copy.deepcopy(model)
    adapted = fill(get_peft_model(model, config(method, model, **fields))).eval()
    if method in KEEPS_HEAD:
        read_training_data(adapted, [{**tiny_inputs(model), "labels": torch.arange(2)}])
    return adapted


@torch.no_grad()
def fill(model: Any) -> Any:
    """Give some values to what an adapter would take from training data."""
    if model.peft_config["default"].peft_type.lower() in UNTRAINED:
        for parameter in adapter_parameters(model).values():
            parameter.normal_()
        fit(model)
    return model


def fit(model: nn.Module, adapter: str = "default", seed: int = 0) -> None:
    """Fit estimators to random features, of which the first class has the most rows."""
    random = np.random.default_rng(seed)
    for module in model.modules():
        if not isinstance(module, EstimatorHead) or adapter not in module.configs or module.first[0] is not module:
            continue
        width, classes = module.feature_width(module.configs[adapter]), module.facts.classes
        labels = np.concatenate([np.arange(6 * classes) % classes, np.zeros(6, dtype=int)])
        rows = random.standard_normal((classes, width))[labels] + random.standard_normal((len(labels), width))
        # other names of the classes too: the features of all inputs may lie in one cluster
        module.fit_rows(adapter, rows, (labels + seed + seed // classes) % classes)


def adapter_parameters(model: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    """The adapter's own parameters by name, without heads in `modules_to_save`."""
    marks = (f".{adapter}.", f".{adapter}")
    named = model.named_parameters()
    return {n: p for n, p in named if (marks[0] in n or n.endswith(marks[1])) and "modules_to_save" not in n}


def adapter_values(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """The adapter's own parameters and saved arrays by name, without heads in `modules_to_save`."""
    found: dict[str, Tensor] = dict(adapter_parameters(model, adapter))
    for path, module in model.named_modules():
        if isinstance(module, HeadLayer):
            names = [name for name in module.other_param_names if adapter in getattr(module, name)]
            found |= {f"{path}.{name}.{adapter}": getattr(module, name)[adapter] for name in names}
    return found


def move(model: nn.Module, adapter: str = "default", scale: float = 0.3, seed: int = 1) -> nn.Module:
    """Move an adapter's parameters off their start, or fit it to other features, so that it has an effect."""
    fit(model, adapter, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model, adapter).values():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(scale * noise.to(parameter))
    return model


@torch.no_grad()
def output(model: nn.Module, inputs: dict[str, Tensor], **kwargs: Any) -> Tensor:
    """The model's main output tensor for given inputs, in evaluation mode, without gradients."""
    model.eval()
    return main_tensor(model(**as_read(model, inputs), **kwargs))


def as_read(model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs as a model reads them: for an adapter that draws its images, the pixels as points of three coordinates."""
    sources = {getattr(given, "image_source", "") for given in (getattr(model, "peft_config", None) or {}).values()}
    off = any(module.disable_adapters for module in model.modules() if isinstance(module, AdapterLayer))
    if not any(sources) or off or "pixel_values" not in inputs:
        return dict(inputs)
    others = {name: value for name, value in inputs.items() if name != "pixel_values"}
    points = inputs["pixel_values"].float().movedim(1, -1).flatten(1, 2)[:, ::16]
    return {**others, sources.pop(): points}


def backward(method: str, loss: Tensor) -> None:
    """Backward pass of a loss, which a method without parameters has not."""
    if method in FITTED:
        assert not loss.requires_grad
    else:
        loss.backward()


def main_tensor(result: Any) -> Tensor:
    """Logits where there are any, else the last hidden state."""
    if isinstance(result, Tensor):
        return result
    for name in ("logits", "logits_per_image", "last_hidden_state"):
        value = getattr(result, name, None)
        if value is not None:
            return value
    raise TypeError(f"no known output in {type(result).__name__}")


def equal_states(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts hold the same names and bits."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def equal_weights(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models hold bit-equal state dicts."""
    return equal_states(a.state_dict(), b.state_dict())


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to `tolerance` of the largest expected value: what another order of summation may change."""
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, atol=tolerance * max(scale, 1.0), rtol=0.0)
