"""Task heads: modules in front of the pretrained parts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from peft_lab.backbones.names import join, model_type

if TYPE_CHECKING:
    from torch import nn

#: Heads that peft adds to `modules_to_save` by itself, in full, by its task types.
PEFT_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def has_no_head(model: Any) -> bool:
    """Test for bare backbones and generative models.

    Models whose layers outside the backbone are pretrained too count as bare.
    """
    # The tests below know classes of transformers only; other modules may well have a head.
    if not model_type(model):
        return False
    # A language model writes with its embedding, which is pretrained.
    if getattr(model, "get_output_embeddings", lambda: None)() is not None:
        return True
    name = type(model).__name__
    # CLIP's projections and the heads of pretraining come with the checkpoint, so they are no new head.
    return name.endswith(("WithProjection", "ForPreTraining")) or name in _bare_classes()


@lru_cache(maxsize=1)
def _bare_classes() -> frozenset[str]:
    """Return the classes that transformers loads as a bare backbone."""
    from transformers.models.auto import modeling_auto as auto

    found: set[str] = set()
    for table in ("MODEL_MAPPING_NAMES", "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES", "MODEL_FOR_BACKBONE_MAPPING_NAMES"):
        for value in getattr(auto, table, {}).values():
            found.update(value if isinstance(value, tuple | list) else (value,))
    return frozenset(found)


def head_paths(model: nn.Module) -> list[str]:
    """Return the outermost modules of the head with own parameters.

    They lie in no pretrained part.
    """
    taken = [f"{part}." for part in pretrained_parts(model, "")]
    found: list[str] = []
    # Without a pretrained part to leave out, the whole model would pass as a head.
    if not taken:
        return found
    # Parents come before their children, so a module inside the head is never listed beside it.
    inside = {id(classifier) for classifier in _classifiers(model)}
    for path, module in model.named_modules():
        if id(module) in inside:
            found.append(path)
            continue
        owns = next(module.parameters(recurse=False), None) is not None
        if path and owns and not f"{path}.".startswith(tuple(taken)):
            found.append(path)
            taken.append(f"{path}.")
    return found


def backbone_weights(model: Any, keys: Iterable[str]) -> list[str]:
    """Return the weights among `keys` that lie in the backbone and in no head of it."""
    heads = tuple(f"{path}." for path in head_paths(model))
    # A model made of any backbone and a head has no prefix.
    prefix = getattr(model, "base_model_prefix", "")
    below = f"{prefix}." if prefix else ""
    return sorted(key for key in keys if key.startswith(below) and not key.startswith(heads))


def _classifiers(model: Any) -> list[nn.Module]:
    """Return the heads that a backbone holds itself: models of timm name theirs."""
    part: Any = getattr(model, getattr(model, "base_model_prefix", None) or "base_model", None)
    found: Any = part.get_classifier() if hasattr(part, "get_classifier") else ()
    # Distilled models have two.
    found = found if isinstance(found, tuple) else (found,)
    return [module for module in found if next(module.parameters(), None) is not None]


def pretrained_parts(model: nn.Module, path: str) -> Iterator[str]:
    """Yield the paths of the pretrained models inside a model at `path`, without those inside of them."""
    for name, child in model.named_children():
        here = join(path, name)
        # A backbone that is no transformers model itself is recognised by the prefix of the model around it.
        if model_type(child) or (not path and name == getattr(model, "base_model_prefix", None)):
            yield here
        else:
            yield from pretrained_parts(child, here)
