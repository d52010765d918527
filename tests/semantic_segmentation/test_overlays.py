"""Label maps and pictures in files, read back."""

import threading

import numpy as np
import pytest
import torch
from PIL import Image

from beit.errors import InputError
from beit.visualization.figures import save_figure
from semantic_segmentation.data import SegmentationClasses, ade20k_classes
from semantic_segmentation.overlays import (
    MOST_WAITING,
    occurring,
    overlay,
    result_figure,
    save_label_map,
    writing_thread,
)

COLOURS = ((255, 0, 0), (0, 200, 100), (10, 20, 30))
CLASSES = SegmentationClasses(names=("wall", "tree, plant", "sea"), colours=COLOURS)


@pytest.fixture
def image():
    return torch.randint(0, 256, (3, 9, 14), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.fixture
def label_map():
    numbers = torch.randint(0, 3, (9, 14), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    numbers[2, 3:6] = 255
    return numbers


def test_a_label_map_is_a_grey_png(tmp_path, label_map):
    save_label_map(tmp_path / "new" / "a.png", label_map)
    with Image.open(tmp_path / "new" / "a.png") as file:
        assert (file.format, file.mode, file.size) == ("PNG", "L", (14, 9))
        assert np.array_equal(np.asarray(file), label_map.numpy())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


def test_the_server_of_ade20k_counts_from_one(tmp_path):
    # Broken by 8-bit sums that wrap elsewhere than at 255, where nothing is.
    save_label_map(tmp_path / "a.png", torch.tensor([[0, 1, 149, 255]]), add_one=True)
    with Image.open(tmp_path / "a.png") as file:
        assert file.mode == "L"
        assert np.asarray(file).tolist() == [[1, 2, 150, 0]]


def test_an_overlay_is_the_mean_of_image_and_colour(image, label_map):
    # Broken by channels or axes exchanged, by ignored pixels that are painted, by sums that overflow.
    for opacity in (0.5, 0.25, 1.0, 0.0):
        found = overlay(image, label_map, COLOURS, opacity)
        assert found.dtype == torch.uint8
        for y in range(9):
            for x in range(14):
                pixel = image[:, y, x].tolist()
                if (number := int(label_map[y, x])) != 255:
                    mix = [(1 - opacity) * old + opacity * new for old, new in zip(pixel, COLOURS[number], strict=True)]
                    assert found[:, y, x].tolist() == pytest.approx(mix, abs=0.51)
                else:
                    assert found[:, y, x].tolist() == pixel


def test_the_legend_has_the_classes_that_occur():
    # Broken by a legend of all 150 classes, by 255 as a class, by another order than by size.
    first, second = torch.full((40, 50), 149), torch.full((40, 50), 255)
    first[:10] = 7
    first[30, 30] = 3  # one pixel of 2000: nobody sees it
    second[0] = 20
    assert occurring([first], 150) == [149, 7]
    assert occurring([first, second], 150) == [149, 7, 20]
    assert occurring([torch.full((40, 50), 255)], 150) == []


def test_a_figure_shows_image_prediction_and_label(tmp_path, image, label_map):
    save_figure(result_figure(image, label_map, CLASSES), tmp_path / "two.png")
    save_figure(result_figure(image, label_map, CLASSES, label_map), tmp_path / "three.png")
    with Image.open(tmp_path / "two.png") as two, Image.open(tmp_path / "three.png") as three:
        assert three.width > 1.4 * two.width
        for file in (two, three):  # the legend's patches have the colours in full
            colours = {tuple(colour) for colour in np.asarray(file.convert("RGB")).reshape(-1, 3).tolist()}
            assert colours.issuperset(COLOURS)


def test_every_class_of_ade20k_fits(tmp_path):
    numbers = torch.arange(150).repeat_interleave(20).reshape(50, 60)
    save_figure(result_figure(torch.zeros(3, 50, 60, dtype=torch.uint8), numbers, ade20k_classes()), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as file:
        assert np.asarray(file.convert("RGB")).shape[0] > 800


@pytest.mark.parametrize(
    ("size", "number", "part"),
    [((9, 13), 0, "the image is 9x14 pixels and its segmentation 9x13"), ((9, 14), 3, "class 3 has no colour")],
)
def test_mistakes_are_said_in_one_line(image, size, number, part):
    with pytest.raises(InputError) as caught:
        overlay(image, torch.full(size, number), COLOURS)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_class_that_does_not_fit_in_8_bits(tmp_path):
    with pytest.raises(InputError, match="class 300 does not fit"):
        save_label_map(tmp_path / "a.png", torch.tensor([[0, 300]]))
    assert not list(tmp_path.iterdir())


# Beside the work


def test_calls_are_made_in_their_order_by_another_thread():
    seen = []
    with writing_thread() as write:
        for number in range(50):
            write(lambda number: seen.append((number, threading.get_ident())), number)
    assert [number for number, _ in seen] == list(range(50))
    assert {thread for _, thread in seen} != {threading.get_ident()}


def test_the_work_waits_for_a_thread_that_falls_behind():
    # Broken by results that pile up until they fill the memory.
    gate, made = threading.Event(), []

    def more():
        with writing_thread() as write:
            for number in range(MOST_WAITING + 5):
                write(gate.wait)
                made.append(number)

    work = threading.Thread(target=more)
    work.start()
    try:
        work.join(timeout=0.5)
        assert len(made) <= MOST_WAITING
    finally:
        gate.set()
    work.join(timeout=10)
    assert len(made) == MOST_WAITING + 5


def test_an_error_of_the_thread_ends_the_work(tmp_path):
    # Broken by files that were never written and nobody was told of.
    (tmp_path / "file").write_text("no folder")
    wrong = (tmp_path / "file" / "a.png", torch.zeros(2, 2))
    with pytest.raises(InputError, match="file"), writing_thread() as write:
        write(save_label_map, *wrong)
    made, gate = [], threading.Event()

    def work():
        with writing_thread() as write:
            write(save_label_map, *wrong)
            for number in range(MOST_WAITING + 1):
                write(lambda: None)
                made.append(number)

    def interrupted():
        with writing_thread() as write:
            write(gate.wait)
            write(save_label_map, *wrong)
            try:
                raise KeyboardInterrupt
            finally:
                gate.set()

    with pytest.raises(InputError, match="file"):
        work()
    assert len(made) <= MOST_WAITING
    with pytest.raises(KeyboardInterrupt):  # what ended the work itself comes first
        interrupted()
