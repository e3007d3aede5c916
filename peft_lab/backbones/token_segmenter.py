"""Semantic segmentation by one linear layer over the patches of any image backbone.

It stands in for a head of transformers where a family has none, such as a ViT. Every method of peft goes on it as on
other models, and `AutoPeftModel` finds the class by the adapter's config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSemanticSegmentation,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import SemanticSegmenterOutput

from peft_lab.errors import ConfigError

#: Value of the pixels of a mask that do not count, as in the heads of transformers.
IGNORED = 255

#: Options of `from_pretrained` that belong to the head.
_OF_HEAD = ("num_labels", "id2label", "label2id", "problem_type")


class TokenSegmenterConfig(PretrainedConfig):
    """Config of a backbone with a linear head over its patches.

    Attributes:
        backbone_config: config of the backbone, as a mapping or as it is.
        semantic_loss_ignore_index: value of the pixels that do not count in the loss.
    """

    model_type = "token_segmenter"
    sub_configs: ClassVar[dict[str, Any]] = {"backbone_config": AutoConfig}

    def __init__(
        self,
        backbone_config: Mapping[str, Any] | PretrainedConfig | None = None,
        semantic_loss_ignore_index: int = IGNORED,
        **kwargs: Any,
    ) -> None:
        if isinstance(backbone_config, Mapping):
            values = dict(backbone_config)
            backbone_config = AutoConfig.for_model(values.pop("model_type"), **values)
        self.backbone_config = backbone_config
        self.semantic_loss_ignore_index = semantic_loss_ignore_index
        # transformers hands the choice for the whole down to the backbone, whose own would be lost
        kwargs.setdefault("attn_implementation", getattr(backbone_config, "_attn_implementation", None))
        super().__init__(**kwargs)


class TokenSegmenter(PreTrainedModel):
    """Backbone with a 1x1 convolution over its patches; logits (n, labels, grid height, grid width).

    The backbone's last hidden states are tokens (n, tokens, width), of which those behind class and register tokens
    are the patches, or a map (n, width, height, width) of a convolutional net.
    """

    config_class = TokenSegmenterConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: TokenSegmenterConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.backbone: Any = AutoModel.from_config(config.backbone_config) if backbone is None else backbone
        # the pooler of a ViT has no use here, and starts at random where a checkpoint of a classifier brings none
        pooler = getattr(self.backbone, "pooler", None)
        if pooler is not None and next(pooler.parameters(), None) is not None:
            self.backbone.pooler = None
        shape: Any = config
        self.classifier: Any = nn.Conv2d(_width(shape.backbone_config), shape.num_labels, 1)
        if backbone is None:
            self.post_init()
            return
        # post_init would draw new weights for the backbone, too
        nn.init.normal_(self.classifier.weight, std=0.02)
        head: Any = self.classifier
        nn.init.zeros_(head.bias)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, name: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Load a saved segmenter, or put a new head on any backbone.

        Arguments are those of transformers; `num_labels` or `id2label` say the outputs of a new head.

        Raises:
            ConfigError: the backbone does not read images, or its tokens are no grid of patches.
        """
        hub = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs}
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **hub)
        if isinstance(config, TokenSegmenterConfig):
            return super().from_pretrained(name, *args, **kwargs)
        _width(config)
        wants_info = kwargs.pop("output_loading_info", False)
        head = {key: kwargs.pop(key) for key in _OF_HEAD if kwargs.get(key) is not None}
        backbone, info = AutoModel.from_pretrained(name, output_loading_info=True, **kwargs)
        own = TokenSegmenterConfig(backbone_config=backbone.config, dtype=backbone.dtype, **head)
        model = cls(own, backbone=backbone).to(backbone.dtype)
        model.name_or_path = own._name_or_path = str(name)
        for key in ("missing_keys", "mismatched_keys"):
            info[key] = {f"backbone.{each}" if isinstance(each, str) else each for each in info.get(key, ())}
        info["missing_keys"] = {key for key in info["missing_keys"] if ".pooler." not in key}
        return (model.eval(), info) if wants_info else model.eval()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> SemanticSegmenterOutput:
        """Logits of the patches, and the loss at the size of the labels.

        Args:
            pixel_values: (n, channels, height, width).
            labels: classes of the pixels, int64 (n, height, width); `IGNORED` does not count.
            kwargs: further arguments of the backbone.
        """
        outputs = self.backbone(pixel_values, **kwargs)
        logits = self.classifier(self._grid(outputs.last_hidden_state, pixel_values))
        loss = None
        if labels is not None:
            enlarged = functional.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
            ignored = self.config.semantic_loss_ignore_index
            loss = functional.cross_entropy(enlarged.float(), labels, ignore_index=ignored)
        return SemanticSegmenterOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )

    def _grid(self, hidden: Tensor, pixel_values: Tensor) -> Tensor:
        """Map of the patches, (n, width, height, width)."""
        if hidden.ndim == 4:
            return hidden
        height, width = pixel_values.shape[-2:]
        rows, columns = _grid_size(self.backbone.config, height, width, hidden.shape[1])
        patches = hidden[:, hidden.shape[1] - rows * columns :]
        return patches.transpose(1, 2).reshape(len(hidden), -1, rows, columns)


def segmenter_class(name: str, **hub_kwargs: Any) -> Any:
    """Class that loads a backbone for segmentation: transformers' own, or `TokenSegmenter` where it has none."""
    config = AutoConfig.from_pretrained(name, trust_remote_code=False, **hub_kwargs)
    known = type(config) in AutoModelForSemanticSegmentation._model_mapping
    return AutoModelForSemanticSegmentation if known else TokenSegmenter


def _width(config: PretrainedConfig) -> int:
    """Width of the last hidden states of a backbone.

    Raises `ConfigError` if it reads no images.
    """
    widths = getattr(config, "hidden_sizes", None) or ()
    # Swin doubles its width from stage to stage, and says the last one
    found = getattr(config, "hidden_size", None) or getattr(config, "hidden_dim", None) or (widths[-1] if widths else 0)
    reads_images = any(hasattr(config, key) for key in ("num_channels", "image_size"))
    if not found or not reads_images or hasattr(config, "text_config"):
        raise ConfigError(
            f'Model type "{config.model_type}" has no head for segmentation, and no patches of an image that a linear '
            "head could read; choose SegFormer, DPT, UPerNet, BEiT or a vision transformer."
        )
    return int(found)


def _grid_size(config: PretrainedConfig, height: int, width: int, tokens: int) -> tuple[int, int]:
    """Rows and columns of the patches of an image.

    Raises `ConfigError` if the tokens are no grid of them.
    """
    patch = getattr(config, "patch_size", None)
    if isinstance(patch, int):
        # stages that merge patches make each side shorter by the same factor
        for factor in (1, 2, 4, 8, 16):
            rows, columns = height // (patch * factor), width // (patch * factor)
            # class and register tokens stand before the patches, and are few
            if rows * columns and 0 <= tokens - rows * columns <= _MOST_OTHERS:
                return rows, columns
    raise ConfigError(
        f'The {tokens} tokens of model type "{config.model_type}" are no grid of patches of {height} x {width} pixels, '
        "so no linear head can read them."
    )


#: More tokens than this before the patches, and they are another grid.
_MOST_OTHERS = 16

AutoConfig.register(TokenSegmenterConfig.model_type, TokenSegmenterConfig)
AutoModelForSemanticSegmentation.register(TokenSegmenterConfig, TokenSegmenter)
