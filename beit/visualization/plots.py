"""Drawing of diagrams: curves over epochs, a point a head, a point an image; matplotlib as in ``figures.py``."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from beit.visualization.curves import PARTS, Curve
from beit.visualization.figures import COLOURS, LEGEND_POINTS, legend_shape, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.typing import LineStyleType

DIAGRAM_INCHES = (4.0, 2.8)
SCATTER_INCHES = 5.5
DIAGRAMS_A_ROW = 4
LONGEST_NAME = 24  # letters of a class in a legend
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")  # eight, with seven colours: pairs repeat only after 56
SIZES = {"*": 2.0, "P": 1.3, "X": 1.3, "D": 0.8}  # areas of markers, so that all weigh alike
OTHERS = "#BBBBBB"
MARKERS_A_CURVE = 12
# A dash and the gap after it, in widths of the line. Training has no gap: its dashes are only seen in two colours.
DASHES = {"train": (6.0, 0.0), "test": (3.7, 1.6), "baseline": (1.0, 1.65)}
SAME = 0.005  # of a diagram's range: less than half the width of a line


def draw_curves(path: str | Path, diagrams: Mapping[str, Sequence[Curve]], title: str = "") -> None:
    """Draws one diagram a metric, over epochs or optimizer steps.

    Curves of one run differ by colour. Several runs differ by colour and marker, training, test and baselines by the
    style of the line, and all diagrams share one legend. Curves that lie on each other share their line: each shows at
    every second (third, ...) dash.

    Args:
        path: The PNG or SVG file to write.
        diagrams: At least one, from :func:`beit.visualization.curves.diagrams` or
            :func:`beit.visualization.curves.overlaid`; the keys are the titles.
        title: A line above all.
    """
    columns = min(DIAGRAMS_A_ROW, math.ceil(math.sqrt(len(diagrams))))
    rows = math.ceil(len(diagrams) / columns)
    runs = {curve.run for curves in diagrams.values() for curve in curves}
    figure = new_figure(columns * DIAGRAM_INCHES[0], rows * DIAGRAM_INCHES[1], layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    legend: dict[tuple[int, str], Line2D] = {}
    for axes, (metric, curves) in zip(grid.flat, diagrams.items(), strict=False):
        legend |= _plot(axes, metric.replace("_", " "), curves, by_run=len(runs) > 1)
        if len(runs) == 1:
            axes.legend(fontsize=7)
    for axes in grid.flat[len(diagrams) :]:
        axes.set_visible(False)
    if len(runs) > 1:
        _legend_below(figure, legend)
    if title:
        figure.suptitle(title, fontsize=11)
    save_figure(figure, path)


def _plot(axes: "Axes", title: str, curves: Sequence[Curve], by_run: bool) -> "dict[tuple[int, str], Line2D]":
    """Draws a diagram and returns its lines by run and part."""
    from matplotlib.ticker import MaxNLocator

    lines: dict[tuple[int, str], Line2D] = {}
    for number, (curve, (place, shared)) in enumerate(zip(curves, _places(curves), strict=True)):
        look = curve.run if by_run else number
        marker = MARKERS[look % len(MARKERS)] if by_run else "o" if len(curve.epochs) <= 20 else ""
        # Not all runs at the same points: a marker would hide those of the runs before.
        step = max(math.ceil(len(curve.epochs) / MARKERS_A_CURVE), min(shared, len(curve.epochs)))
        size = 4.0 if by_run else 3.0
        if len(curve.epochs) < shared:  # too few for a point each: the ones below look out
            size += 3 * (shared - 1 - place)
        (lines[curve.run, curve.part or curve.label],) = axes.plot(
            curve.epochs, curve.values, linestyle=_style(curve.part, place, shared), color=COLOURS[look % len(COLOURS)],
            linewidth=1.4, marker=marker, markersize=size, label=curve.label, zorder=2 + 0.01 * place,
            markevery=((place if shared > 1 else look) % step, step) if by_run else 1,
        )  # fmt: skip
    axes.set_title(title, fontsize=10)
    steps = any(curve.unit == "step" for curve in curves)
    axes.set_xlabel("optimizer step" if steps else "epoch (n ends with checkpoint n \u2212 1)", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6 if steps else "auto", integer=True))
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    return lines


def _places(curves: Sequence[Curve]) -> list[tuple[int, int]]:
    """Returns each curve's place among those that lie on the same line, and how many they are.

    The longest comes first: it is drawn whole, and the others over it.
    """
    every = [value for curve in curves for value in curve.values]
    near = SAME * (max(every) - min(every))
    groups: list[list[int]] = []
    for number in sorted(range(len(curves)), key=lambda number: -len(curves[number].epochs)):
        same = (group for group in groups if _lies_on(curves[number], curves[group[0]], near))
        found = next(same, None)
        if found is None:
            groups.append([number])
        else:
            found.append(number)
    places = {number: (place, len(group)) for group in groups for place, number in enumerate(group)}
    return [places[number] for number in range(len(curves))]


def _lies_on(curve: Curve, longer: Curve, near: float) -> bool:
    values = dict(zip(longer.epochs, longer.values, strict=True))
    points = zip(curve.epochs, curve.values, strict=True)
    return curve.part == longer.part and all(
        epoch in values and abs(values[epoch] - value) <= near for epoch, value in points
    )


def _style(part: str, place: int, shared: int) -> "LineStyleType":
    """Returns a line's style: of several lines in one place each but the first shows at its share of the dashes."""
    dash, gap = DASHES.get(part, DASHES["train"])
    if place == 0:
        return (0, (dash, gap)) if gap else "-"
    period = shared * (dash + gap)
    return (period - place * (dash + gap), (dash, period - dash))


def _legend_below(figure: "Figure", lines: "Mapping[tuple[int, str], Line2D]") -> None:
    """Puts a legend below all, in which what belongs to a run stands in one column."""
    from matplotlib.lines import Line2D

    parts = sorted({part for _, part in lines}, key=lambda part: PARTS.index(part) if part in PARTS else len(PARTS))
    nothing = Line2D([], [], linestyle="none", label=" ")
    entries = [_example(lines, run, part) or nothing for run in sorted({run for run, _ in lines}) for part in parts]
    width, height = figure.get_size_inches()
    columns, _ = legend_shape([str(entry.get_label()) for entry in entries], width, symbol=10)
    rows = math.ceil(len(entries) / len(parts) / columns) * len(parts)
    columns = math.ceil(len(entries) / rows)
    entries += [nothing] * (rows * columns - len(entries))  # columns are filled evenly, which would part a run
    figure.set_size_inches(width, height + rows * LEGEND_POINTS * 1.6 / 72 + 0.1)
    figure.legend(
        entries, [str(entry.get_label()) for entry in entries], loc="outside lower center", ncols=columns,
        fontsize=LEGEND_POINTS, frameon=False, handlelength=3,
    )  # fmt: skip


def _example(lines: "Mapping[tuple[int, str], Line2D]", run: int, part: str) -> "Line2D | None":
    """Returns how a curve looks that has its place to itself."""
    from matplotlib.lines import Line2D

    line = lines.get((run, part))
    if line is None:
        return None
    return Line2D(
        [], [], linestyle=_style(part, 0, 1), color=line.get_color(), linewidth=1.4, marker=line.get_marker(),
        markersize=4, label=line.get_label(),
    )  # fmt: skip


def draw_heads(
    path: str | Path, values: Tensor, label: str, title: str = "", reference: tuple[str, float] | None = None
) -> None:
    """Draws a number of each head over the blocks: a point a head, a line through the means of the blocks.

    Args:
        path: The PNG or SVG file to write.
        values: ``(blocks, heads)``.
        label: What the numbers are, with their unit.
        title: A line above.
        reference: A value to compare with, and what it is.
    """
    from matplotlib.ticker import MaxNLocator

    blocks = range(len(values))
    figure = new_figure(max(DIAGRAM_INCHES[0] * 1.25, 0.35 * len(values) + 1), DIAGRAM_INCHES[1] * 1.2, "constrained")
    axes = figure.subplots()
    axes.plot(blocks, values.mean(dim=1), "-", color=COLOURS[1], linewidth=1.6, label="mean of the heads")
    for number, head in enumerate(values.T):
        name = "a head" if number == 0 else None
        axes.plot(blocks, head, "o", markersize=4, alpha=0.6, mew=0, color=COLOURS[0], label=name)
    if reference is not None:
        axes.axhline(reference[1], color="black", linestyle=":", linewidth=1, label=reference[0])
    axes.set_ylim(0, 1.08 * max(values.max().item(), reference[1] if reference else 0))
    axes.set_xlabel("block", fontsize=9)
    axes.set_ylabel(label, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=LEGEND_POINTS, frameon=False)
    axes.set_title(title, fontsize=10)
    save_figure(figure, path)


def draw_points(
    path: str | Path,
    groups: Sequence[tuple[str, Tensor]],
    axes_names: tuple[str, str],
    title: str = "",
    others: tuple[str, Tensor] | None = None,
) -> None:
    """Draws groups of points, each in its own colour and marker, with a legend beside them.

    Points of the second seven groups are hollow.

    Args:
        path: The PNG or SVG file to write.
        groups: Names and points ``(n, 2)``.
        axes_names: What the axes are.
        title: A line above.
        others: A name and points that are not told apart, in grey below all.
    """
    figure = new_figure(SCATTER_INCHES * 1.25, SCATTER_INCHES, "constrained")
    axes = figure.subplots()
    count = sum(len(points) for _, points in groups)
    area = min(36.0, max(8.0, 9000 / max(count, 1)))
    if others is not None:  # first: they must not cover what is told apart
        _scatter(axes, others[0], others[1], area, OTHERS, ".")
    for number, (name, points) in enumerate(groups):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        _scatter(axes, name, points, area, colour, marker, hollow=number // len(COLOURS) % 2 == 1)
    axes.set_xlabel(axes_names[0], fontsize=9)
    axes.set_ylabel(axes_names[1], fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.set_title(title, fontsize=10)
    handles, names = axes.get_legend_handles_labels()
    last = 1 if others else 0
    handles, names = handles[last:] + handles[:last], names[last:] + names[:last]
    legend = figure.legend(handles, names, loc="outside right upper", fontsize=LEGEND_POINTS + 1, frameon=False)
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set(sizes=[40.0], alpha=1)
    save_figure(figure, path)


def _scatter(
    axes: "Axes", name: str, points: Tensor, area: float, colour: str, marker: str, hollow: bool = False
) -> None:
    label = name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
    axes.scatter(
        points[:, 0], points[:, 1], s=area * SIZES.get(marker, 1), marker=marker, alpha=0.8, label=label,
        facecolors="none" if hollow else colour, edgecolors=colour if hollow else "white",
        linewidths=1.0 if hollow else 0.2,
    )  # fmt: skip
