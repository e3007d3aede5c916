"""P2P: point clouds through an image model, drawn as pictures by a trained encoder.

Source: Wang et al. 2022, P2P: Tuning Pre-trained Image Models for Point Cloud Analysis with Point-to-Pixel Prompting,
arXiv:2208.02812, and github.com/wangzy22/P2P (MIT). Written from the paper's formulas.

The model's forward takes `point_clouds` (batch, points, 3) in the place of `pixel_values`. The encoder
(`peft_lab.adapters.input.p2p.encoder`) computes features of the points as they lie, sums them at the pixels that the
points of a turned cloud fall on, and colours the pixels. Beside it the norms of the backbone and its class token are
trained, in additive form, and the task head. Readings of what the paper leaves open:

- a training step turns each cloud by angles drawn from `azimuth` and `elevation`; an evaluation takes the middles of
  equal parts of these, and the logits are the mean over the views;
- elevations look down on the object, and the picture stands upright: the tilts of 36 to 72 degrees of the authors' code
  are counted from a view from the top, so they are elevations of 54 to 18;
- an evaluation has ten azimuths, as theirs, and one elevation in place of their four, to save time;
- clouds keep their ratio in training, where the authors' code also stretches each axis by 2/3 to 3/2 at random;
- batch norms of the backbone keep their running statistics, which an adapter file does not hold;
- the class token is changed behind the dropout of the embeddings;
- in evaluation, `pixel_values` are taken for pictures that are drawn already.

The authors train for 300 epochs with AdamW at 5e-4, a weight decay of 0.05 and label smoothing of 0.2. In 60 steps of
16 rows of furniture-points with a small ViT it does not beat the head alone on pictures of the depth: test accuracy of
three seeds 0.357, 0.313 and 0.130 (head: 0.278, 0.296, 0.304); from the front alone, `azimuth=[-50, -10]` and
`elevation=[10, 30]`, 0.296, 0.270 and 0.374 (`benchmarks/studies/p2p.yaml`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from peft_lab.adapters.input.p2p.encoder import PARAMETERS, STATISTICS, WIDTH, picture, point_features, start_values
from peft_lab.adapters.input.p2p.projection import turned, view_angles
from peft_lab.backbones import module_roles
from peft_lab.backbones.family_table import FAMILIES
from peft_lab.errors import ConfigError
from peft_lab.tuners import (
    AdapterConfig,
    AdapterLayer,
    AdapterTuner,
    ForwardContext,
    MethodInfo,
    RowInput,
    operation,
    register,
    sum_dtype,
    wrap_forward,
)

METHOD = MethodInfo(
    name="p2p",
    title="P2P",
    paper="2208.02812",
    place="input",
    config="P2PConfig",
    roles=("embed.patch", "norm", "norm.stem", "norm.downsample", "norm.final"),
    capabilities=("images",),
    learning_rate=1e-3,
    budget=(1.5, 1.6),
)

_POINTS = RowInput("point_clouds", "float32", shape=(None, 3))
#: Image size of a model whose config names none, and sizes that a square of an object can have.
_IMAGE_SIZE, _LEAST, _LARGEST = 224, 4, 2048


@dataclass
class P2PConfig(AdapterConfig):
    """Configuration of P2P.

    Trainable: 83,683 of the encoder, twice the channels of each norm, and the width of the class token.

    Raises:
        ConfigError: a number out of range, or modules are chosen; the model reads no square images of three channels,
            or has no patch embedding whose place is known.
    """

    image_source = "point_clouds"

    num_neighbors: int = field(
        default=32, metadata={"help": "Nearest points of a point that its features are computed of.", "other": 4}
    )
    object_size: int | None = field(
        default=None,
        metadata={
            "help": "Side of the square of the picture that the object fills; nothing means the whole picture.",
            "most": _LARGEST,
            "other": 12,
        },
    )
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "Side of the picture; training fills in that of the image processor. Nothing: that of the model's "
            "config, or 224.",
            "most": _LARGEST,
            "untried": "a backbone of one size",
        },
    )
    image_mean: list[float] | None = field(
        default=None,
        metadata={"help": "Mean by channel; training fills it in. By default 0.5.", "other": [0.1, 0.2, 0.3]},
    )
    image_std: list[float] | None = field(
        default=None,
        metadata={"help": "Divisor by channel; training fills it in. By default 0.5.", "other": [0.1, 0.2, 0.3]},
    )
    up_axis: str = field(
        default="y", metadata={"help": "Axis that points upwards; training fills in that of the task.", "other": "z"}
    )
    azimuth: list[float] = field(
        default_factory=lambda: [7.2, 349.2],
        metadata={"help": "Lowest and highest angle about the up axis, in degrees.", "other": [0.0, 90.0]},
    )
    elevation: list[float] = field(
        default_factory=lambda: [18.0, 54.0],
        metadata={"help": "Lowest and highest angle of looking down, in degrees.", "other": [0.0, 10.0]},
    )
    num_azimuths: int = field(
        default=10, metadata={"help": "Angles about the up axis in evaluation; the logits are the mean.", "other": 2}
    )
    num_elevations: int = field(default=1, metadata={"help": "Angles of looking down in evaluation.", "other": 2})
    train_norms: bool = field(
        default=True, metadata={"help": "Train weights and biases of the backbone's norms.", "other": False}
    )
    train_class_token: bool = field(
        default=True, metadata={"help": "Train the class token, where the backbone has one.", "other": False}
    )

    def check(self) -> None:
        for name in ("num_neighbors", "num_azimuths", "num_elevations", "image_size", "object_size"):
            value, least = getattr(self, name), _LEAST if name.endswith("size") else 1
            if value is not None and not least <= value <= _LARGEST:
                raise ConfigError(f"{name}={value} must be from {least} to {_LARGEST}.")
        if self.up_axis not in ("x", "y", "z"):
            raise ConfigError(f'up_axis="{self.up_axis}" must be x, y or z.')
        for name in ("azimuth", "elevation"):
            value = getattr(self, name)
            if len(value) != 2 or not -360 <= value[0] <= value[1] <= 360:
                raise ConfigError(f"{name}={value} must be two angles from -360 to 360 degrees, the lower one first.")
        for name, smallest in (("image_mean", -math.inf), ("image_std", 1e-12)):
            value = getattr(self, name)
            if value is not None and (len(value) != 3 or min(value) < smallest):
                raise ConfigError(f"{name}={value} must be three numbers, one for each channel; of std positive.")
        regex = isinstance(self.target_modules, str) and not self.fingerprints
        for name in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"):
            if getattr(self, name) is not None and (regex or name != "target_modules"):
                raise ConfigError(self.no_choice(name))

    def no_choice(self, name: str) -> str:
        """Error message for a field that chooses modules."""
        return f'Method "{self.info.name}" acts on the whole model and takes no {name}; train_norms leaves out norms.'

    def row_inputs(self) -> tuple[RowInput, ...]:
        return (_POINTS,)


class P2PLayer(AdapterLayer):
    """Patch embedding that holds the encoder, or a norm with trained weight and bias.

    Attributes:
        settings: the model's config.
        token: module with the class token, in a list so that it is no part of this one; empty without one.
        token_width: its number of values.
    """

    adapter_layer_names = (
        *("p2p_" + name for name in PARAMETERS),
        *("p2p_class_token", "p2p_norm_weight", "p2p_norm_bias"),
    )
    other_param_names = data_param_names = tuple("p2p_" + name for name in STATISTICS)
    reads_before_forward = True
    settings: Any
    token: list[nn.Module]
    token_width: int

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__(base_layer, name)
        for buffers in self.other_param_names:
            setattr(self, buffers, BufferDict(persistent=True))

    def read_base(self, name: str) -> None:
        self.op = operation(self.base_layer, name)
        norms = (nn.LayerNorm, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
        if self.op.op_type != "conv2d" and not isinstance(self.base_layer, norms):
            raise ConfigError(
                f'Method "{self.info.name}" trains LayerNorm, BatchNorm and GroupNorm, and "{name}" is a '
                f"{type(self.base_layer).__name__}; set train_norms=False."
            )

    @property
    def is_encoder(self) -> bool:
        """True at the patch embedding."""
        return self.op.op_type == "conv2d"

    @property
    def current(self) -> str | None:
        """Active adapter; None if none is active."""
        active = [name for name in self.active_adapters if name in self.configs]
        return active[0] if active and not self.disable_adapters else None

    def initial_values(self, adapter: str, config: P2PConfig) -> dict[str, Tensor]:
        if not self.is_encoder:
            weight, bias = torch.zeros_like(self.base_weight), getattr(self.base_layer, "bias", None)
            return {"p2p_norm_weight": weight} | ({} if bias is None else {"p2p_norm_bias": torch.zeros_like(bias)})
        found = {f"p2p_{name}": value for name, value in start_values().items()}
        if config.train_class_token and self.token:
            found["p2p_class_token"] = torch.zeros(self.token_width)
        return found

    def update_layer(self, adapter: str, config: Any) -> None:
        if self.is_encoder:
            self.sizes(config)
            for number, name in enumerate(self.other_param_names):
                getattr(self, name)[adapter] = torch.full((2, WIDTH), float(number), device=self.base_weight.device)
        super().update_layer(adapter, config)

    def sizes(self, config: P2PConfig) -> tuple[int, int]:
        """Side of the square that the object fills, and of the picture.

        Raises:
            ConfigError: the model's images are not square, have other channels, or are smaller than the object.
        """
        vision = getattr(self.settings, "vision_config", self.settings)
        own: Any = getattr(vision, "image_size", None) or _IMAGE_SIZE
        sides = {own} if isinstance(own, int) else {*own}
        if len(sides) > 1 or getattr(vision, "num_channels", 3) != 3:
            raise ConfigError(
                f'Method "{self.info.name}" draws square pictures of three channels, and this backbone reads others; '
                "choose another one."
            )
        size = config.image_size or sides.pop()
        side = config.object_size or size
        if not _LEAST <= side <= size:
            raise ConfigError(f"object_size={side} must be from {_LEAST} to the side of the picture, {size}.")
        return side, size

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        # Two adapters would need two pictures at once.
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        if len([name for name in names if name in self.configs]) > 1:
            raise ConfigError(f'Method "{self.info.name}" takes one adapter at a time, got {", ".join(names)}.')
        super().set_adapter(adapter_names, inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        for name in self.other_param_names:
            buffers = getattr(self, name)
            if adapter_name in buffers:
                buffers[adapter_name] = buffers[adapter_name].to(device or self.base_weight.device)

    def adapted(self, x: Tensor, adapters: Any, *args: Any, **kwargs: Any) -> Tensor:
        out = self.base_layer(x, *args, **kwargs)
        (name,) = adapters
        if self.is_encoder:
            return out
        weight, bias = self.p2p_norm_weight[name], self.p2p_norm_bias.get(name)
        return out + self._normalised(x, weight, bias).to(out.dtype)

    def _normalised(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Base norm with another weight and bias; running statistics are those of the base."""
        norm = self.base_layer
        # batch norms take one dtype for all values of a channel
        statistics: Tensor | None = getattr(norm, "running_mean", None)
        dtype = x.dtype if statistics is None else statistics.dtype
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        if isinstance(norm, nn.GroupNorm):
            return F.group_norm(x, norm.num_groups, weight, bias, norm.eps)
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            own = norm.training or statistics is None
            return F.batch_norm(x, statistics, norm.running_var, weight, bias, own, 0.0, norm.eps)
        if self.op.channel_dim == 1:
            return F.layer_norm(x.movedim(1, -1), norm.normalized_shape, weight, bias, norm.eps).movedim(-1, 1)
        return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)

    # Calls of the whole model -----------------------------------------------------------------------------------

    def call_model(self, model: nn.Module, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Run the model on pictures of the call's point clouds."""
        context, adapter = ForwardContext.current(), self.current
        clouds = context.row_input(_POINTS.name) if context is not None else None
        images = arguments.get("pixel_values")
        if adapter is None:
            if clouds is not None and images is None:
                raise ConfigError("The adapter that draws point_clouds is off; give the base pixel_values.")
            return forward(**arguments)
        if clouds is None:
            if self.training and images is not None:
                raise ConfigError(
                    f'Method "{self.info.name}" is trained on point_clouds (batch, points, 3), not on pixel_values; '
                    "take a task of point clouds."
                )
            return forward(**arguments)
        if images is not None:
            raise ConfigError("The call gives point_clouds and pixel_values; leave one of them out.")
        colours, views = self.colours(adapter, clouds)
        fields = (self.configs[adapter].image_mean, self.configs[adapter].image_std)
        mean, std = (colours.new_tensor(given or [0.5] * 3)[:, None, None] for given in fields)
        pictures = (colours - mean) / std
        given = {**arguments, "pixel_values": pictures.to(self.base_dtype)}
        if views > 1 and isinstance(given.get("labels"), Tensor):
            given["labels"] = given["labels"].repeat_interleave(views, 0)
        return _mean_over_views(forward(**given), len(pictures), views)

    def colours(self, adapter: str, clouds: Tensor) -> tuple[Tensor, int]:
        """Pictures (batch x views, 3, side, side) of clouds, from 0 to 1, those of a row in sequence; and their number.

        Training draws one view of each cloud.
        """
        config = self.configs[adapter]
        # copied, because kernels round otherwise where a parameter itself is trained
        parameters = {name: getattr(self, f"p2p_{name}")[adapter] for name in PARAMETERS}
        dtype = sum_dtype(*parameters.values())
        values = {name: value.to(dtype, copy=True) for name, value in parameters.items()}
        clouds = clouds.to(self.base_weight.device, dtype)
        statistics = {name: getattr(self, f"p2p_{name}")[adapter] for name in STATISTICS}
        ranges, counts = (config.azimuth, config.elevation), (config.num_azimuths, config.num_elevations)
        if self.training:
            low, high = torch.tensor(ranges, device=clouds.device).deg2rad().unbind(1)
            angles = (low + (high - low) * torch.rand(len(clouds), 2, device=clouds.device))[None]
        else:
            angles = view_angles(ranges, counts).to(clouds.device)[:, None].expand(-1, len(clouds), -1)
        features = point_features(values, clouds, config.num_neighbors)
        sizes = self.sizes(config)
        drawn: list[Tensor] = []
        # one view after another, because the maps of features are twenty times as large as the pictures
        for view in angles.unbind(0):
            seen = turned(clouds, config.up_axis, *view.unbind(1))
            drawn.append(picture(values, statistics, features, seen, *sizes, self.training))
        return torch.stack(drawn, 1).flatten(0, 1), len(drawn)

    def call_embeddings(self, module: nn.Module, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Run the embeddings and change their class token, the first one."""
        out, adapter = forward(**arguments), self.current
        if adapter is None or adapter not in self.p2p_class_token:
            return out
        tokens = out if isinstance(out, Tensor) else out[0]
        first = tokens[:, :1] + self.p2p_class_token[adapter].to(tokens.dtype)
        changed = torch.cat([first, tokens[:, 1:]], 1)
        if isinstance(out, Tensor):
            return changed
        if isinstance(out, MutableMapping):
            out[next(iter(out))] = changed
            return out
        return (changed, *out[1:])


def _mean_over_views(output: Any, rows: int, views: int) -> Any:
    """Output of a model with the mean over the views of each row in the place of single views."""
    if views == 1:
        return output
    if isinstance(output, Tensor):
        whole = output.ndim and len(output) == rows and output.is_floating_point()
        return output.unflatten(0, (-1, views)).mean(1) if whole else output
    if isinstance(output, MutableMapping):
        for name, value in output.items():
            output[name] = _mean_over_views(value, rows, views)
        return output
    return tuple(_mean_over_views(value, rows, views) for value in output) if isinstance(output, tuple) else output


class P2PTuner(AdapterTuner):
    """Tuner that wraps the patch embedding and the norms of an image backbone."""

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if getattr(self.model, "main_input_name", "") != "pixel_values":
            raise ConfigError(
                f'Method "{self.info.name}" is made for images, and {type(self.model).__name__} reads none.'
            )
        if peft_config.fingerprints is None:
            found = _targets(self.model, peft_config.train_norms)
            given = module_roles.rename_targets(self.model, peft_config.target_modules or found)
            if {*given} != {*found}:
                raise ConfigError(peft_config.no_choice("target_modules"))
            peft_config.target_modules = found
            holders, _ = _class_token(self.model, found[0]) if peft_config.train_class_token else ([], 0)
            blocks = module_roles.modules_by_role(self.model, "block")
            # timm's models put it in beside the blocks, and no module gives out the tokens before these
            if holders and any(self.model.get_submodule(path) in {*holders[0].modules()} for path in blocks):
                raise ConfigError(
                    f"The class token of {type(self.model).__name__} cannot be trained; set train_class_token=False."
                )
        return super()._prepare_adapter_config(peft_config, model_config)

    def new_layer(self, target: nn.Module, path: str) -> AdapterLayer:
        layer = super().new_layer(target, path)
        assert isinstance(layer, P2PLayer)
        # the size of pictures and the class token are the business of the layer that draws
        if layer.is_encoder:
            layer.settings = getattr(self.model, "config", None)
            layer.token, layer.token_width = _class_token(self.model, path)
        return layer

    def _post_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        # One function per model serves all adapters: it asks which one is active.
        for layer in [module for module in model.modules() if isinstance(module, P2PLayer) and module.is_encoder]:
            wrap_forward(model, opens=True).around = layer.call_model
            for holder in layer.token:
                wrap_forward(holder, opens=False).around = layer.call_embeddings


def _targets(model: nn.Module, norms: bool) -> list[str]:
    """Paths of the first patch embedding or stem, and of the norms behind it.

    Raises:
        ConfigError: the model has no such convolution.
    """
    stems = module_roles.modules_by_role(model, "embed.patch") or module_roles.modules_by_role(model, "conv.stem")
    if not stems:
        raise ConfigError(
            f'Method "p2p" finds no patch embedding or stem in {type(model).__name__}; choose a backbone of the table.'
        )
    found = stems[:1]
    for role in METHOD.roles[1:] if norms else ():
        found += module_roles.modules_by_role(model, role)
    return found


def _class_token(model: nn.Module, patches: str) -> tuple[list[nn.Module], int]:
    """Module around a patch embedding that holds the class token, and the token's width; none without one."""
    names = {family.prefix_tokens[0] for family in FAMILIES.values() if family.prefix_tokens}
    for path, module in model.named_modules():
        around = not path or patches.startswith(f"{path}.")
        tokens = [token for name, token in module._parameters.items() if name in names and token is not None]
        if around and tokens:
            return [module], tokens[0].shape[-1]
    return [], 0


register(METHOD, P2PConfig, P2PLayer, P2PTuner)
