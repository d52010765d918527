"""The drawing itself: files that hold the right number of pictures, with their colours; nothing heavy when imported."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from beit.errors import InputError
from beit.visualization.figures import (
    DPI,
    PANEL_INCHES,
    SEGMENTATION_INCHES,
    SIGNED,
    Picture,
    draw_panels,
    draw_pictures,
    save_figure,
    segmentation_figure,
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


@pytest.mark.parametrize(
    ("size", "entries"), [((30, 40), 0), ((40, 30), 1), ((4, 40), 20), ((40, 4), 20), ((30, 40), 150)]
)
def test_a_segmentation_is_drawn_with_its_legend(tmp_path, size, entries):
    # Broken by panels that are stretched, or that the legend covers, and by a legend that leaves the picture.
    red, green = (torch.zeros(3, *size, dtype=torch.uint8) for _ in range(2))
    red[0], green[1] = 255, 255
    legend = [(f"a class {number}", (0, 100, number)) for number in range(entries)]
    save_figure(segmentation_figure({"image": red, "overlay": green}, legend, "Title"), tmp_path / "a.png")
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
    bright = (inside[..., 0] > 150) & (inside[..., 0] - inside[..., 2] > 40)  # the greys of photograph and ring are not
    rows, columns = bright.nonzero()
    assert rows.max() < 0.55 * height
    assert columns.min() > 0.7 * width
    rows, columns = ((inside[..., 2] - inside[..., 0]) > 120).nonzero()  # the ring's blue
    assert rows.mean() / height == pytest.approx(0.75, abs=0.06)
    assert columns.mean() / width == pytest.approx(0.125, abs=0.06)


def test_a_photograph_under_a_map_is_neither_heat_nor_its_lack(tmp_path):
    # Where nothing is looked at it is dark, be the photograph black or white; broken by one in its own shades.
    black_and_white = torch.zeros(3, 8, 8)
    black_and_white[:, :, 4:] = 1
    draw_pictures(tmp_path / "a.png", [[Picture(black_and_white, torch.zeros(2, 2), limits=(0.0, 1.0))]])
    pixels = read(tmp_path / "a.png").astype(int)
    inside = pixels[(pixels < 250).all(axis=-1)]
    assert inside.max() < 80  # of 255: a white photograph as it is would be at 89
    assert inside.max() - inside.min() > 15  # and one still sees what it shows


def test_a_heading_parts_the_rows_of_one_picture_from_the_next(tmp_path):
    # Broken by a heading at another row, over a panel, or without a place of its own.
    red, blue = (Picture(torch.zeros(3, 8, 8)) for _ in range(2))
    red.image[0], blue.image[2] = 1, 1
    heights = []
    for headings in ({}, {0: "first", 2: "second " * 3}):
        draw_pictures(tmp_path / "a.png", [[red], [red], [blue]], headings=headings)
        pixels = read(tmp_path / "a.png").astype(int)
        rows = [np.unique(((pixels[..., c] == 255) & (pixels.sum(-1) == 255)).nonzero()[0]) for c in (0, 2)]
        assert [len(r) for r in rows] == pytest.approx([2 * PANEL_INCHES * DPI, PANEL_INCHES * DPI], abs=4)
        text = ((pixels < 60).all(axis=-1)).any(axis=1).nonzero()[0]
        between = [row for row in text if rows[0].max() < row < rows[1].min()]
        assert bool(between) == bool(headings)
        heights.append(rows[1].min() - rows[0].max())
    assert heights[1] > heights[0] + 30


def test_one_bar_says_what_the_colours_of_all_rows_mean(tmp_path):
    cells = [[Picture(heat=torch.rand(4, 4), limits=(-2.0, 2.0), caption="one\ntwo")] for _ in range(3)]
    draw_pictures(tmp_path / "a.svg", cells, bar=True, colours=SIGNED)
    texts = re.findall(r"<!-- (.*?) -->", (tmp_path / "a.svg").read_text())
    assert texts.count("0.0") + texts.count("0") == 1
    assert texts.count("one") == texts.count("two") == 3


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
