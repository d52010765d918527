"""Drawing of pictures in tables, and how any figure begins and is saved.

Only this module and ``plots.py``, which draws diagrams, know matplotlib; they import it only when something is drawn.
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

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")
PANEL_INCHES = 1.6
GAP_INCHES = 0.08
LINE_INCHES = 0.2  # a line of text above or below a panel
NEXT_LINE_INCHES = 0.13  # each further one
HEADING_INCHES = 0.34  # a line above several rows, with a gap to the rows before
NOTE_LETTER = 0.062
TITLE_INCHES = 0.32
BAR_INCHES = 0.65  # a bar of colours with its numbers
SEGMENTATION_INCHES = 4.0
LEGEND_POINTS = 8
LEGEND_SPACING = 0.37  # between two lines, in heights of a letter
DPI = 150
HEAT, SIGNED = "inferno", "RdBu_r"  # maps of colours: from nothing to the most; below and above zero
HEAT_OPACITY = 0.65
# A photograph below a heat map is pressed into these shades: its white would else look like heat, its black like none.
DARKEST, BRIGHTEST = 0.35, 0.65
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colours without their yellow, which is hardly seen on white."""


def check_picture_name(path: str | Path) -> str:
    """Returns the format that a picture's name asks for; ask before a long computation.

    Raises:
        InputError: Pictures are not written in that format.
    """
    ending = Path(path).suffix.lower().removeprefix(".")
    if ending not in FORMATS:
        raise InputError(f"cannot write the picture {path}: let its name end in .png or .svg")
    return ending


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
    headings: Mapping[int, str] | None = None,
    colours: str = HEAT,
    bar: bool = False,
) -> None:
    """Draws pictures in a table; each keeps its shape, the widest or highest fills its cell.

    Args:
        path: The PNG or SVG file to write.
        rows: The pictures, row by row; rows may differ in length.
        title: A line above all.
        note: Lines below all.
        row_names: A name left of each row.
        headings: Number of a row → a line above it, for what it and the rows up to the next heading have in common.
        colours: Of the heat maps, one of matplotlib's maps of colours.
        bar: Show right of all rows what the colours mean; all heat maps must have the same limits.
    """
    headings = headings or {}
    panel = _panel_inches([picture.size for row in rows for picture in row])
    margin = GAP_INCHES + (LINE_INCHES if row_names else 0)
    columns = max(len(row) for row in rows)
    width = margin + columns * (panel[0] + GAP_INCHES) + (BAR_INCHES if bar else 0)
    if (wanted := 0.085 * len(title)) > width:
        margin, width = margin + (wanted - width) / 2, wanted
    lines = _balanced(note, int(width / NOTE_LETTER))
    above = [_text_inches([picture.title for picture in row]) for row in rows]
    below = [_text_inches([picture.caption for picture in row]) for row in rows]
    head, foot = (TITLE_INCHES if title else GAP_INCHES / 2), GAP_INCHES / 2 + 0.15 * len(lines)
    text = sum(above) + sum(below) + len(headings) * HEADING_INCHES
    height = head + text + len(rows) * panel[1] + foot
    figure = new_figure(width, height)
    top = head
    for number, row in enumerate(rows):
        if number in headings:
            top += HEADING_INCHES
            figure.text(margin / width, 1 - (top - 0.02) / height, headings[number], fontsize=8.5, va="bottom")
        top += above[number]
        for column, picture in enumerate(row):
            axes = _cell(figure, margin + column * (panel[0] + GAP_INCHES), top, panel)
            _draw_picture(axes, picture, colours)
        if row_names:
            middle = 1 - (top + panel[1] / 2) / height
            figure.text(0.06 / width, middle, row_names[number], fontsize=8, rotation=90, va="center")
        top += panel[1] + below[number]
    if bar:
        right, first = margin + columns * (panel[0] + GAP_INCHES), head + above[0]
        _draw_bar(figure, _cell(figure, right, first, (0.1, top - below[-1] - first)), axes)
    if title:
        figure.suptitle(title, fontsize=10, y=1 - 0.08 / height, va="top")
    if note:
        figure.text(0.5, 0.05 / height, "\n".join(lines), fontsize=7.5, ha="center", va="bottom")
    save_figure(figure, path)


def _panel_inches(sizes: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """Returns width and height of a cell that is as long as the longest picture, its longer side fixed."""
    shape = max(height / width for height, width in sizes)
    return (PANEL_INCHES, PANEL_INCHES * shape) if shape <= 1 else (PANEL_INCHES / shape, PANEL_INCHES)


def _text_inches(texts: Sequence[str]) -> float:
    """Returns how high the texts of a row are that stand above its pictures, or below."""
    lines = max(text.count("\n") + 1 if text else 0 for text in texts)
    return LINE_INCHES + (lines - 1) * NEXT_LINE_INCHES if lines else GAP_INCHES / 2


def _balanced(text: str, letters: int) -> list[str]:
    """Breaks a text into as few lines as possible, all nearly of one length: no word stands alone."""
    fewest = len(textwrap.wrap(text, letters))
    while letters > 1 and len(textwrap.wrap(text, letters - 1)) == fewest > 1:
        letters -= 1
    return textwrap.wrap(text, letters)


def _cell(figure: "Figure", left: float, top: float, size: tuple[float, float]) -> "Axes":
    """Makes a place in a figure, in inches from its upper left corner."""
    width, height = figure.get_size_inches()
    return figure.add_axes((left / width, 1 - (top + size[1]) / height, size[0] / width, size[1] / height))


def _draw_picture(axes: "Axes", picture: Picture, colours: str) -> None:
    height, width = picture.size
    extent = (0, width, height, 0)
    if picture.image is not None:
        grey = picture.heat is not None  # colours of the photograph would be taken for those of the map
        _show(axes, _pale(picture.image) if grey else picture.image, extent=extent)
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


def _pale(image: Tensor) -> Tensor:
    """Returns an image ``(3, H, W)`` in shades of grey that leave the light and the dark to a map on top of it."""
    grey = image.mean(dim=0, keepdim=True).clamp(0, 1).expand(3, -1, -1)
    return DARKEST + (BRIGHTEST - DARKEST) * grey


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


def segmentation_figure(
    panels: Mapping[str, Tensor], legend: Sequence[tuple[str, tuple[int, int, int]]], title: str = ""
) -> "Figure":
    """Draws versions of one image side by side, and a legend below; :func:`save_figure` writes the figure.

    Args:
        panels: Title of a version → its picture, uint8 ``(3, H, W)``, all of the same size.
        legend: Names and colours (red, green, blue, 0 to 255), listed down the columns in this order.
        title: A line above all.
    """
    height, width = next(iter(panels.values())).shape[-2:]
    # An extreme panorama would be a thin line; drawn higher than it is, it would be wrong. It has room at its sides.
    scale = SEGMENTATION_INCHES / max(height, width)
    panel_width, panel_height = max(width * scale, 1.5), max(height * scale, 0.5)
    total_width = len(panels) * (panel_width + 0.08) + 0.08
    columns, rows = legend_shape([name for name, _ in legend], total_width)
    foot = 0.08 + (rows * LEGEND_POINTS * (1 + LEGEND_SPACING) / 72 + 0.15 if legend else 0)
    head = 0.3 + (0.2 if title else 0)
    total_height = head + panel_height + foot
    figure = new_figure(total_width, total_height)
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
    return figure


def legend_shape(names: Sequence[str], inches: float, symbol: int = 5) -> tuple[int, int]:
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


def new_figure(width: float, height: float, layout: str | None = None) -> "Figure":
    """Begins a figure of so many inches."""
    # A figure without pyplot: no window system is asked for, nothing stays in memory, threads may draw too.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout=layout)  # type: ignore[arg-type]
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: "Figure", path: str | Path) -> None:
    """Writes a figure as PNG or SVG, as the name says."""
    from matplotlib import rc_context

    kind = check_picture_name(path)
    # The same numbers give the same file: no date, and names of parts that do not change.
    with atomic_write(path) as file, rc_context({"svg.hashsalt": "beit"}):
        figure.savefig(file, format=kind, facecolor="white", metadata={"Date": None} if kind == "svg" else None)
