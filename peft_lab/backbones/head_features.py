"""Features that a task head reads: which modules hold them, by facts of the model.

A head may be one linear map (ViT, BERT), stand behind layers of its own that are trained with it (RoBERTa, DistilBERT,
DeBERTa), read a concatenation of tokens (DINOv2) or every token, of which the model then takes the last (decoders). The
features are what goes into the first of the head's layers, because all behind it starts untrained.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from peft_lab.backbones.family_table import FAMILIES
from peft_lab.backbones.heads import pretrained_parts
from peft_lab.backbones.module_roles import class_heads, head_modules, modules_by_role
from peft_lab.backbones.prefix_tokens import prefix_tokens


@dataclass(frozen=True)
class HeadFeatures:
    """Modules around the task head of a classifier of whole rows.

    Attributes:
        heads: paths of the linear maps that give class logits; a distilled DeiT has two.
        first: path of the head's first layer with parameters, whose input is the pooled feature.
        backbone: path of the pretrained part whose output holds the tokens.
        classes: number of class logits.
        width: width of the pooled feature.
        token_width: width of the last hidden states.
        prefix_tokens: class and register tokens before the patches of a vision transformer.
        norm: path of the final norm where the last hidden states are not yet normed (CLIP); "" elsewhere.
        pad_token_id: token that fills up rows, for models whose head reads the last token; None for none.
    """

    heads: tuple[str, ...]
    first: str
    backbone: str
    classes: int
    width: int
    token_width: int
    prefix_tokens: int
    norm: str
    pad_token_id: int | None


def head_features(model: Any) -> HeadFeatures | None:
    """Return the facts of a model's task head; None if it does not classify whole texts or images."""
    heads, parts = class_heads(model), list(pretrained_parts(model, ""))
    # A head over the tokens of a text, or over the pixels of an image, has linear maps to the labels too.
    if not heads or not parts or not _classifies_rows(type(model).__name__):
        return None
    first, backbone = head_modules(model)[0], parts[0]
    weight: Any = model.get_submodule(first)
    width = getattr(weight, "in_features", None) or weight.weight.shape[-1]
    part: Any = model.get_submodule(backbone)
    # A backbone of timm has no config of its own, and its output holds no tokens.
    settings: Any = part.config if hasattr(part, "config") else model.config
    family = FAMILIES.get(settings.model_type)
    norms = modules_by_role(model, "norm.final") if family is not None and family.final_norm_of_pooled else []
    text = settings.get_text_config() if hasattr(settings, "get_text_config") else settings
    return HeadFeatures(
        heads=tuple(heads),
        first=first,
        backbone=backbone,
        classes=model.config.num_labels,
        width=width,
        # Convolutional nets name the widths of their stages, of which the head reads the last.
        token_width=getattr(settings, "hidden_size", None) or width,
        prefix_tokens=prefix_tokens(model, backbone) if hasattr(part, "config") else 0,
        norm=norms[0] if norms else "",
        pad_token_id=getattr(text, "pad_token_id", None),
    )


@lru_cache(maxsize=1)
def _row_classifiers() -> frozenset[str]:
    """Return the classes of transformers that classify whole texts or images."""
    from transformers.models.auto import modeling_auto as auto

    found: set[str] = set()
    for table in (
        auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    ):
        for value in table.values():
            found.update(value if isinstance(value, tuple | list) else (value,))
    return frozenset(found)


def _classifies_rows(name: str) -> bool:
    return name in _row_classifiers()
