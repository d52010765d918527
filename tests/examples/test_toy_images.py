import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from beit.data.datasets import index_images, read_image
from beit.errors import InputError
from examples import toy_images
from examples.toy_images import (
    PHOTOGRAPHS,
    SHAPES,
    TEXTURES,
    draw_scene,
    photograph_region,
    write_digits,
    write_photograph_crops,
    write_scenes,
    write_segmentation_scenes,
)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_scenes_are_jpegs_in_class_folders(tmp_path):
    write_scenes(tmp_path, 24, size=(48, 64), seed=1)
    index = index_images(tmp_path, tmp_path / ".cache")
    assert index.class_names == SHAPES
    assert Counter(index.class_id(i) for i in range(24)) == dict.fromkeys(range(8), 3)
    with Image.open(index.path(0)) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (64, 48))


def test_scenes_follow_from_seed_and_number(tmp_path):
    write_scenes(tmp_path / "a", 12, seed=1)
    write_scenes(tmp_path / "b", 16, seed=1)
    write_scenes(tmp_path / "c", 12, seed=2)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a.items() <= b.items()
    assert len(set(a.values()) | set(c.values())) == 24


def test_the_class_covers_most():
    for i in range(200):
        _, labels = draw_scene(64, np.random.default_rng(i), SHAPES[i % 8])
        assert np.bincount(labels.ravel(), minlength=9)[1:].argmax() == i % 8


def test_scenes_vary_and_shapes_hide_each_other():
    scenes = [draw_scene(64, np.random.default_rng(i), "disc") for i in range(60)]
    shapes = [len(np.unique(labels)) - 1 for _, labels in scenes]
    assert min(shapes) == 1
    assert max(shapes) >= 3
    discs = [(labels == SHAPES.index("disc") + 1).sum() for _, labels in scenes]
    assert max(discs) > 1.3 * min(discs)
    means = np.array([np.asarray(image).mean((0, 1)) for image, _ in scenes])
    assert means.std(0).min() > 20  # colours


@pytest.mark.parametrize("shape", SHAPES)
def test_outlines_have_the_right_size(shape):
    cover = toy_images._coverage(toy_images.OUTLINES[shape], (0, 0, 100, 100), (50, 50), 40, 0.3)
    assert cover.min() >= 0
    assert cover.max() == 1
    assert 0.13 < cover.mean() < 0.6
    assert cover[0].max() == cover[:, 0].max() == 0


@pytest.mark.parametrize("texture", TEXTURES)
def test_textures_are_shares(texture):
    y, x = np.mgrid[-0.5:0.5:64j, -0.5:0.5:48j].astype(np.float32)
    for i in range(20):
        field = TEXTURES[texture](x, y, np.random.default_rng(i))
        assert field.shape == x.shape
        assert 0 <= field.min() <= field.max() <= 1
        assert texture == "plain" or np.ptp(field) > 0.3


def test_segmentation_scenes_have_ade20ks_layout(tmp_path):
    write_segmentation_scenes(tmp_path, 10, seed=4, validation_count=3)
    expected = {"classes.txt"}
    for split, short, count in (("training", "train", 10), ("validation", "val", 3)):
        for i in range(1, count + 1):
            expected |= {f"images/{split}/ADE_{short}_{i:08d}.jpg", f"annotations/{split}/ADE_{short}_{i:08d}.png"}
    files = contents(tmp_path)
    assert set(files) == expected
    assert len(set(files.values())) == len(files)
    assert (tmp_path / "classes.txt").read_text().split() == list(SHAPES)
    with Image.open(tmp_path / "annotations/training/ADE_train_00000003.png") as image:
        assert image.mode == "L"
        labels = np.asarray(image)
    assert np.bincount(labels.ravel(), minlength=9)[1:].argmax() == 2
    assert 0 in labels


def test_segmentation_scenes_are_the_same_scenes(tmp_path):
    write_scenes(tmp_path / "classes", 4, seed=4)
    write_segmentation_scenes(tmp_path / "masks", 4, seed=4)
    for i in range(4):
        scene = (tmp_path / "classes" / SHAPES[i] / f"{i:06d}.jpg").read_bytes()
        assert (tmp_path / f"masks/images/training/ADE_train_{i + 1:08d}.jpg").read_bytes() == scene


def test_masks_lie_on_the_shapes():
    # The pixels of the dominant shape differ from those around it where both are plain.
    image, labels = next(
        (image, labels)
        for image, labels in (draw_scene(64, np.random.default_rng(i), "square") for i in range(500))
        if len(np.unique(labels)) == 2
        and all(np.asarray(image)[part].std(0).max() < 16 for part in (labels == 0, labels != 0))
    )
    pixels = np.asarray(image).astype(float)
    inside, outside = pixels[labels != 0].mean(0), pixels[labels == 0].mean(0)
    nearer_inside = np.abs(pixels - inside).sum(-1) < np.abs(pixels - outside).sum(-1)
    assert (nearer_inside == (labels != 0)).mean() > 0.98


def test_crops_of_photographs(tmp_path):
    write_photograph_crops(tmp_path / "a", 21, size=32, seed=1)
    write_photograph_crops(tmp_path / "b", 21, size=32, seed=1)
    write_photograph_crops(tmp_path / "c", 21, size=32, seed=2)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert not set(a.values()) & set(c.values())
    assert {name.rpartition("_")[0] for name in a} == {name.rpartition(".")[0] for name in PHOTOGRAPHS}
    images = [read_image(path) for path in (tmp_path / "a").iterdir()]
    assert {image.size for image in images} == {(32, 32)}
    assert np.mean([np.asarray(image.convert("L")).std() > 14 for image in images]) > 0.9


@pytest.mark.parametrize("side", ["left", "right", "bottom"])
def test_held_out_regions_do_not_overlap(side):
    seen = np.zeros((60, 91), dtype=int)
    for held_out in (False, True):
        left, top, right, bottom = photograph_region((91, 60), side, held_out)
        seen[top:bottom, left:right] += 1
    assert (seen == 1).all()
    assert 0.3 < (right - left) * (bottom - top) / seen.size < 0.36


def test_held_out_crops_show_no_training_pixel(monkeypatch):
    # Resizing looks a few pixels beyond a box: the crop must be of the region alone. The rest is painted red here.
    whole = Image.new("RGB", (90, 60), "red")
    region = photograph_region(whole.size, "left", True)
    noise = np.random.default_rng(0).integers(0, 256, (60, 30, 1), dtype=np.uint8).repeat(3, axis=2)
    whole.paste(Image.fromarray(noise), region[:2])
    for i in range(50):
        crop = np.asarray(toy_images._crop(whole, region, (16, 16), np.random.default_rng(i)))
        assert (crop[..., 0] == crop[..., 1]).all()


def test_without_scikit_image_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(toy_images.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install scikit-"):
        write_photograph_crops(tmp_path, 1)


def test_digits_are_all_there_once_and_split_by_class(tmp_path):
    # Broken by a digit in both splits, a wrong label, or a scale that cuts the brightest level off.
    write_digits(tmp_path, size=(8, 8), seed=3)
    train, val = (index_images(tmp_path / split, tmp_path / ".cache") for split in ("train", "val"))
    assert train.class_names == val.class_names == tuple("0123456789")
    assert len(train) + len(val) == 1797
    counts = [Counter(index.class_id(i) for i in range(len(index))) for index in (train, val)]
    assert all(abs(counts[1][c] / (counts[0][c] + counts[1][c]) - 0.25) < 0.01 for c in range(10))
    originals = load_digits()
    seen = set()
    for index in (train, val):
        for i in range(len(index)):
            number = int(index.path(i)[-8:-4])
            seen.add(number)
            assert index.class_names[index.class_id(i)] == str(originals.target[number])
            if number % 100 == 0:
                with Image.open(index.path(i)) as image:
                    np.testing.assert_allclose(np.asarray(image) / 255 * 16, originals.images[number], atol=0.04)
    assert seen == set(range(1797))


def test_digits_follow_from_the_seed_and_have_the_size_asked_for(tmp_path, monkeypatch):
    few = SimpleNamespace(images=np.full((80, 8, 8), 12.0), target=np.arange(80) % 10)
    monkeypatch.setattr("sklearn.datasets.load_digits", lambda: few)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_digits(tmp_path / name, size=(16, 24), seed=seed)
    a, b, c = (set(contents(tmp_path / name)) for name in "abc")
    assert a == b
    assert a != c
    assert len(a) == 80
    assert {Image.open(tmp_path / "a" / name).size for name in a} == {(24, 16)}


def test_without_scikit_learn_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match=r"scikit-learn.*pip install scikit-"):
        write_digits(tmp_path)
