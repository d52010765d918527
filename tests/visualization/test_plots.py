"""Diagrams as files: every line, run, head and class is there and can be told from the others."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from beit.visualization.curves import Curve
from beit.visualization.embeddings import MAX_CLASSES
from beit.visualization.figures import COLOURS
from beit.visualization.plots import MARKERS, draw_curves, draw_heads, draw_points

BLUE, ORANGE, GREEN = ((0, 114, 178), (213, 94, 0), (0, 158, 115))


def read(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def painted(pixels, colour) -> np.ndarray:
    return (np.abs(pixels.astype(int) - colour) <= 2).all(axis=-1)


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


def test_a_runs_curves_are_neighbours_in_the_legend(tmp_path):
    # The legend is filled column by column: each run has a column, also where a curve of it is missing or comes late.
    first = [Curve("a train", [1, 2], [1.0, 2.0]), Curve("b train", [1, 2], [2.0, 1.0], 1)]
    later = [Curve(f"{run} {part}", [1, 2], [number, 3.0], number) for number, run in ((0, "a"), (1, "b"))
             for part in ("test", "most frequent token") if (run, part) != ("a", "most frequent token")]  # fmt: skip
    draw_curves(tmp_path / "a.svg", {"loss": first, "acc": later, "more": later, "yet more": later})
    texts = [text.strip() for text in texts_of(tmp_path / "a.svg")]
    named = texts[texts.index("a train") :]
    assert named == ["a train", "a test", "", "b train", "b test", "b most frequent token"]


def test_a_legend_of_two_columns_parts_no_run(tmp_path):
    # Three runs in two columns: without something to fill up, the second one would begin with a test.
    names = [f"{run} {part}" for run in ("a long name", "b long name", "c long name") for part in ("train", "test")]
    curves = [Curve(name, [1, 2], [1.0, number], number // 2) for number, name in enumerate(names)]
    draw_curves(tmp_path / "a.svg", {"loss": curves})
    texts = [text.strip() for text in texts_of(tmp_path / "a.svg")]
    assert texts[texts.index(names[0]) :] == [*names, "", ""]


@pytest.mark.parametrize("points", [1, 2, 9, 40])
def test_runs_that_are_the_same_are_all_seen(tmp_path, points):
    # Broken by markers that lie on each other: the last would hide the others.
    epochs, values = list(range(1, points + 1)), [number % 4 / 4 for number in range(points)]
    draw_curves(tmp_path / "a.png", {"loss": [Curve(f"{run} train", epochs, values, run) for run in range(3)]})
    pixels = read(tmp_path / "a.png")
    diagram = pixels[: int(0.75 * len(pixels))]  # without the legend
    seen = [painted(diagram, colour).sum() for colour in (BLUE, ORANGE, GREEN)]
    assert min(seen) > 25


def test_what_has_to_be_cleared_is_dotted_and_steps_are_called_steps(tmp_path):
    curves = [Curve("test", [10, 20], [0.1, 0.3], unit="step"),
              Curve("most frequent token", [10, 20], [0.1, 0.1], unit="step")]  # fmt: skip
    draw_curves(tmp_path / "a.svg", {"mlm_acc (fraction)": curves, "loss": [Curve("train", [1, 2], [1.0, 2.0])]})
    svg = (tmp_path / "a.svg").read_text()
    dashes = [float(dash) for dash in re.findall(r"stroke-dasharray: ([\d.]+)", svg)]
    assert min(dashes) == pytest.approx(1.4)  # as long as the line is wide
    assert max(dashes) > 5
    assert {"mlm acc (fraction)", "optimizer step", "epoch (n ends with checkpoint n − 1)"} <= set(
        texts_of(tmp_path / "a.svg")
    )


def test_groups_of_points_have_names_and_the_rest_comes_last(tmp_path):
    groups = [(f"class {number}", torch.rand(5, 2)) for number in range(20)]
    draw_points(tmp_path / "a.svg", groups, ("x axis", "y axis"), "Title", ("3 other classes", torch.rand(9, 2)))
    texts = texts_of(tmp_path / "a.svg")
    named = [text for text in texts if text.startswith("class") or "other" in text]
    assert named == [f"class {number}" for number in range(20)] + ["3 other classes"]
    assert {"x axis", "y axis", "Title"} <= set(texts)


def test_no_two_classes_of_a_legend_look_alike():
    looks = {(COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]) for number in range(MAX_CLASSES)}
    assert len(looks) == MAX_CLASSES


def test_every_head_is_a_point(tmp_path):
    draw_heads(tmp_path / "a.svg", torch.rand(4, 3), "pixels", "Title", ("reference", 2.0))
    uses = re.findall(r'style="fill: #0072b2; fill-opacity: 0.6"', (tmp_path / "a.svg").read_text())
    assert len(uses) >= 4 * 3
    assert {"pixels", "reference", "block"} <= set(texts_of(tmp_path / "a.svg"))
