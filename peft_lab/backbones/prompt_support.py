"""Support for prompt tokens, beside the facts of the role table.

Data only. A family of the table supports them, with the facts in its `Family`, unless an obstacle stands here.
"""

from __future__ import annotations

from typing import NamedTuple


class PromptSupport(NamedTuple):
    """Facts about prompt tokens in one `model_type`.

    Attributes:
        obstacle: reason why prompt tokens do nothing or harm, as a predicate of the model; "" if they are supported.
        rotary_in_block: True if each block makes rotary positions from `position_ids` by itself.
        tested: True if tests put prompt tokens into such models.
        patch_heads: classes whose head reads the patches alone although there is a class token.
    """

    obstacle: str = ""
    rotary_in_block: bool = False
    tested: bool = True
    patch_heads: tuple[str, ...] = ()


ALIBI = "biases its attention by distance (ALiBi)"
_OWN_LENGTH = "makes masks or positions for the text alone in each block"
_IN_PIECES = "attends within pieces of the text"
_DROPS_BLOCKS = "leaves out whole blocks at random in training (LayerDrop), and prompts with them"

#: `model_type` -> support, beside the families of the table.
PROMPT_SUPPORT: dict[str, PromptSupport] = {
    **dict.fromkeys(("bloom", "mpt"), PromptSupport(ALIBI)),
    **dict.fromkeys(("falcon_h1", "roformer", "xlm", "xlnet"), PromptSupport(_OWN_LENGTH)),
    **dict.fromkeys(("led", "longformer", "longt5"), PromptSupport(_IN_PIECES)),
    **dict.fromkeys(("wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat"), PromptSupport(_DROPS_BLOCKS)),
    "data2vec-audio": PromptSupport(_DROPS_BLOCKS),
    "fnet": PromptSupport("mixes tokens without attention"),
    "funnel": PromptSupport("merges tokens between its blocks"),
    **dict.fromkeys(("codegen", "gptj"), PromptSupport(rotary_in_block=True)),
    **dict.fromkeys(("ctrl", "falcon", "gpt_bigcode", "gpt_neo", "gpt_neox", "lfm2", "llama4_text"), PromptSupport()),
    **dict.fromkeys(("openai-gpt", "qwen3_next", "xglm"), PromptSupport()),
    "metaclip_2_vision_model": PromptSupport(tested=False, patch_heads=("MetaClip2ForImageClassification",)),
}

#: Words in the path of a stack of blocks that gets the prompts where a model has several; the first one counts.
PREFERRED_STACKS = ("vision", "encoder")
