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


def _show(axes: "Axes", image: Tensor) -> None:
    axes.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


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
