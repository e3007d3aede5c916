"""Table of all backbone families, by the `model_type` of transformers."""

from __future__ import annotations

from peft_lab.backbones.audio_families import AUDIO
from peft_lab.backbones.family import Family
from peft_lab.backbones.multimodal_families import MULTIMODAL
from peft_lab.backbones.text_families import TEXT
from peft_lab.backbones.vision_families import VISION

FAMILIES: dict[str, Family] = {**VISION, **TEXT, **AUDIO, **MULTIMODAL}


def family(model_type: str) -> Family | None:
    """Return the family of a `model_type`; None for an unknown one.

    Composites such as "clip" have none: their towers have.
    """
    return FAMILIES.get(model_type)


def declared_names(model_type: str, fact: str) -> tuple[str, ...]:
    """Return names that a family declares in one of its fields.

    For an unknown family, those that any family declares.

    Args:
        fact: a field of `Family` that holds names, such as "bias_flags" or "prefix_tokens".
    """
    known = family(model_type)
    if known is not None:
        return tuple(getattr(known, fact))
    return tuple(dict.fromkeys(name for other in FAMILIES.values() for name in getattr(other, fact)))
