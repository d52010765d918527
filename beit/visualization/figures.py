"""Tables of pictures, and how every figure is created and saved.

Only this module and ``plots.py``, which draws diagrams, use matplotlib; they import it when something is drawn.
A file name ends in .png or .svg, which sets the format. The colours are safe for colour-blind readers and never the
only cue: runs and classes also differ by marker, training and test by line style.
"""

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from beit.errors import InputError
from beit.outputs import MARK, check_outputs
from beit.storage import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL_INCHES = 1.6  # longer side of a picture
SEGMENTATION_INCHES = 4.0
NARROWEST, LOWEST = 3 / 8, 1 / 8  # of the longer side: room for titles and legends of extreme panoramas
GAP_INCHES = 0.08
LINE_INCHES = 0.2  # a line of text above or below a picture
NEXT_LINE_INCHES = 0.13  # each further one
HEADING_INCHES = 0.34  # a line above several rows, with a gap to the rows before
NOTE_LETTER = 0.062
TITLE_INCHES = 0.32
BAR_INCHES = 0.65  # a colour bar with its numbers
LEGEND_POINTS = 8
LEGEND_SPACING = 0.37  # between two lines, in heights of a letter
DPI = 150
HEAT, SIGNED = "inferno", "RdBu_r"  # colour maps: from zero to the maximum; below and above zero
HEAT_OPACITY = 0.65
# The greys of photographs under heat maps: white would look hot, and black cold.
DARKEST, BRIGHTEST = 0.35, 0.65
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colours without their yellow, which is hard to see on white."""

Legend = Sequence[tuple[str, tuple[int, int, int]]]  # names, and their colours as red, green and blue, 0 to 255


def check_picture_name(path: str | Path) -> str:
    """Returns the format of a picture's file name, or raises InputError; call it before a long computation."""
    ending = Path(path).suffix.lower().removeprefix(".")
    if ending not in ("png", "svg"):
        raise InputError(f"cannot write the picture {path}: let its name end in .png or .svg")
    return ending


def check_picture(path: str, overwrite: bool) -> None:
    """Raises InputError for a picture that cannot be written, or would replace somebody else's file."""
    check_picture_name(path)
    check_outputs("--output", [path], overwrite)


@dataclass(frozen=True)
class Picture:
    """One cell of a table of pictures."""

    image: Tensor | None = None  # (3, H, W) in [0, 1]; None for a heat map alone
    heat: Tensor | None = None  # (h, w), drawn over the whole image
    limits: tuple[float, float] | None = None  # of heat at the ends of the colour map; by default 0 and its maximum
    marks: tuple[tuple[float, float, int], ...] = ()  # x and y as fractions of width and height, and a colour's number
    title: str = ""  # above
    caption: str = ""  # below

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, in pixels or patches."""
        shown = self.image if self.image is not None else self.heat
        assert shown is not None
        return shown.shape[-2], shown.shape[-1]


def pictures_figure(
    rows: Sequence[Sequence[Picture]],
    title: str = "",
    *,
    note: str = "",
    row_names: Sequence[str] = (),
    headings: Mapping[int, str] | None = None,
    colours: str = HEAT,
    bar: bool = False,
    legend: Legend = (),
    inches: float = PANEL_INCHES,
) -> "Figure":
    """Draws pictures in a table, keeping their aspect ratios; the most elongated one fills its cell.

    Rows may differ in length. A heading is above the row of its number, for that row and those up to the next heading;
    a ``note`` or a ``legend`` is at the bottom, a colour ``bar``, for heat maps of the same limits, at the right.
    ``colours`` is matplotlib's name of a colour map, ``inches`` the longer side of a picture.
    """
    shape = max(high / wide for high, wide in (picture.size for row in rows for picture in row))  # the most elongated
    panel = inches * max(min(1, 1 / shape), NARROWEST), inches * max(min(1, shape), LOWEST)
    margin = GAP_INCHES + (LINE_INCHES if row_names else 0)
    step, columns = panel[0] + GAP_INCHES, max(len(row) for row in rows)
    width = margin + columns * step + (BAR_INCHES if bar else 0)
    if (wanted := 0.085 * len(title)) > width:
        margin, width = margin + (wanted - width) / 2, wanted
    tops, bottom = _row_places(rows, TITLE_INCHES if title else GAP_INCHES / 2, panel[1], headings or {})
    lines = textwrap.wrap(note, int(width / NOTE_LETTER))
    legend_columns, legend_inches = legend_size([name for name, _ in legend], width) if legend else (0, 0)
    height = bottom + GAP_INCHES / 2 + 0.15 * len(lines) + legend_inches
    figure = new_figure(width, height)
    for number, (row, top) in enumerate(zip(rows, tops, strict=True)):
        for column, picture in enumerate(row):
            axes = _cell(figure, margin + column * step, top, panel)
            _draw_picture(axes, picture, colours)
        if row_names:
            middle = 1 - (top + panel[1] / 2) / height
            figure.text(0.06 / width, middle, row_names[number], fontsize=8, rotation=90, va="center")
    for number, heading in (headings or {}).items():
        base = tops[number] - _text_inches([picture.title for picture in rows[number]]) - 0.02
        figure.text(margin / width, 1 - base / height, heading, fontsize=8.5, va="bottom")
    if bar:
        place = _cell(figure, margin + columns * step, tops[0], (0.1, tops[-1] + panel[1] - tops[0]))
        figure.colorbar(axes.images[-1], cax=place).outline.set_linewidth(0.4)  # type: ignore[operator]
        place.tick_params(labelsize=7, length=2, pad=2)
    if title:
        figure.suptitle(title, fontsize=10, y=1 - 0.08 / height, va="top")
    if legend:
        _draw_legend(figure, legend, legend_columns)
    if note:
        figure.text(0.5, 0.05 / height, "\n".join(lines), fontsize=7.5, ha="center", va="bottom")
    return figure


def draw_pictures(path: str | Path, rows: Sequence[Sequence[Picture]], title: str = "", **layout: Any) -> None:
    """Writes the figure of :func:`pictures_figure` to a PNG or SVG file."""
    save_figure(pictures_figure(rows, title, **layout), path)


def draw_panels(
    path: str | Path, panels: Mapping[str, Tensor], captions: Sequence[str] = (), title: str = "", **layout: Any
) -> None:
    """Draws a table with one row per image and one column per version of the images, to a PNG or SVG file.

    ``panels`` maps the title of a column to images ``(B, 3, H, W)`` in [0, 1], whose sizes may differ between columns;
    ``captions`` stand under the last image of each row; ``layout`` are more arguments of :func:`pictures_figure`.
    """
    rows = [list(map(Picture, versions)) for versions in zip(*panels.values(), strict=True)]
    rows[0] = [replace(picture, title=name) for picture, name in zip(rows[0], panels, strict=True)]
    for row, caption in zip(rows, captions, strict=False):
        row[-1] = replace(row[-1], caption=caption)
    draw_pictures(path, rows, title, **layout)


def segmentation_figure(panels: Mapping[str, Tensor], legend: Legend, title: str = "") -> "Figure":
    """Draws versions of one image, uint8 ``(3, H, W)`` by title, side by side, with a legend of the classes below."""
    row = [Picture(picture.float() / 255, title=name) for name, picture in panels.items()]
    return pictures_figure([row], title, legend=legend, inches=SEGMENTATION_INCHES)


def _row_places(
    rows: Sequence[Sequence[Picture]], top: float, height: float, headings: Mapping[int, str]
) -> tuple[list[float], float]:
    """Returns how far below the upper edge each row's pictures begin, and where the last row ends, in inches."""
    places = []
    for number, row in enumerate(rows):
        top += (HEADING_INCHES if number in headings else 0) + _text_inches([picture.title for picture in row])
        places.append(top)
        top += height + _text_inches([picture.caption for picture in row])
    return places, top


def _text_inches(texts: Sequence[str]) -> float:
    """Returns the height of the texts above or below the pictures of a row."""
    lines = max(text.count("\n") + 1 if text else 0 for text in texts)
    return LINE_INCHES + (lines - 1) * NEXT_LINE_INCHES if lines else GAP_INCHES / 2


def _cell(figure: "Figure", left: float, top: float, size: tuple[float, float]) -> "Axes":
    """Adds axes to a figure, placed in inches from its upper left corner."""
    width, height = figure.get_size_inches()
    return figure.add_axes((left / width, 1 - (top + size[1]) / height, size[0] / width, size[1] / height))


def _draw_picture(axes: "Axes", picture: Picture, colours: str) -> None:
    height, width = picture.size
    extent = (0, width, height, 0)
    if picture.image is not None:
        image = picture.image
        if picture.heat is not None:  # in mid greys, so that light and dark stand for the heat map
            image = DARKEST + (BRIGHTEST - DARKEST) * image.mean(dim=0, keepdim=True).clamp(0, 1).expand(3, -1, -1)
        axes.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="antialiased", extent=extent)
    if picture.heat is not None:
        low, high = picture.limits or (0.0, max(picture.heat.max().item(), 1e-12))
        opacity = 1.0 if picture.image is None else HEAT_OPACITY
        heat = picture.heat.numpy()
        axes.imshow(heat, cmap=colours, vmin=low, vmax=high, alpha=opacity, extent=extent, interpolation="nearest")
    for x, y, number in picture.marks:
        for colour, thickness in (("white", 3.0), (COLOURS[number % len(COLOURS)], 1.4)):
            axes.plot([x * width], [y * height], "o", ms=6.5, mfc="none", mec=colour, mew=thickness)
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    if picture.title:
        axes.set_title(picture.title, fontsize=8, pad=3)
    if picture.caption:
        axes.set_xlabel(picture.caption, fontsize=7.5, labelpad=2)


def legend_size(names: Sequence[str], inches: float, symbol: int = 5) -> tuple[int, float]:
    """Returns the number of a legend's columns that fit into a width, and its height in inches.

    Each name takes the width of ``symbol`` more letters, for its symbol and the gap to the next column.
    """
    letter = LEGEND_POINTS * 0.6 / 72  # a little more than the mean of the font
    entry = (max(map(len, names), default=0) + symbol) * letter
    columns = max(1, min(len(names), int(inches / entry)))
    return columns, math.ceil(len(names) / columns) * LEGEND_POINTS * (1 + LEGEND_SPACING) / 72 + 0.15


def _draw_legend(figure: "Figure", legend: Legend, columns: int) -> None:
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
    """Creates a figure of a size in inches."""
    # Without pyplot: needs no window system, keeps nothing in memory, and can be used from threads.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout=layout)  # type: ignore[arg-type]


def figure_image(figure: "Figure") -> Image.Image:
    """Returns a figure as a picture."""
    file = io.BytesIO()
    figure.savefig(file, format="png", facecolor="white")
    return Image.open(file)


def save_figure(figure: "Figure", path: str | Path) -> None:
    """Writes a figure as PNG or SVG, depending on the file name."""
    from matplotlib import rc_context

    kind = check_picture_name(path)
    # Reproducible files: no date, and fixed ids in SVG.
    metadata = {"Date": None, "Creator": MARK} if kind == "svg" else {"Software": MARK}
    with atomic_write(path) as file, rc_context({"svg.hashsalt": "beit"}):
        figure.savefig(file, format=kind, facecolor="white", metadata=metadata)
