"""Drawing: the only module that knows matplotlib, and it imports it only when something is drawn."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from beit.storage import atomic_write
from beit.visualization.curves import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL_INCHES = 1.6
DIAGRAM_INCHES = (4.0, 2.8)
SEGMENTATION_INCHES = 4.0
LEGEND_POINTS = 8
LEGEND_SPACING = 0.37  # between two lines, in heights of a letter
DIAGRAMS_A_ROW = 4
DPI = 150
STYLES = {"train": "-", "test": "--"}


def draw_panels(path: str | Path, panels: Mapping[str, Tensor], captions: Sequence[str] = (), title: str = "") -> None:
    """Draws images in a table: one column a version, one row an image.

    Args:
        path: The PNG file to write.
        panels: Title of a column → its images ``(B, 3, H, W)`` in [0, 1]; the sizes may differ from column to column.
        captions: A line under each row's last image; none by default.
        title: A line above all.
    """
    rows = len(next(iter(panels.values())))
    foot = 0.22 if captions else 0.0
    head = 0.35 + (0.3 if title else 0.0)
    height = rows * (PANEL_INCHES + foot) + head
    figure = _new_figure(len(panels) * PANEL_INCHES + 0.2, height)
    grid = figure.subplots(
        rows,
        len(panels),
        squeeze=False,
        gridspec_kw={"left": 0.01, "right": 0.99, "bottom": foot / height, "top": 1 - head / height,
                     "wspace": 0.05, "hspace": 0.05 + foot / PANEL_INCHES},
    )  # fmt: skip
    for column, (name, images) in enumerate(panels.items()):
        grid[0][column].set_title(name, fontsize=8, pad=4)
        for row in range(rows):
            _show(grid[row][column], images[row])
    for row, caption in enumerate(captions):
        grid[row][-1].set_xlabel(caption, fontsize=7.5, labelpad=2)
    if title:
        figure.suptitle(title, fontsize=10, y=1 - 0.12 / height, va="top")
    _save(figure, path)


def _show(axes: "Axes", image: Tensor, interpolation: str = "nearest") -> None:
    axes.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation=interpolation)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def draw_segmentation(
    path: str | Path,
    panels: Mapping[str, Tensor],
    legend: Sequence[tuple[str, tuple[int, int, int]]],
    title: str = "",
) -> None:
    """Draws versions of one image side by side, and under them what the colours mean.

    Args:
        path: The PNG file to write.
        panels: Title of a version → its picture, uint8 ``(3, H, W)``; all are of one size.
        legend: Names and colours (red, green, blue, 0 to 255), in the order in which to list them, down the columns.
        title: A line above all.
    """
    height, width = next(iter(panels.values())).shape[-2:]
    # An extreme panorama would be a thin line; drawn higher than it is, it would be wrong. It has room at its sides.
    scale = SEGMENTATION_INCHES / max(height, width)
    panel_width, panel_height = max(width * scale, 1.5), max(height * scale, 0.5)
    total_width = len(panels) * (panel_width + 0.08) + 0.08
    columns, rows = _legend_shape([name for name, _ in legend], total_width)
    foot = 0.08 + (rows * LEGEND_POINTS * (1 + LEGEND_SPACING) / 72 + 0.15 if legend else 0)
    head = 0.3 + (0.2 if title else 0)
    total_height = head + panel_height + foot
    figure = _new_figure(total_width, total_height)
    for column, (name, picture) in enumerate(panels.items()):
        left = 0.08 + column * (panel_width + 0.08)
        place = (left / total_width, foot / total_height, panel_width / total_width, panel_height / total_height)
        axes = figure.add_axes(place)
        _show(axes, picture.float() / 255, interpolation="antialiased")
        axes.set_title(name, fontsize=9, pad=4)
    if legend:
        _draw_legend(figure, legend, columns)
    if title:
        figure.suptitle(title, fontsize=10, y=1 - 0.08 / total_height, va="top")
    _save(figure, path)


def _legend_shape(names: Sequence[str], inches: float) -> tuple[int, int]:
    """Returns how many columns fit into a width, and how many rows that makes."""
    letter = LEGEND_POINTS * 0.6 / 72  # a little more than the mean of the font
    entry = (max(map(len, names), default=0) + 5) * letter  # with its patch of colour and the gap to the next
    columns = max(1, min(len(names), int(inches / entry)))
    return columns, math.ceil(len(names) / columns)


def _draw_legend(figure: "Figure", legend: Sequence[tuple[str, tuple[int, int, int]]], columns: int) -> None:
    from matplotlib.patches import Patch

    patches = [
        Patch(facecolor=(red / 255, green / 255, blue / 255), edgecolor="black", linewidth=0.4, label=name)
        for name, (red, green, blue) in legend
    ]
    figure.legend(
        handles=patches, loc="lower center", bbox_to_anchor=(0.5, 0), ncols=columns, fontsize=LEGEND_POINTS,
        frameon=False, borderaxespad=0.2, borderpad=0, labelspacing=LEGEND_SPACING, handlelength=1.4, handletextpad=0.5,
        columnspacing=1.4,
    )  # fmt: skip


def draw_curves(path: str | Path, diagrams: Mapping[str, Sequence[Curve]], title: str = "") -> None:
    """Draws one diagram a metric, over epochs.

    Args:
        path: The PNG file to write.
        diagrams: What :func:`beit.visualization.curves.diagrams` returns.
        title: A line above all.
    """
    columns = min(DIAGRAMS_A_ROW, math.ceil(math.sqrt(len(diagrams))))
    rows = math.ceil(len(diagrams) / columns)
    figure = _new_figure(columns * DIAGRAM_INCHES[0], rows * DIAGRAM_INCHES[1], layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (metric, curves) in zip(grid.flat, diagrams.items(), strict=False):
        _plot(axes, metric, curves)
    for axes in grid.flat[len(diagrams) :]:
        axes.set_visible(False)
    if title:
        figure.suptitle(title, fontsize=11)
    _save(figure, path)


def _plot(axes: "Axes", metric: str, curves: Sequence[Curve]) -> None:
    from matplotlib.ticker import MaxNLocator

    for curve in curves:
        marker = "o" if len(curve.epochs) <= 20 else ""
        style = STYLES.get(curve.label.split()[-1], "-")
        axes.plot(curve.epochs, curve.values, linestyle=style, marker=marker, markersize=3, label=curve.label)
    axes.set_title(metric.replace("_", " "), fontsize=10)
    axes.set_xlabel("epoch", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _new_figure(width: float, height: float, layout: str | None = None) -> "Figure":
    # A figure without pyplot: no window system is asked for, nothing stays in memory, threads may draw too.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout=layout)  # type: ignore[arg-type]
    FigureCanvasAgg(figure)
    return figure


def _save(figure: "Figure", path: str | Path) -> None:
    with atomic_write(path) as file:
        figure.savefig(file, format="png", facecolor="white")
