"""Diagrams: curves over epochs, a point per head, a point per image; drawn with matplotlib as in ``figures.py``."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from beit.visualization.curves import PARTS, Curve
from beit.visualization.figures import COLOURS, LEGEND_POINTS, legend_size, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

DIAGRAM_INCHES = (4.0, 2.8)
SCATTER_INCHES = 5.5
MAX_COLUMNS = 4
MAX_TICKS = 9
MAX_NAME = 24  # letters of a class in a legend
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")  # eight, with seven colours: pairs repeat only after 56
SIZES = {"*": 2.0, "P": 1.3, "X": 1.3, "D": 0.8}  # relative marker areas, for equal visual weight
OTHERS = "#BBBBBB"
MARKERS_A_CURVE = 12
STYLES = {"train": "-", "test": "--", "baseline": ":"}


def draw_curves(path: str | Path, diagrams: Mapping[str, Sequence[Curve]], title: str = "") -> None:
    """Draws one diagram per metric to a PNG or SVG file, over epochs or optimizer steps.

    The curves of a single run differ by colour. With several runs, runs differ by colour and marker, and training,
    test and baseline by line style; all diagrams share one legend. ``diagrams`` maps titles to curves, at least one,
    from :func:`beit.visualization.curves.overlaid`.
    """
    columns = min(MAX_COLUMNS, math.ceil(math.sqrt(len(diagrams))))
    rows = math.ceil(len(diagrams) / columns)
    runs = 1 + max(curve.run for curves in diagrams.values() for curve in curves)
    figure = new_figure(columns * DIAGRAM_INCHES[0], rows * DIAGRAM_INCHES[1], layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    legend: dict[tuple[int, str], Line2D] = {}
    for axes, (metric, curves) in zip(grid.flat, diagrams.items(), strict=False):
        legend |= _plot(axes, metric.replace("_", " "), curves, runs)
        if runs == 1:
            axes.legend(fontsize=7)
    for axes in grid.flat[len(diagrams) :]:
        axes.set_visible(False)
    if runs > 1:
        _legend_below(figure, legend)
    if title:
        figure.suptitle(title, fontsize=11)
    save_figure(figure, path)


def _plot(axes: "Axes", title: str, curves: Sequence[Curve], runs: int) -> "dict[tuple[int, str], Line2D]":
    lines: dict[tuple[int, str], Line2D] = {}
    for number, curve in enumerate(curves):
        look, points = curve.run if runs > 1 else number, len(curve.epochs)
        # Staggered markers keep coinciding runs visible; with too few points, those below stick out.
        step = max(math.ceil(points / MARKERS_A_CURVE), min(runs, points)) if runs > 1 else 1
        size = 3.0 if runs == 1 else 4.0 if points >= runs else 4.0 + 3 * (runs - 1 - look)
        (lines[curve.run, curve.part or curve.label],) = axes.plot(
            curve.epochs, curve.values, color=COLOURS[look % len(COLOURS)], linestyle=STYLES.get(curve.part, "-"),
            linewidth=1.4, marker=MARKERS[look % len(MARKERS)] if runs > 1 else "o" if points <= 20 else "",
            markersize=size, markevery=(look % step, step), label=curve.label,
        )  # fmt: skip
    steps = any(curve.unit == "step" for curve in curves)
    x = "optimizer step" if steps else "epoch (n ends with checkpoint n \u2212 1)"
    _label(axes, title, x, ticks=6 if steps else MAX_TICKS)
    return lines


def _label(axes: "Axes", title: str, x: str, y: str = "", ticks: int | None = None) -> None:
    """Sets title and labels; with ``ticks``, the x axis has at most that many ticks, at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x, fontsize=8.5)
    axes.set_ylabel(y, fontsize=8.5)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    if ticks is not None:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=ticks, integer=True))


def _legend_below(figure: "Figure", lines: "Mapping[tuple[int, str], Line2D]") -> None:
    """Puts a legend below all diagrams, with the entries of each run in one column."""
    from matplotlib.lines import Line2D

    parts = sorted({part for _, part in lines}, key=lambda part: [*PARTS, part].index(part))
    entries = []
    for run in sorted({run for run, _ in lines}):
        for part in parts:
            entries.append(Line2D([], [], linestyle="none", label=" "))
            if (run, part) in lines:
                entries[-1].update_from(lines[run, part])
                entries[-1].set(markersize=4, markevery=1, label=lines[run, part].get_label())
    width, height = figure.get_size_inches()
    columns, _ = legend_size([str(entry.get_label()) for entry in entries], width, symbol=10)
    rows = math.ceil(len(entries) / len(parts) / columns) * len(parts)
    columns = math.ceil(len(entries) / rows)
    filler = Line2D([], [], linestyle="none", label=" ")
    entries += [filler] * (rows * columns - len(entries))  # matplotlib fills columns evenly, which would split a run
    figure.set_size_inches(width, height + rows * LEGEND_POINTS * 1.6 / 72 + 0.1)
    figure.legend(
        handles=entries, loc="outside lower center", ncols=columns, fontsize=LEGEND_POINTS, frameon=False,
        handlelength=3,
    )  # fmt: skip


def draw_heads(
    path: str | Path, values: Tensor, label: str, title: str = "", reference: tuple[str, float] | None = None
) -> None:
    """Draws a number per head over the blocks: a point per head, and a line through the means of the blocks.

    Values are ``(blocks, heads)``, the label says what they are, with their unit; ``reference`` is the name and value
    of a horizontal line to compare with.
    """
    blocks = range(len(values))
    figure = new_figure(max(DIAGRAM_INCHES[0] * 1.25, 0.35 * len(values) + 1), DIAGRAM_INCHES[1] * 1.2, "constrained")
    axes = figure.subplots()
    axes.plot(blocks, values.mean(dim=1), "-", color=COLOURS[1], linewidth=1.6, label="mean of the heads")
    points = axes.plot(blocks, values, "o", markersize=4, alpha=0.6, mew=0, color=COLOURS[0])
    points[0].set_label("a head")
    if reference is not None:
        axes.axhline(reference[1], color="black", linestyle=":", linewidth=1, label=reference[0])
    axes.set_ylim(0, 1.08 * max(values.max().item(), reference[1] if reference else 0))
    _label(axes, title, "block", label, ticks=MAX_TICKS)
    figure.legend(loc="outside lower center", ncols=3, fontsize=LEGEND_POINTS, frameon=False)
    save_figure(figure, path)


def draw_points(
    path: str | Path,
    groups: Sequence[tuple[str, Tensor]],
    axes_names: tuple[str, str],
    title: str = "",
    others: tuple[str, Tensor] | None = None,
) -> None:
    """Draws groups of points ``(n, 2)``, each with its own colour and marker, and a legend beside them.

    The markers of every second seven groups are hollow; ``others``, of the remaining classes, are grey and behind all.
    """
    figure = new_figure(SCATTER_INCHES * 1.25, SCATTER_INCHES, "constrained")
    axes = figure.subplots()
    area = min(36.0, max(8.0, 9000 / max(sum(len(points) for _, points in groups), 1)))
    if others is not None:  # first, so that they cover nothing
        _scatter(axes, *others, area, OTHERS, ".")
    for number, (name, points) in enumerate(groups):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        _scatter(axes, name, points, area, colour, marker, hollow=number // len(COLOURS) % 2 == 1)
    _label(axes, title, *axes_names)
    handles, _ = axes.get_legend_handles_labels()
    handles = handles[1:] + handles[:1] if others else handles
    legend = figure.legend(handles=handles, loc="outside right upper", fontsize=LEGEND_POINTS + 1, frameon=False)
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set(sizes=[40.0], alpha=1)
    save_figure(figure, path)


def _scatter(
    axes: "Axes", name: str, points: Tensor, area: float, colour: str, marker: str, hollow: bool = False
) -> None:
    label = name if len(name) <= MAX_NAME else name[: MAX_NAME - 1] + "…"
    axes.scatter(
        points[:, 0], points[:, 1], s=area * SIZES.get(marker, 1), marker=marker, alpha=0.8, label=label,
        facecolors="none" if hollow else colour, edgecolors=colour if hollow else "white",
        linewidths=1.0 if hollow else 0.2,
    )  # fmt: skip
