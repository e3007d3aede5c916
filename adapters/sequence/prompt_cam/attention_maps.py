"""Attention maps of class prompts in the last block, head by head.

For methods with one prompt per class (`image_logits`). Queries and keys of the last block are read where they are made,
so any kind of attention kernel will do. A head is taken from a class by making the class prompt's attention uniform
there: over all keys, by a query of zero, as in the authors' code, or over the patches alone, as in the paper (`blur`).
The attention of other prompts and tokens stays the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn

from peft_lab.errors import ConfigError, did_you_mean
from peft_lab.tuners import split
from peft_lab.tuners.sequence import SequenceLayer
from peft_lab.utils.text import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

#: What a head that a class has lost looks at evenly.
Blur = Literal["keys", "patches"]
#: Heads that are left for a class where nothing else is said, as in the paper, or half of them where there are few.
KEPT_HEADS = 4
#: Longest class name in the picture.
_LONGEST = 20
_NOTE = "framed: heads that the class needs\nnumber: highest patch, in even shares among the patches"
#: Height in pixels from which on matplotlib writes no picture.
_MOST_PIXELS = 2**16
_HEAD_INCHES, _DPI, _INK, _ACCENT, _FAINT = 1.15, 160, "#1d2733", "#c8551b", "#d5dae0"


class LastBlock:
    """Last block of a class-prompt model, run on one batch.

    The model is put into evaluation mode.

    Args:
        model: with an adapter of a method with class prompts.
        pixel_values: images (batch, channels, height, width) as the model gets them.
        blur: what a lost head looks at evenly: all "keys", or the "patches" alone.

    Attributes:
        logits: (batch, classes).
        attention: weights from each class prompt to each patch (batch, classes, heads, rows, columns); weights to
            prompts, class and register tokens are left out.

    Raises:
        ConfigError: the model has no class prompts, its attention is more than a product of queries and keys, or its
            tokens are not the patches of an image.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, pixel_values: Tensor, blur: Blur = "keys") -> None:
        model.eval()
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        if pixel_values.ndim != 4:
            raise ConfigError(
                f"Attention maps are for images (rows, channels, height, width), and {type(base).__name__} is given "
                f"values of shape {list(pixel_values.shape)}."
            )
        self.layer = _scoring_layer(base)
        self.adapter = next(name for name in self.layer.active_adapters if name in self.layer.configs)
        block: Any = self.layer.base_layer
        self._queries, self._keys = (_projection(block, name) for name in ("q_proj", "k_proj"))
        self.blur = blur
        # Read where they are made: kernels such as sdpa return no attention weights.
        seen: dict[str, Any] = {}
        handles = [
            block.register_forward_pre_hook(lambda m, a, k: seen.update(args=a, kwargs=k), with_kwargs=True),
            self._queries.register_forward_hook(lambda m, a, out: seen.update(q=out)),
            self._keys.register_forward_hook(lambda m, a, out: seen.update(k=out)),
        ]
        try:
            self.logits = model(pixel_values=pixel_values).logits.float()
        finally:
            for handle in handles:
                handle.remove()
        # The block's own arguments, prompts included, let `without` run it again by itself.
        self._args, self._kwargs = seen["args"], seen["kwargs"]
        if self.layer._biases or self._kwargs.get("position_embeddings") is not None:
            raise ConfigError(
                f"Attention maps are not made for {type(block).__name__}, whose attention also depends on positions."
            )
        self.at = self.layer.position(self.adapter)
        self.attention = self._maps(seen["q"].float(), seen["k"].float(), pixel_values)

    @property
    def heads(self) -> int:
        """Number of heads of the last block."""
        return int(self.layer.stack.settings.num_attention_heads)

    def _maps(self, q: Tensor, k: Tensor, pixels: Tensor) -> Tensor:
        """Attention weights on the grid of patches.

        Queries and keys are (batch, sequence, dim).
        """
        q, k = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k))
        classes = self.layer.stack.classes
        own = q.narrow(2, self.at, classes)
        # Softmax over all keys, as in the block; only then are the columns of other tokens left out.
        weights = (own @ k.mT / own.shape[-1] ** 0.5).softmax(-1)
        tokens, _ = split(weights, classes, self.at, dim=3)
        patches = tokens[..., self.layer.stack.prefix_tokens :]
        patch = self.layer.stack.settings.patch_size
        height, width = patch if isinstance(patch, list | tuple) else (patch, patch)
        grid = (pixels.shape[-2] // height, pixels.shape[-1] // width)
        if patches.shape[-1] != grid[0] * grid[1]:
            raise ConfigError(
                f"Attention maps need a token for each of {grid[0]} x {grid[1]} patches, and "
                f"{type(self.layer.base_layer).__name__} has {patches.shape[-1]}."
            )
        return patches.transpose(1, 2).unflatten(-1, grid)

    @torch.no_grad()
    def without(self, row: int, target: int, heads: Tensor) -> Tensor:
        """Probability (n,) of class `target` for an image without some heads.

        Args:
            row: index of the image.
            target: index of the class.
            heads: bool (n, heads), true for a head that the class prompt has lost.
        """

        values: list[Tensor] = []

        def lose(mixed: Tensor, uniform: Tensor | int) -> Tensor:
            # What the class prompt has at the lost heads, in queries or in what attention makes of the values.
            changed = mixed.clone()
            own = changed[:, self.at + target].unflatten(-1, (self.heads, -1))
            changed[:, self.at + target] = torch.where(heads[..., None], uniform, own).flatten(-2)
            return changed

        def over_patches(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            tokens, _ = split(values[0], self.layer.stack.classes, self.at)
            patches = tokens[:, self.layer.stack.prefix_tokens :]
            return (lose(args[0], patches.mean(1).unflatten(-1, (self.heads, -1))), *args[1:])

        block = self.layer.base_layer
        if self.blur == "patches":
            handles = [
                _projection(block, "v_proj").register_forward_hook(lambda m, a, out: values.append(out)),
                _projection(block, "o_proj", "out_proj").register_forward_pre_hook(over_patches),
            ]
        else:
            # A query of zero attends to all keys alike.
            handles = [self._queries.register_forward_hook(lambda m, a, out: lose(out, 0))]
        try:
            hidden, *rest = self._args
            repeated = hidden[row : row + 1].expand(len(heads), -1, -1)
            out = block(repeated, *rest, **self._kwargs)
        finally:
            for handle in handles:
                handle.remove()
        out = out[0] if isinstance(out, tuple) else out
        _, prompts = split(out, self.layer.stack.classes, self.at)
        return self.layer.logits(self.adapter, prompts).float().softmax(-1)[:, target]

    def needed_heads(self, row: int, target: int, keep: int | None = None) -> list[int]:
        """Heads that a class needs in one image, by greedy removal.

        The head whose loss costs least probability goes first.

        Args:
            row: index of the image.
            target: index of the class.
            keep: heads that remain; by default `KEPT_HEADS`, or half of them where there are few.

        Raises:
            ConfigError: `keep` is out of range.
        """
        keep = min(KEPT_HEADS, (self.heads + 1) // 2) if keep is None else keep
        if not 1 <= keep <= self.heads:
            raise ConfigError(f"{keep} heads cannot be kept: the last block has {self.heads}.")
        lost = torch.zeros(self.heads, dtype=torch.bool, device=self.logits.device)
        while int((~lost).sum()) > keep:
            # One row per head that could go next, all in one batch.
            candidates = (~lost).nonzero().flatten()
            trials = lost.repeat(len(candidates), 1)
            trials[torch.arange(len(candidates)), candidates] = True
            lost = trials[int(self.without(row, target, trials).argmax())]
        return (~lost).nonzero().flatten().tolist()


def _scoring_layer(model: nn.Module) -> Any:
    """Last block's layer of the active adapter with class prompts."""
    layers = [m for m in model.modules() if isinstance(m, SequenceLayer) and m.config_cls.produces_logits]
    last = [m for m in layers if m.depth == m.num_blocks - 1 and {*m.active_adapters} & {*m.configs}]
    if not last or last[0].disable_adapters:
        raise ConfigError(f"{type(model).__name__} has no active adapter with a prompt for each class.")
    return last[0]


def _projection(block: nn.Module, *names: str) -> nn.Module:
    """Module of a block by the last part of its path."""
    found = [module for path, module in block.named_modules() if path.rpartition(".")[2] in names]
    if len(found) != 1:
        raise ConfigError(
            f"{type(block).__name__} has {len(found)} modules named {' or '.join(names)}; attention maps need one."
        )
    return found[0]


# The picture ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """Row of the picture: an image and one class's attention maps.

    Attributes:
        pixels: the image as the model gets it, (height, width, 3) from 0 to 1.
        title: class and probability.
        maps: (heads, rows, columns).
        needed: heads that the class needs.
        first: True if the image is shown in full in this row.
    """

    pixels: Any
    title: str
    maps: Any
    needed: Sequence[int]
    first: bool


def panels(
    model: Any,
    processor: Any,
    images: Sequence[Image],
    classes: Sequence[str] | None = None,
    rivals: int = 2,
    keep: int | None = None,
    blur: Blur = "keys",
) -> list[Panel]:
    """Make the rows of a picture, one for each image and class.

    The classes are the named ones, or the predicted one and its rivals.

    Args:
        model: with an adapter of a method with class prompts.
        processor: image processor of the model.
        images: RGB images.
        classes: names of the classes to show, in this order.
        rivals: number of the likeliest other classes, if none are named.
        keep: heads that remain when those that a class does not need are taken away.
        blur: what a head that is taken away looks at evenly: all "keys", or the "patches" alone.

    Raises:
        ConfigError: an unknown class, or what `LastBlock` and `needed_heads` refuse.
    """
    # Names are checked before the model runs.
    names = _class_names(model)
    for name in classes or ():
        if name not in names:
            raise ConfigError(f'"{name}" is no class of this model.{did_you_mean(name, names)}')
    pixels = processor(list(images), return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
    block = LastBlock(model, pixels, blur)
    found = []
    for row, logits in enumerate(block.logits):
        probabilities = logits.softmax(-1)
        likely = probabilities.argsort(descending=True)[: 1 + rivals].tolist()
        targets = [names.index(name) for name in classes] if classes else likely
        for number, target in enumerate(targets):
            mark = "  predicted" if target == likely[0] else ""
            found.append(
                Panel(
                    _shown(pixels[row].float(), processor),
                    f"{plain(names[target], _LONGEST)}\n{100 * float(probabilities[target]):.1f} %{mark}",
                    block.attention[row, target].cpu().numpy(),
                    block.needed_heads(row, target, keep),
                    first=number == 0,
                )
            )
    return found


def named_classes(model: Any, given: Sequence[str]) -> list[str]:
    """Parse texts into names of classes.

    A text is one name, which may hold commas, or several names with commas between them.
    """
    known = _class_names(model)
    found = []
    for text in given:
        names = [text] if text in known else text.split(",")
        found += [name.strip() for name in names]
    return found


def _class_names(model: Any) -> list[str]:
    return [str(model.config.id2label[i]) for i in range(model.config.num_labels)]


def _shown(pixels: Tensor, processor: Any) -> Any:
    """Convert the processor's pixels (3, height, width) back to an image."""
    if getattr(processor, "do_normalize", False):
        mean = torch.tensor(processor.image_mean)[:, None, None]
        std = torch.tensor(processor.image_std)[:, None, None]
        pixels = pixels.cpu() * std + mean
    return pixels.clamp(0, 1).permute(1, 2, 0).cpu().numpy()


def draw(rows: Sequence[Panel]) -> Figure:
    """Draw a figure with a line per panel.

    A line has the image, then a map for each head.

    Heads that the class needs are framed. Each map is scaled from 0 to its own highest value, which stands below it as
    a multiple of an even share among the patches; where that is below one, the map is faint.
    """
    from matplotlib.figure import Figure

    heads = len(rows[0].maps)
    size = (_HEAD_INCHES * (heads + 1) + 0.2, (_HEAD_INCHES + 0.28) * len(rows) + 0.6)
    figure = Figure(figsize=size, dpi=_DPI, facecolor="white", layout="constrained")
    grid: Any = figure.subplots(len(rows), heads + 1, squeeze=False)
    for line, panel in zip(grid, rows, strict=True):
        _draw_image(line[0], panel)
        for head, axes in enumerate(line[1:]):
            _draw_map(axes, panel, head)
    for head, axes in enumerate(grid[0][1:], 1):
        axes.set_title(f"head {head}", size=8, color=_INK)
    figure.supxlabel(_NOTE, size=7, color=_INK)
    return figure


def _draw_image(axes: Axes, panel: Panel) -> None:
    _bare(axes, _FAINT, 0.5)
    axes.imshow(panel.pixels, interpolation="nearest", alpha=1.0 if panel.first else 0.35)
    axes.set_xlabel(panel.title, size=7.5, color=_INK)


def _draw_map(axes: Axes, panel: Panel, head: int) -> None:
    needed = head in panel.needed
    _bare(axes, _ACCENT if needed else _FAINT, 2.0 if needed else 0.5)
    height, width = panel.pixels.shape[:2]
    grey = panel.pixels.mean(-1)
    axes.imshow(grey, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    heat = panel.maps[head]
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    highest = heat.max() * heat.size
    # The image shows through where attention is low; a head that attends to no patch leaves hardly a trace.
    strength = (0.25 + 0.6 * heat / heat.max()) * min(1.0, highest)
    axes.imshow(heat, cmap="inferno", vmin=0, alpha=strength, interpolation="bilinear", extent=extent)
    axes.set_xlabel(f"{highest:.1f}x", size=7, color=_INK)


def _bare(axes: Axes, colour: str, width: float) -> None:
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=width)


def write(
    model: Any, processor: Any, images: Sequence[Image], output: Path, progress: Callable[[str], None], **options: Any
) -> None:
    """Write the picture of `panels` as a PNG file.

    Raises:
        ConfigError: more images than a picture can hold, or what `panels` refuses.
    """
    # Checked before the model runs, because matplotlib fails at the end of all work.
    lines = len(options.get("classes") or ()) or min(1 + options.get("rivals", 2), model.config.num_labels)
    most = int((_MOST_PIXELS / _DPI - 0.6) / (_HEAD_INCHES + 0.28)) // lines
    if len(images) > most:
        raise ConfigError(
            f"{len(images)} images make a picture higher than a file can hold; give at most {most} at a time."
        )
    rows = panels(model, processor, images, **options)
    for panel in rows:
        progress(f"{' '.join(panel.title.split())}: heads {', '.join(str(h + 1) for h in panel.needed)}")
    draw(rows).savefig(output)
