"""Drawing: the only module that knows matplotlib, and it imports it only when something is drawn.

Every picture is PNG or SVG, by the ending of its name. Colours can be told apart by colour-blind readers, and none
stands alone: runs and classes also differ by marker, training and test by the style of their lines.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from beit.errors import InputError
from beit.storage import atomic_write
from beit.visualization.curves import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

FORMATS = ("png", "svg")
PANEL_INCHES = 1.6
GAP_INCHES = 0.08
LINE_INCHES = 0.2  # a line of text above or below a panel
NOTE_LETTER = 0.062
TITLE_INCHES = 0.32
BAR_INCHES = 0.65  # a bar of colours with its numbers
DIAGRAM_INCHES = (4.0, 2.8)
SEGMENTATION_INCHES = 4.0
SCATTER_INCHES = 5.5
LEGEND_POINTS = 8
LONGEST_NAME = 24  # letters of a class in a legend
LEGEND_SPACING = 0.37  # between two lines, in heights of a letter
DIAGRAMS_A_ROW = 4
MARKERS_A_CURVE = 12
DPI = 150
STYLES = {"train": "-", "test": "--"}
HEAT, SIGNED = "inferno", "RdBu_r"  # maps of colours: from nothing to the most; below and above zero
HEAT_OPACITY = 0.65
# Okabe and Ito's colours without their yellow, which is hardly seen on white; seven, and eight markers, so that pairs
# of them repeat only after 56. Points of the second seven classes are hollow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
OTHERS = "#BBBBBB"
SIZES = {"*": 2.0, "P": 1.3, "X": 1.3, "D": 0.8}  # areas of markers, so that all weigh alike


def check_picture_name(path: str | Path) -> str:
    """Returns the format that a picture's name asks for; ask before a long computation.

    Raises:
        InputError: Pictures are not written in that format.
    """
    ending = Path(path).suffix.lower().removeprefix(".")
    if ending not in FORMATS:
        raise InputError(f"cannot write the picture {path}: let its name end in .png or .svg")
    return ending


# ---------------------------------------------------------------------------------------------- pictures in a table
@dataclass(frozen=True)
class Picture:
    """One cell of a table of pictures.

    Attributes:
        image: ``(3, H, W)`` in [0, 1]; None for a heat map alone.
        heat: ``(h, w)``, drawn over the whole image.
        limits: The values of ``heat`` at the two ends of the colours; from 0 to its largest by default.
        marks: Places ``(x, y)`` to mark, as shares of width and height, with a colour's number each.
        title: A line above.
        caption: A line below.
    """

    image: Tensor | None = None
    heat: Tensor | None = None
    limits: tuple[float, float] | None = None
    marks: tuple[tuple[float, float, int], ...] = ()
    title: str = ""
    caption: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, in pixels or patches."""
        shown = self.image if self.image is not None else self.heat
        assert shown is not None
        return shown.shape[-2], shown.shape[-1]


def draw_pictures(
    path: str | Path,
    rows: Sequence[Sequence[Picture]],
    title: str = "",
    *,
    note: str = "",
    row_names: Sequence[str] = (),
    colours: str = HEAT,
    bars: bool = False,
) -> None:
    """Draws pictures in a table; each keeps its shape, the widest or highest fills its cell.

    Args:
        path: The PNG or SVG file to write.
        rows: The pictures, row by row; rows may differ in length.
        title: A line above all.
        note: A line below all.
        row_names: A name left of each row.
        colours: Of the heat maps, one of matplotlib's maps of colours.
        bars: Show at the end of each row what its colours mean; its heat maps share their limits.
    """
    sides = [size for row in rows for size in (picture.size for picture in row)]
    shape = max(height / width for height, width in sides)
    panel = (PANEL_INCHES, PANEL_INCHES * shape) if shape <= 1 else (PANEL_INCHES / shape, PANEL_INCHES)
    margin = GAP_INCHES + (LINE_INCHES if row_names else 0)
    columns = max(len(row) for row in rows)
    width = margin + columns * (panel[0] + GAP_INCHES) + (BAR_INCHES if bars else 0)
    if (wanted := 0.085 * len(title)) > width:
        margin, width = margin + (wanted - width) / 2, wanted
    lines = textwrap.wrap(note, int(width / NOTE_LETTER))
    above, below = ([LINE_INCHES if any(getattr(p, part) for p in row) else GAP_INCHES / 2 for row in rows]
                    for part in ("title", "caption"))  # fmt: skip
    head, foot = (TITLE_INCHES if title else GAP_INCHES / 2), GAP_INCHES / 2 + 0.15 * len(lines)
    height = head + sum(above) + sum(below) + len(rows) * panel[1] + foot
    figure = _new_figure(width, height)
    top = head
    for number, row in enumerate(rows):
        top += above[number]
        for column, picture in enumerate(row):
            axes = _cell(figure, margin + column * (panel[0] + GAP_INCHES), top, panel)
            _draw_picture(axes, picture, colours)
        right = margin + len(row) * (panel[0] + GAP_INCHES)
        if bars and row:
            _draw_bar(figure, _cell(figure, right, top + 0.1 * panel[1], (0.1, 0.8 * panel[1])), axes)
        if row_names:
            middle = 1 - (top + panel[1] / 2) / height
            figure.text(0.06 / width, middle, row_names[number], fontsize=8, rotation=90, va="center")
        top += panel[1] + below[number]
    if title:
        figure.suptitle(title, fontsize=10, y=1 - 0.08 / height, va="top")
    if note:
        figure.text(0.5, 0.05 / height, "\n".join(lines), fontsize=7.5, ha="center", va="bottom")
    _save(figure, path)


def _cell(figure: "Figure", left: float, top: float, size: tuple[float, float]) -> "Axes":
    """Makes a place in a figure, in inches from its upper left corner."""
    width, height = figure.get_size_inches()
    return figure.add_axes((left / width, 1 - (top + size[1]) / height, size[0] / width, size[1] / height))


def _draw_picture(axes: "Axes", picture: Picture, colours: str) -> None:
    height, width = picture.size
    extent = (0, width, height, 0)
    if picture.image is not None:
        grey = picture.heat is not None  # colours of the photograph would be taken for those of the map
        shown = picture.image.mean(dim=0, keepdim=True).expand(3, -1, -1) if grey else picture.image
        _show(axes, shown, extent=extent)
    if picture.heat is not None:
        low, high = picture.limits or (0.0, max(picture.heat.max().item(), 1e-12))
        opacity = 1.0 if picture.image is None else HEAT_OPACITY
        heat = picture.heat.numpy()
        axes.imshow(heat, cmap=colours, vmin=low, vmax=high, alpha=opacity, extent=extent, interpolation="nearest")
    _bare(axes)
    for x, y, number in picture.marks:
        for colour, thickness in (("white", 3.0), (COLOURS[number % len(COLOURS)], 1.4)):
            axes.plot([x * width], [y * height], "o", ms=6.5, mfc="none", mec=colour, mew=thickness)
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    if picture.title:
        axes.set_title(picture.title, fontsize=8, pad=3)
    if picture.caption:
        axes.set_xlabel(picture.caption, fontsize=7.5, labelpad=2)


def _draw_bar(figure: "Figure", place: "Axes", axes: "Axes") -> None:
    bar = figure.colorbar(axes.images[-1], cax=place)
    bar.ax.tick_params(labelsize=7, length=2, pad=2)
    bar.outline.set_linewidth(0.4)  # type: ignore[operator]


def draw_panels(path: str | Path, panels: Mapping[str, Tensor], captions: Sequence[str] = (), title: str = "") -> None:
    """Draws images in a table: one column a version, one row an image.

    Args:
        path: The PNG or SVG file to write.
        panels: Title of a column → its images ``(B, 3, H, W)`` in [0, 1]; the sizes may differ from column to column.
        captions: A line under each row's last image; none by default.
        title: A line above all.
    """
    rows = []
    for number, versions in enumerate(zip(*panels.values(), strict=True)):
        names = panels if number == 0 else [""] * len(panels)
        lines = [""] * (len(panels) - 1) + [captions[number] if captions else ""]
        rows.append([Picture(image, title=name, caption=line)
                     for image, name, line in zip(versions, names, lines, strict=True)])  # fmt: skip
    draw_pictures(path, rows, title)


def _show(
    axes: "Axes",
    image: Tensor,
    interpolation: str = "nearest",
    extent: tuple[float, float, float, float] | None = None,
) -> None:
    axes.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation=interpolation, extent=extent)
    _bare(axes)


def _bare(axes: "Axes") -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


# ------------------------------------------------------------------------------------------------------ segmentations
def draw_segmentation(
    path: str | Path,
    panels: Mapping[str, Tensor],
    legend: Sequence[tuple[str, tuple[int, int, int]]],
    title: str = "",
) -> None:
    """Draws versions of one image side by side, and under them what the colours mean.

    Args:
        path: The PNG or SVG file to write.
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


def _legend_shape(names: Sequence[str], inches: float, symbol: int = 5) -> tuple[int, int]:
    """Returns how many columns fit into a width, and how many rows that makes.

    A name takes ``symbol`` letters more, for what it explains and the gap to the next.
    """
    letter = LEGEND_POINTS * 0.6 / 72  # a little more than the mean of the font
    entry = (max(map(len, names), default=0) + symbol) * letter
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


# ---------------------------------------------------------------------------------------------------------- diagrams
def draw_curves(path: str | Path, diagrams: Mapping[str, Sequence[Curve]], title: str = "") -> None:
    """Draws one diagram a metric, over epochs.

    Curves of one run differ by colour. Several runs differ by colour and marker, training and test by the style of the
    line, and all diagrams share one legend.

    Args:
        path: The PNG or SVG file to write.
        diagrams: What :func:`beit.visualization.curves.diagrams` returns.
        title: A line above all.
    """
    columns = min(DIAGRAMS_A_ROW, math.ceil(math.sqrt(len(diagrams))))
    rows = math.ceil(len(diagrams) / columns)
    runs = {curve.run for curves in diagrams.values() for curve in curves}
    figure = _new_figure(columns * DIAGRAM_INCHES[0], rows * DIAGRAM_INCHES[1], layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    legend: dict[str, Line2D] = {}
    for axes, (metric, curves) in zip(grid.flat, diagrams.items(), strict=False):
        legend |= _plot(axes, metric, curves, by_run=len(runs) > 1)
        if len(runs) == 1:
            axes.legend(fontsize=7)
    for axes in grid.flat[len(diagrams) :]:
        axes.set_visible(False)
    if len(runs) > 1:
        _legend_below(figure, legend)
    if title:
        figure.suptitle(title, fontsize=11)
    _save(figure, path)


def _plot(axes: "Axes", metric: str, curves: Sequence[Curve], by_run: bool) -> "dict[str, Line2D]":
    """Draws a diagram and returns its lines by their labels."""
    from matplotlib.ticker import MaxNLocator

    lines: dict[str, Line2D] = {}
    for number, curve in enumerate(curves):
        style = STYLES.get(curve.label.split()[-1], "-")
        look = curve.run if by_run else number
        marker = MARKERS[look % len(MARKERS)] if by_run else "o" if len(curve.epochs) <= 20 else ""
        # Not all runs at the same epochs: a marker would hide those of the runs before.
        step = math.ceil(len(curve.epochs) / MARKERS_A_CURVE)
        (lines[curve.label],) = axes.plot(
            curve.epochs, curve.values, linestyle=style, color=COLOURS[look % len(COLOURS)], linewidth=1.4,
            marker=marker, markersize=4 if by_run else 3, markevery=(look % step, step) if by_run else 1,
            label=curve.label,
        )  # fmt: skip
    axes.set_title(metric.replace("_", " "), fontsize=10)
    axes.set_xlabel("epoch", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    return lines


def _legend_below(figure: "Figure", lines: "Mapping[str, Line2D]") -> None:
    width, height = figure.get_size_inches()
    columns, rows = _legend_shape(list(lines), width, symbol=10)
    figure.set_size_inches(width, height + rows * LEGEND_POINTS * 1.6 / 72 + 0.1)
    figure.legend(
        list(lines.values()), list(lines), loc="outside lower center", ncols=columns, fontsize=LEGEND_POINTS,
        frameon=False, handlelength=3,
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
    figure = _new_figure(max(DIAGRAM_INCHES[0] * 1.25, 0.35 * len(values) + 1), DIAGRAM_INCHES[1] * 1.2, "constrained")
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
    _save(figure, path)


def draw_points(
    path: str | Path,
    groups: Sequence[tuple[str, Tensor]],
    axes_names: tuple[str, str],
    title: str = "",
    others: tuple[str, Tensor] | None = None,
) -> None:
    """Draws groups of points, each in its own colour and marker, with a legend beside them.

    Args:
        path: The PNG or SVG file to write.
        groups: Names and points ``(n, 2)``.
        axes_names: What the axes are.
        title: A line above.
        others: A name and points that are not told apart, in grey below all.
    """
    figure = _new_figure(SCATTER_INCHES * 1.25, SCATTER_INCHES, "constrained")
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
    _save(figure, path)


def _scatter(
    axes: "Axes", name: str, points: Tensor, area: float, colour: str, marker: str, hollow: bool = False
) -> None:
    label = name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
    axes.scatter(
        points[:, 0], points[:, 1], s=area * SIZES.get(marker, 1), marker=marker, alpha=0.8, label=label,
        facecolors="none" if hollow else colour, edgecolors=colour if hollow else "white",
        linewidths=1.0 if hollow else 0.2,
    )  # fmt: skip


def _new_figure(width: float, height: float, layout: str | None = None) -> "Figure":
    # A figure without pyplot: no window system is asked for, nothing stays in memory, threads may draw too.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout=layout)  # type: ignore[arg-type]
    FigureCanvasAgg(figure)
    return figure


def _save(figure: "Figure", path: str | Path) -> None:
    from matplotlib import rc_context

    kind = check_picture_name(path)
    # The same numbers give the same file: no date, and names of parts that do not change.
    with atomic_write(path) as file, rc_context({"svg.hashsalt": "beit"}):
        figure.savefig(file, format=kind, facecolor="white", metadata={"Date": None} if kind == "svg" else None)
