"""Text classifiers of two-tower models: features of class names in the space that images and texts share.

An image classifier that transformers makes of CLIP keeps the vision tower alone, so the text tower and the projection
of images are read from its checkpoint.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_lab.backbones.from_pretrained import load_checkpoint
from peft_lab.backbones.head_features import HeadFeatures
from peft_lab.errors import ConfigError

logger = logging.getLogger("peft_lab")

#: Parts of a checkpoint without which there are no class texts.
_NEEDED = ("text_model.", "text_projection", "visual_projection")


@dataclass(frozen=True)
class TextClassifier:
    """Features of class texts, and the map of images into their space.

    Attributes:
        weights: unit features of the classes, float32 (classes, width).
        projection: map of an image's class token behind the final norm, float32 (width, token width).
    """

    weights: Tensor
    projection: Tensor


def shared_width(model: Any, facts: HeadFeatures) -> int | None:
    """Width of the space that a classifier's two-tower checkpoint shares with texts; None without a text tower.

    Only models that project the class token behind the final norm have one here, as CLIP does.
    """
    config = model.config
    if not (hasattr(config, "text_config") and hasattr(config, "vision_config")):
        return None
    if not facts.norm or facts.prefix_tokens < 1:
        return None
    return getattr(config, "projection_dim", None)


def text_classifier(model: Any, facts: HeadFeatures, templates: Sequence[str]) -> TextClassifier:
    """Text classifier of an image classifier's own classes.

    A class's feature is the mean of the unit features of its texts, divided by its norm.

    Args:
        model: image classifier that was loaded from a two-tower checkpoint.
        facts: facts of its head.
        templates: texts with "{}" where the name of a class goes; "_" in a name becomes a space.

    Raises:
        ConfigError: the classes have no names, a text is too long or has no tokens of its own, or the checkpoint has no
            text tower, no tokenizer or other image weights than the model.
    """
    names = class_names(model)
    name, revision = model.config._name_or_path, getattr(model.config, "_commit_hash", None)
    hub = {"revision": revision} if revision else {}
    whole = _two_towers(name, hub)
    _check_same_images(model.get_submodule(facts.backbone), whole, facts.backbone, name)
    tokenizer = _tokenizer(name, hub)
    whole = whole.to(next(model.parameters()).device).eval()
    logger.info("%d classes have texts such as %r.", len(names), templates[0].replace("{}", names[0]))
    sums: Any = 0.0
    for template in templates:
        texts = [template.replace("{}", each) for each in names]
        sums = sums + nn.functional.normalize(_text_features(whole, tokenizer, texts), dim=-1)
    projection = whole.visual_projection.weight.detach()
    return TextClassifier(nn.functional.normalize(sums, dim=-1), projection)


def class_names(model: Any) -> list[str]:
    """Names of a classifier's classes in order, with spaces for "_".

    Raises:
        ConfigError: there are numbers in place of names.
    """
    labels = model.config.id2label
    names = [str(labels[index]) for index in range(len(labels))]
    for each in names:
        if re.fullmatch(r"LABEL_\d+", each):
            raise ConfigError(f'The class "{each}" has no name to make a text of; set id2label in the model\'s config.')
    return [each.replace("_", " ") for each in names]


def _two_towers(name: str, hub: dict[str, str]) -> Any:
    """Whole model of a two-tower checkpoint in float32."""
    from transformers import AutoModel

    if not name:
        raise ConfigError(
            "The model does not say which checkpoint it was loaded from, and class texts need its text tower; load it "
            "with from_pretrained."
        )
    whole, info = load_checkpoint(AutoModel, name, dtype=torch.float32, **hub)
    absent = [key for key in info.get("missing_keys", ()) if key.startswith(_NEEDED)]
    if absent or not hasattr(whole, "get_text_features"):
        without = f" ({sorted(absent)[0]} is missing)" if absent else ""
        raise ConfigError(
            f'"{name}" has no text tower{without}, and class texts need one; load the image classifier from a '
            "checkpoint of CLIP, or leave the texts out."
        )
    return whole


def _check_same_images(backbone: nn.Module, whole: nn.Module, path: str, name: str) -> None:
    """Refuse a checkpoint whose image weights are not the model's."""
    own = backbone.state_dict()
    for key, value in whole.get_submodule(path).state_dict().items():
        held = own.get(key)
        # Quantised weights have another form, and an adapter in front renames what it wraps.
        if held is None or not held.is_floating_point() or held.shape != value.shape:
            continue
        if not torch.equal(held.cpu(), value.to(held.dtype)):
            raise ConfigError(
                f'"{name}" has another {path}.{key} than the model, so its texts say nothing of the model\'s images.'
            )


def _tokenizer(name: str, hub: dict[str, str]) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False, **hub)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f'"{name}" has no tokenizer for its class texts: {reason}') from error


@torch.no_grad()
def _text_features(whole: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Projected features (texts, width)."""
    most = whole.config.text_config.max_position_embeddings
    special, seen = {*tokenizer.all_special_ids}, set[tuple[int, ...]]()
    for text in texts:
        ids = tuple(tokenizer(text)["input_ids"])
        if len(ids) > most:
            raise ConfigError(f'The class text "{text}" has {len(ids)} tokens; the text tower reads at most {most}.')
        # Of a checkpoint without tokenizer files transformers makes a tokenizer that knows no words.
        if ids in seen or special.issuperset(ids):
            raise ConfigError(
                f'The tokenizer of "{tokenizer.name_or_path}" makes no tokens of the class text "{text}", or those of '
                "another class; add its files to the checkpoint, or name the class otherwise."
            )
        seen.add(ids)
    inputs = tokenizer(list(texts), padding=True, return_tensors="pt").to(whole.device)
    found = whole.get_text_features(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    features: Tensor = found if isinstance(found, Tensor) else found.pooler_output
    return features
