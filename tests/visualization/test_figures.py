"""The drawing itself: files that hold the right number of pictures, with their colours; nothing heavy when imported."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from beit.visualization.curves import Curve
from beit.visualization.figures import (
    DPI,
    PANEL_INCHES,
    SEGMENTATION_INCHES,
    draw_curves,
    draw_panels,
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
    assert ((pixels == (31, 119, 180)).all(axis=-1)).sum() > 200 * count  # the first line's blue, in every diagram


def test_matplotlib_is_imported_for_drawing_only():
    # `beit --help` and every training run would otherwise pay for it.
    code = "import sys, beit.visualization.figures; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
