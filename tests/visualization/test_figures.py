"""The drawing itself: files that hold the right number of pictures, with their colours; nothing heavy when imported."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from beit.errors import InputError
from beit.visualization.curves import Curve
from beit.visualization.figures import (
    DPI,
    PANEL_INCHES,
    SEGMENTATION_INCHES,
    Picture,
    draw_curves,
    draw_heads,
    draw_panels,
    draw_pictures,
    draw_points,
    draw_segmentation,
)


def read(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_every_panel_is_drawn_in_its_colour(tmp_path):
    red, green = (torch.zeros(2, 3, 8, 8) for _ in range(2))
    red[:, 0], green[:, 1] = 1, 1
    draw_panels(tmp_path / "panels.png", {"one": red, "two": green}, ["first row", "second row"], "Title")
    pixels = read(tmp_path / "panels.png").astype(int)
    panel = (PANEL_INCHES * DPI) ** 2
    for channel in (0, 1):  # two panels of each colour, nearly as large as their places
        painted = (pixels[..., channel] == 255) & (pixels.sum(axis=-1) == 255)
        assert 2 * 0.8 * panel < painted.sum() < 2 * 1.1 * panel
    left, right = pixels[:, : pixels.shape[1] // 2], pixels[:, pixels.shape[1] // 2 :]
    assert (left[..., 1] - left[..., 0]).max() < 200 < (right[..., 1] - right[..., 0]).max()


@pytest.mark.parametrize("size", [(30, 40), (40, 30), (4, 40)])
@pytest.mark.parametrize("entries", [0, 1, 20, 150])
def test_a_segmentation_is_drawn_with_its_legend(tmp_path, size, entries):
    # Broken by panels that are stretched, or that the legend covers, and by a legend that leaves the picture.
    red, green = (torch.zeros(3, *size, dtype=torch.uint8) for _ in range(2))
    red[0], green[1] = 255, 255
    legend = [(f"a class {number}", (0, 100, number)) for number in range(entries)]
    draw_segmentation(tmp_path / "a.png", {"image": red, "overlay": green}, legend, "Title")
    pixels = read(tmp_path / "a.png")
    enlarged = [side * SEGMENTATION_INCHES * DPI / max(size) for side in size]
    for colour in ((255, 0, 0), (0, 255, 0)):
        rows, columns = (pixels == colour).all(axis=-1).nonzero()
        assert [np.ptp(rows) + 1, np.ptp(columns) + 1] == pytest.approx(enlarged, abs=4)
        assert len(rows) > 0.97 * enlarged[0] * enlarged[1]
    patches = (pixels[..., 0] == 0) & (pixels[..., 1] == 100)
    assert len(np.unique(pixels[patches][:, 2])) == entries
    if entries:
        assert patches.nonzero()[0].min() > rows.max() + 5  # the legend is below the panels, and near
        assert patches.nonzero()[0].min() < rows.max() + 60
    edge = np.concatenate([pixels[:3].reshape(-1, 3), pixels[-3:].reshape(-1, 3), pixels[:, -3:].reshape(-1, 3)])
    assert (edge == 255).all()


@pytest.mark.parametrize("count", [1, 3, 5])
def test_curves_are_drawn_however_many(tmp_path, count):
    curves = [Curve("train", [1, 2, 3], [3.0, 2.0, 1.0]), Curve("test", [3], [1.5])]
    draw_curves(tmp_path / "curves.png", {f"metric_{number}": curves for number in range(count)}, "Title")
    pixels = read(tmp_path / "curves.png")
    assert min(pixels.shape[:2]) > 300
    assert ((pixels == (0, 114, 178)).all(axis=-1)).sum() > 200 * count  # the first line's blue, in every diagram


def texts_of(path) -> list[str]:
    """The texts of an SVG, which matplotlib writes as comments beside their outlines, and how often in all."""
    return re.findall(r"<!-- (.*?) -->", path.read_text())


def test_several_runs_differ_by_colour_and_marker_and_share_one_legend(tmp_path):
    # Broken by colours alone, by runs that swap colours where one lacks a curve, and by a legend in each diagram.
    def curves(*runs):
        return [Curve(f"r{run} {part}", [1, 2, 3], [run, 2.0, 1.0], run) for run in runs for part in ("train", "test")]

    path = tmp_path / "curves.svg"
    draw_curves(path, {"loss": curves(0, 1, 2), "acc": curves(2), "lr": curves(1, 2)})
    texts = texts_of(path)
    assert [texts.count(f"r{run} {part}") for run in range(3) for part in ("train", "test")] == [1] * 6
    svg = path.read_text()
    strokes = re.findall(r"stroke: (#\w+); stroke-width: 1.4", svg)
    # run 2 in every diagram and in the legend: 2 curves x 3 + 2; run 1: 2 x 2 + 2; run 0: 2 + 2
    assert [strokes.count(colour) for colour in ("#009e73", "#d55e00", "#0072b2")] == [8, 6, 4]


@pytest.mark.parametrize("shape", [(8, 8), (4, 16), (16, 4)])
def test_a_heat_map_lies_on_its_image_with_the_mark_at_its_place(tmp_path, shape):
    # Broken by maps that are mirrored or shifted, and by a mark with row and column exchanged.
    image, heat = torch.zeros(3, *shape), torch.zeros(2, 4)
    heat[0, 3] = 1.0
    draw_pictures(tmp_path / "a.png", [[Picture(image, heat, marks=((0.125, 0.75, 0),))]])
    pixels = read(tmp_path / "a.png").astype(int)
    drawn = (pixels < 250).any(axis=-1)
    inside = pixels[drawn.any(axis=1)][:, drawn.any(axis=0)]  # without the white margin
    height, width = inside.shape[:2]
    assert height / width == pytest.approx(shape[0] / shape[1], rel=0.05)
    bright = (inside[..., 0] > 120) & (inside[..., 2] < 140) & (inside[..., 1] > 100)
    rows, columns = bright.nonzero()
    assert rows.max() < 0.55 * height
    assert columns.min() > 0.7 * width
    rows, columns = ((inside[..., 2] - inside[..., 0]) > 120).nonzero()  # the ring's blue
    assert rows.mean() / height == pytest.approx(0.75, abs=0.06)
    assert columns.mean() / width == pytest.approx(0.125, abs=0.06)


def test_text_makes_room_for_itself(tmp_path):
    # Broken by a long note or title that leaves the picture, or that lies on a panel.
    cell = Picture(torch.zeros(3, 8, 8), title="above", caption="below")
    draw_pictures(tmp_path / "a.png", [[cell], [cell, cell]], "A title of many letters " * 3, note="a note " * 30,
                  row_names=["one", "two"])  # fmt: skip
    pixels = read(tmp_path / "a.png")
    edge = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, :2].reshape(-1, 3),
                           pixels[:, -2:].reshape(-1, 3)])  # fmt: skip
    assert (edge == 255).all()
    black = (pixels == 0).all(axis=-1).sum()
    assert black == pytest.approx(3 * (PANEL_INCHES * DPI) ** 2, rel=0.05)


def test_groups_of_points_have_names_and_the_rest_comes_last(tmp_path):
    groups = [(f"class {number}", torch.rand(5, 2)) for number in range(20)]
    draw_points(tmp_path / "a.svg", groups, ("x axis", "y axis"), "Title", ("3 other classes", torch.rand(9, 2)))
    texts = texts_of(tmp_path / "a.svg")
    named = [text for text in texts if text.startswith("class") or "other" in text]
    assert named == [f"class {number}" for number in range(20)] + ["3 other classes"]
    assert {"x axis", "y axis", "Title"} <= set(texts)


def test_no_two_classes_of_a_legend_look_alike():
    from beit.visualization.embeddings import MOST_CLASSES
    from beit.visualization.figures import COLOURS, MARKERS

    looks = {(COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]) for number in range(MOST_CLASSES)}
    assert len(looks) == MOST_CLASSES


def test_every_head_is_a_point(tmp_path):
    draw_heads(tmp_path / "a.svg", torch.rand(4, 3), "pixels", "Title", ("reference", 2.0))
    uses = re.findall(r'style="fill: #0072b2; fill-opacity: 0.6"', (tmp_path / "a.svg").read_text())
    assert len(uses) >= 4 * 3
    assert {"pixels", "reference", "block"} <= set(texts_of(tmp_path / "a.svg"))


def test_the_ending_says_what_is_written_and_others_are_refused(tmp_path):
    panels = {"one": torch.zeros(1, 3, 8, 8)}
    draw_panels(tmp_path / "new" / "a.PNG", panels)  # a folder that is missing is made
    assert (tmp_path / "new" / "a.PNG").read_bytes().startswith(b"\x89PNG")
    draw_panels(tmp_path / "a.svg", panels)
    draw_panels(tmp_path / "b.svg", panels)
    assert "<svg" in (tmp_path / "a.svg").read_text()
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()  # no date, no random names
    for name in ("a.jpg", "a", "a.svg.gz"):
        with pytest.raises(InputError, match=r"let its name end in \.png or \.svg"):
            draw_panels(tmp_path / name, panels)
        assert not (tmp_path / name).exists()


def test_matplotlib_is_imported_for_drawing_only():
    # `beit --help` and every training run would otherwise pay for it.
    code = "import sys, beit.visualization.figures; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
