"""``python -m semantic_segmentation predict``: which images, what their results are called, what the numbers mean."""

import logging
import os

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from beit.config import read_settings
from beit.errors import InputError
from semantic_segmentation.config import PredictConfig
from semantic_segmentation.modeling import build_segmentor
from semantic_segmentation.predict import find_images, main

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 8, "depth": 4, "num_heads": 2}
HEADS = {"out_indices": (0, 1, 2, 3), "channels": 4, "auxiliary_channels": 0, "use_rel_pos_bias": True}


def write_image(path, height=20, width=30, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def checkpoint(tmp_path):
    """Writes a checkpoint of a segmentor that sees one class everywhere, and what it records."""

    def write(sees: int = 2, num_classes: int = 3, **recorded):
        torch.manual_seed(0)
        segmentor = build_segmentor(**SIZES, **HEADS, num_classes=num_classes)
        nn.init.zeros_(segmentor.decode_head.conv_seg.weight)
        segmentor.decode_head.conv_seg.bias.data = torch.arange(num_classes).eq(sees).float()
        path = tmp_path / "segmentor.pth"
        torch.save({"model": segmentor.state_dict(), "image_size": [32, 32], "num_heads": 2, **recorded}, path)
        return str(path)

    return write


# Images and names


def test_results_are_called_as_the_images_are(tmp_path):
    first, second = write_image(tmp_path / "b.png"), write_image(tmp_path / "in" / "deep" / "a.jpg")
    write_image(tmp_path / "in" / "c.jpg")
    (tmp_path / "in" / "notes.txt").write_text("no image")
    found = find_images([str(first), str(tmp_path / "in"), str(second)], "out")  # `second` is given twice
    assert found == {str(first): "b", str(tmp_path / "in" / "c.jpg"): "c", str(second): os.path.join("deep", "a")}


def test_paths_may_be_relative(tmp_path, monkeypatch):
    write_image(tmp_path / "b.png")
    monkeypatch.chdir(tmp_path)
    assert find_images(["b.png", "./b.png"], "out") == {str(tmp_path / "b.png"): "b"}


def test_images_of_one_stem_keep_apart(tmp_path):
    # Broken by results that overwrite each other: in other folders, or with another extension.
    paths = [write_image(tmp_path / name) for name in ("x/a.jpg", "y/a.jpg", "y/a.png", "y/b.jpg")]
    found = find_images([str(path) for path in paths], "out")
    assert list(found.values()) == [
        os.path.join(*name.split("/")) for name in ("x/a.jpg", "y/a.jpg", "y/a.png", "y/b.jpg")
    ]


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["in"], ["x/a", "x/deep/b", "y/a"]),  # one stem in two folders
        (["in/x/a.jpg", "in/y/a.jpg"], ["x/a", "y/a"]),  # as a shell's in/*/a.jpg
        (["in/x", "in/y"], ["x/a", "x/deep/b", "y/a"]),
        (["in/x"], ["a", "deep/b"]),
    ],
)
def test_results_lie_as_the_images_do(tmp_path, given, names):
    # Broken by a.jpg.png, which training does not take for the label map of a.jpg.
    for name in ("x/a.jpg", "x/deep/b.jpg", "y/a.jpg"):
        write_image(tmp_path / "in" / name)
    found = find_images([str(tmp_path / place) for place in given], str(tmp_path / "out"))
    assert [name.replace(os.sep, "/") for name in found.values()] == names


def test_shards_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"\.tar: results are named after image files"):
        find_images([str(write_image(tmp_path / "a.jpg")), str(tmp_path / "images-{00..12}.tar")], "out")


@pytest.mark.parametrize("missing", ["nowhere.jpg", "empty"])
def test_what_is_not_there_is_named(tmp_path, missing):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=missing):
        find_images([str(write_image(tmp_path / "a.jpg")), str(tmp_path / missing)], "out")


# The whole command, in this process


def read(path):
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.parametrize(("reduced", "number"), [(True, 3), (False, 2)])
def test_it_writes_a_label_map_and_a_picture_for_each_image(tmp_path, checkpoint, reduced, number):
    images = [write_image(tmp_path / "wide.jpg", 20, 50), write_image(tmp_path / "tall.png", 40, 31)]
    file = checkpoint(
        labels=["sky", "road", "tree"], palette=[[0, 0, 0], [9, 9, 9], [0, 255, 0]], args={"reduce_zero_label": reduced}
    )
    output = tmp_path / "out"
    main(PredictConfig(tuple(map(str, images)), checkpoint=file, output_dir=str(output), device="cpu", opacity=1.0))
    endings = ("_figure.png", ".png", "_overlay.png")
    assert {path.name for path in output.iterdir()} == {stem + end for stem in ("tall", "wide") for end in endings}
    for name, size in (("wide", (20, 50)), ("tall", (40, 31))):
        labels = read(output / f"{name}.png")
        assert (labels.shape, labels.dtype) == (size, np.uint8)
        assert (labels == number).all()
        with Image.open(output / f"{name}.png") as label_map:  # the same numbers, to be looked at as colours
            assert (np.asarray(label_map.convert("RGB")) == (0, 255, 0)).all()
        assert (read(output / f"{name}_overlay.png") == np.full((*size, 3), (0, 255, 0))).all()  # as large as the image
        figure = read(output / f"{name}_figure.png")[..., :3].reshape(-1, 3)
        assert (figure == (0, 255, 0)).all(axis=1).mean() > 0.05  # the class's own colour, with no image through it


def test_what_cannot_be_read_is_named_when_the_rest_is_done(tmp_path, checkpoint, caplog):
    bad = tmp_path / "a_bad.jpg"
    bad.write_bytes(b"not an image")
    good = write_image(tmp_path / "good.jpg")
    config = PredictConfig(
        (str(bad), str(good)), checkpoint=checkpoint(), output_dir=str(tmp_path / "out"), device="cpu"
    )
    with (
        caplog.at_level(logging.ERROR),
        pytest.raises(InputError, match=r"^1 of 2 images could not be read: .*a_bad.jpg$"),
    ):
        main(config)
    assert "a_bad.jpg" in caplog.text
    assert (tmp_path / "out" / "good.png").exists()
    assert not (tmp_path / "out" / "a_bad.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint": ""}, "--checkpoint is missing"),
        ({"test_mode": "slides"}, "slide or whole, not 'slides'"),
        ({"test_batch_size": 0}, "at least 1 window"),
        ({"images": ()}, "no image"),
        ({"output_dir": "/proc/version/x"}, "--output_dir /proc/version/x: cannot be written"),
    ],
)
def test_mistakes_are_said_before_anything_is_written(tmp_path, checkpoint, options, message):
    image = str(write_image(tmp_path / "a.jpg"))
    output = tmp_path / "out"
    settings = {"images": (image,), "checkpoint": checkpoint(), "output_dir": str(output), "device": "cpu", **options}
    with pytest.raises(InputError, match=message):
        main(PredictConfig(**settings))
    assert not output.exists()


def test_an_opacity_that_shows_nothing_is_refused():
    with pytest.raises(InputError, match=r"--opacity 0\.0: must be "):
        read_settings(PredictConfig(opacity=0.0))


def settings_for(image, checkpoint, output, **options):
    return PredictConfig((str(image),), checkpoint=checkpoint, output_dir=str(output), device="cpu", **options)


def test_an_image_is_not_overwritten_by_its_own_labels(tmp_path, checkpoint):
    image = write_image(tmp_path / "photo.png")
    before = image.read_bytes()
    main(settings_for(image, checkpoint(), tmp_path, overwrite=True))
    assert image.read_bytes() == before
    assert (read(tmp_path / "photo.png.png") == 2).all()


@pytest.mark.parametrize("name", ["photo.png", "photo_overlay.png", "photo_figure.png", "deep/more.png"])
def test_files_of_others_are_not_overwritten(tmp_path, checkpoint, name):
    # Broken by hand-drawn label maps that a prediction into their folder replaces.
    for image in ("photo.jpg", "deep/more.jpg"):
        write_image(tmp_path / "in" / image)
    drawn = write_image(tmp_path / "annotations" / name)
    before, file = drawn.read_bytes(), checkpoint()
    with pytest.raises(InputError, match=rf"{name} exists and was not written by beit; .* --overwrite"):
        main(settings_for(tmp_path / "in", file, drawn.parents[name.count("/")]))
    assert drawn.read_bytes() == before
    assert len(list((tmp_path / "annotations").rglob("*.png"))) == 1
    main(settings_for(tmp_path / "in", file, tmp_path / "annotations", overwrite=True))
    assert drawn.read_bytes() != before


def test_results_are_replaced_by_those_of_the_next_run_and_are_no_images(tmp_path, checkpoint):
    # Broken by label maps and overlays that the second run segments.
    for image in ("photo.jpg", "deep/more.jpg", "out/own.jpg"):  # the last is no result, wherever it lies
        write_image(tmp_path / image)
    for sees in (1, 2):
        main(settings_for(tmp_path, checkpoint(sees), tmp_path / "out"))
    found = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png"))
    stems = ("deep/more", "out/own", "photo")
    assert found == sorted(stem + end for stem in stems for end in (".png", "_overlay.png", "_figure.png"))
    assert (read(tmp_path / "out" / "deep" / "more.png") == 2).all()


def test_labels_of_one_image_do_not_take_the_place_of_anothers_picture(tmp_path):
    # As when a folder is segmented that holds pictures of another program.
    paths = [write_image(tmp_path / name) for name in ("a.jpg", "a_overlay.png")]
    assert list(find_images([str(path) for path in paths], "out").values()) == ["a.jpg", "a_overlay.png"]
