"""Figures drawn with matplotlib: intervals, Pareto fronts, learning rates, learning curves.

Every figure is 4 inches wide with text of 8 to 9 points, so that it stays readable at the width of a phone.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from peft_lab.comparison.report.sentences import metric_title, number
from peft_lab.comparison.stats.cell_baselines import cell_baselines
from peft_lab.comparison.stats.pareto import pareto_front
from peft_lab.comparison.stats.statistics import CellResult
from peft_lab.utils.text import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

WIDTH, DPI = 4.0, 170

Curve = Sequence[Sequence[float]]


@dataclass(frozen=True)
class ColourScheme:
    """Colours of a light or a dark page."""

    paper: str
    ink: str
    faint: str
    accent: str
    arms: tuple[str, ...]


LIGHT = ColourScheme(
    *("#ffffff", "#1d2733", "#9aa5b1", "#1f5fa8"),
    ("#1f5fa8", "#c8551b", "#2b8552", "#a92b74", "#86690a", "#654ba3", "#0d8486", "#bb3a2c", "#566573", "#7c5238"),
)
DARK = ColourScheme(
    *("#14191f", "#e4e9ee", "#6b7783", "#7ab3ef"),
    ("#7ab3ef", "#f39c6b", "#6fcf97", "#ee8cc4", "#d9bd4a", "#b5a2e8", "#5fd0d2", "#f08a80", "#aab7c4", "#c9a27e"),
)
_STYLES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")


@dataclass(frozen=True)
class Line:
    """Line of a chart; `ringed` is the index of a ringed point."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    ringed: int | None = None


def render(draw: Callable[[ColourScheme], Figure], scheme: ColourScheme) -> bytes:
    """Render a figure as PNG.

    It has 256 colours, which makes it a third of the size of one with all.
    """
    from matplotlib import style
    from PIL import Image

    # a report holds dozens of figures, twice each, in one file
    drawn, buffer = io.BytesIO(), io.BytesIO()
    # a matplotlibrc of the working directory may be anybody's, and ask for a run of LaTeX
    with style.context("default"):
        draw(scheme).savefig(drawn, format="png", dpi=DPI, facecolor=scheme.paper)
    Image.open(drawn).convert("RGB").quantize(256).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def forest(cell: CellResult, scheme: ColourScheme) -> Figure:
    """Draw means with their intervals, best on top, and the best baseline.

    Arms that differ significantly from the best are faint.
    """
    figure, axes = _axes(scheme, 0.75 + 0.27 * len(cell.arms))
    # heights grow upwards, so the best arm is drawn last
    for place, arm in enumerate(reversed(cell.arms)):
        # faint is what the test separates, not what merely has a lower mean
        near = arm.versus_best is None or arm.label in cell.indistinguishable
        colour = scheme.accent if near else scheme.faint
        if arm.score.low is not None and arm.score.high is not None:
            axes.plot([arm.score.low, arm.score.high], [place, place], color=colour, lw=2, solid_capstyle="butt")
        axes.plot(list(arm.by_seed.values()), [place] * len(arm.by_seed), "|", color=scheme.ink, ms=6, mew=0.8)
        axes.plot(arm.score.value, place, "o", color=colour, ms=6)
    axes.set_yticks(range(len(cell.arms)), [plain(arm.label) for arm in reversed(cell.arms)])
    axes.set_ylim(-0.6, len(cell.arms) - 0.4)
    axes.locator_params(axis="x", nbins=6)
    axes.set_xlabel(_with_baseline(cell, axes.axvline, scheme))
    axes.grid(axis="x", color=scheme.faint, alpha=0.3, lw=0.6)
    return figure


def _with_baseline(cell: CellResult, draw_line: Callable[..., Any], scheme: ColourScheme) -> str:
    """Draw the best baseline as a dashed line, and return the words for the axis of the scores.

    A baseline that lies further from the arms than these from one another is named alone, because a line would leave
    them no room.
    """
    title, known = metric_title(cell.metric), cell_baselines(cell)
    if not known:
        return title
    values = [end for arm in cell.arms for end in (arm.score.low, arm.score.value, arm.score.high) if end is not None]
    least, most, baseline = min(values), max(values), known[0].score
    # one arm alone has a line beside it in any case
    room = max(most - least, 0.05 * abs(most))
    if least - room <= baseline <= most + room:
        draw_line(baseline, color=scheme.ink, ls=(0, (4, 3)), lw=1.1, zorder=2)
        return f"{title} (dashed: best baseline, {number(baseline)})"
    return f"{title} (best baseline, {number(baseline)}, is further {'down' if baseline < least else 'up'})"


def pareto(cell: CellResult, cost: Mapping[str, float], title: str, scheme: ColourScheme) -> Figure:
    """Draw score against cost.

    The Pareto front is joined by a line, its labels are bold.

    Args:
        cell: the arms with their scores.
        cost: label of an arm -> cost, of which less is better; arms without one are left out.
        title: words for the axis.
    """
    arms = [arm for arm in cell.arms if arm.label in cost]
    points = [(cost[arm.label], arm.score.value) for arm in arms]
    front = pareto_front(points, (False, cell.higher_is_better))
    figure, axes = _axes(scheme, 3.1)
    # costs that span more than a factor of 20 crowd at one end of a linear axis
    if min(x for x, _ in points) > 0 and max(x for x, _ in points) > 20 * min(x for x, _ in points):
        axes.set_xscale("log")
    else:
        axes.locator_params(axis="x", nbins=6)
    # the front is a staircase: between two arms the cheaper one's score is what can be had
    staircase = sorted(point for point, on in zip(points, front, strict=True) if on)
    axes.step(*zip(*staircase, strict=True), where="post", color=scheme.accent, lw=1.2, alpha=0.6)
    for arm, (x, y), on in zip(arms, points, front, strict=True):
        colour = scheme.accent if on else scheme.faint
        if arm.score.low is not None and arm.score.high is not None:
            axes.plot([x, x], [arm.score.low, arm.score.high], color=colour, lw=0.9, alpha=0.4)
        axes.plot(x, y, "o", ms=6, mfc=colour if on else scheme.paper, mec=colour, zorder=4 if on else 3)
    axes.margins(x=0.14, y=0.1)
    axes.set_xlabel(title)
    label = _with_baseline(cell, axes.axhline, scheme)
    # a long label would not fit the height of the figure
    axes.set_ylabel(label.replace(" (", "\n(", 1))
    axes.grid(color=scheme.faint, alpha=0.25, lw=0.6)
    place_labels(axes, points, [plain(arm.label, 22) for arm in arms], front, scheme)
    return figure


def chart(
    lines: Sequence[Line], order: Sequence[str], labels: tuple[str, str], scheme: ColourScheme, log_x: bool = False
) -> Figure:
    """Draw lines over one axis with a legend below.

    An arm has the same colour and marker in all charts of a report. The y axis is logarithmic where one line, such as
    the perplexity of a diverging run, would flatten all others.

    Args:
        lines: what to draw.
        order: all arms of the report, which fixes the colours.
        labels: of the x and the y axis.
        log_x: logarithmic x axis, with markers at the points.
    """
    rows = (len(lines) + 1) // 2
    figure, axes = _axes(scheme, 2.6 + 0.19 * rows)
    for line in lines:
        index = order.index(line.label)
        # colours repeat after ten arms, with another line style
        colour = scheme.arms[index % len(scheme.arms)]
        style = _STYLES[index // len(scheme.arms) % len(_STYLES)]
        marker = _MARKERS[index % len(_MARKERS)] if log_x or len(line.x) < 4 else None
        axes.plot(line.x, line.y, style, marker=marker, color=colour, lw=1.5, ms=4.5, label=f"{plain(line.label, 24)}")
        if line.ringed is not None:
            axes.plot(line.x[line.ringed], line.y[line.ringed], "o", ms=10, mfc="none", mec=colour, mew=1.3)
    if log_x:
        axes.set_xscale("log")
        _tick_at(axes, np.unique(np.concatenate([line.x for line in lines])).tolist())
    heights = np.concatenate([line.y for line in lines])
    if min(heights) > 0 and max(heights) > 20 * np.median(heights):
        axes.set_yscale("log")
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.grid(color=scheme.faint, alpha=0.25, lw=0.6)
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=8,
        labelcolor=scheme.ink,
    )
    return figure


#: Most classes that a heat map has counts and names for, and most that it is drawn for.
NAMED_CLASSES, DRAWN_CLASSES = 12, 100


def heat_map(counts: np.ndarray, labels: Sequence[str], scheme: ColourScheme) -> Figure:
    """Draw a confusion matrix, each true class by the shares of its rows.

    Args:
        counts: numbers of rows, (true classes, predicted classes).
        labels: names of the classes.
        scheme: the colours.
    """
    from matplotlib.colors import LinearSegmentedColormap

    few = len(labels) <= NAMED_CLASSES
    figure, axes = _axes(scheme, 3.6)
    rows = counts.sum(1, keepdims=True)
    shares = np.divide(counts, rows, out=np.zeros(counts.shape), where=rows > 0)
    colours = LinearSegmentedColormap.from_list("shares", (scheme.paper, scheme.accent))
    axes.imshow(shares, cmap=colours, vmin=0, vmax=1)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    if not few:
        axes.locator_params(nbins=10, integer=True)
        return figure
    names = [plain(label, 16) for label in labels]
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    size = 8 if len(names) <= 8 else 6.5
    for (row, column), count in np.ndenumerate(counts):
        # the accent is dark on a light page and light on a dark one, so paper is readable on it
        colour = scheme.paper if shares[row, column] > 0.6 else scheme.ink
        if count:
            axes.text(column, row, f"{count:,}", ha="center", va="center", fontsize=size, color=colour)
    return figure


def _tick_at(axes: Axes, values: Sequence[float]) -> None:
    """Set the ticks of a logarithmic x axis at the values.

    Values too near to the last tick are left out.
    """
    gap, ticks = 0.15 * np.log(values[-1] / values[0]), list(values[:1])
    for value in values[1:]:
        if np.log(value / ticks[-1]) >= gap:
            ticks.append(value)
    axes.set_xticks(ticks, [f"{value:g}" for value in ticks])
    axes.set_xticks([], minor=True)


def place_labels(
    axes: Axes, points: Sequence[tuple[float, float]], labels: Sequence[str], bold: Sequence[bool], scheme: ColourScheme
) -> list[Annotation]:
    """Write labels beside points so that none covers another or a point.

    Distant labels get a thin leader line. Places are tried in rings of growing radius; a label that fits nowhere inside
    the axes stands at the last place.
    """
    from matplotlib.patheffects import withStroke

    figure = axes.get_figure(root=True)
    if figure is None:
        raise ValueError("The axes belong to no figure.")
    figure.draw_without_rendering()  # from here on the layout is fixed and sizes in pixels are known
    figure.set_layout_engine("none")
    pixels = axes.transData.transform(np.asarray(points, dtype=float))
    # the points themselves must stay visible
    taken = [_box(x, y, 14, 14) for x, y in pixels]
    # places are found in pixels, but offsets are given in points of 1/72 inch
    scale = figure.dpi / 72
    placed = []
    # from the top down, so that the places do not depend on the order of the arms
    for index in sorted(range(len(labels)), key=lambda i: -pixels[i][1]):
        x, y = pixels[index]
        text = axes.annotate(
            labels[index],
            points[index],
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=8,
            color=scheme.ink,
            fontweight="bold" if bold[index] else "normal",
            va="center",
            ha="center",
            path_effects=[withStroke(linewidth=2.5, foreground=scheme.paper)],
        )
        extent = text.get_window_extent()
        width, height = extent.width, extent.height
        dx, dy = _free_place((x, y), (width, height), taken, axes.get_window_extent().extents)
        text.set_position((dx / scale, dy / scale))
        if max(abs(dx) - width / 2, abs(dy) - height / 2) > 12 * scale:
            leader = {"arrowstyle": "-", "color": scheme.faint, "lw": 0.6, "shrinkA": 0, "shrinkB": 3}
            axes.annotate("", points[index], (dx / scale, dy / scale), textcoords="offset points", arrowprops=leader)
        taken.append(_box(x + dx, y + dy, width, height))
        placed.append(text)
    return placed


_Box = tuple[float, float, float, float]


def _free_place(
    point: tuple[float, float], size: tuple[float, float], taken: Sequence[_Box], inside: Any
) -> tuple[float, float]:
    """Find the nearest offset, in pixels, at which a label covers nothing.

    The offset is from the point to the middle of the label.
    """
    dx = dy = 0.0
    for gap in range(9, 260, 9):
        for angle in np.deg2rad((0, 180, 90, 270, 45, 315, 135, 225, 22, 338, 158, 202)):
            dx = float(np.cos(angle)) * (gap + size[0] / 2)
            dy = float(np.sin(angle)) * (gap + size[1] / 2)
            x0, y0, x1, y1 = _box(point[0] + dx, point[1] + dy, *size)
            within = x0 >= inside[0] and y0 >= inside[1] and x1 <= inside[2] and y1 <= inside[3]
            covers = any(x0 < box[2] and x1 > box[0] and y0 < box[3] and y1 > box[1] for box in taken)
            if within and not covers:
                return dx, dy
    return dx, dy


def _box(x: float, y: float, width: float, height: float) -> _Box:
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _axes(scheme: ColourScheme, height: float) -> tuple[Figure, Axes]:
    """Make a figure with one plot area, in the scheme's colours."""
    from matplotlib.figure import Figure

    # not by pyplot, which keeps every figure until it is closed
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained", facecolor=scheme.paper)
    axes = figure.add_subplot()
    axes.set_facecolor(scheme.paper)
    axes.tick_params(colors=scheme.ink, labelsize=8.5)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(scheme.faint)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(color=scheme.ink, size=9)
    return figure, axes
