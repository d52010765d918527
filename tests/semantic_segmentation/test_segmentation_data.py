"""Which images and labels there are, what is read of them, and that a sample is the same for whoever asks.

The files are made here; what a label map holds is known, so a reader that converts it, or a reduction that touches the
image, shows at once.
"""

import logging
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from beit.data.loaders import EpochLoader
from beit.errors import InputError
from examples.toy_images import SHAPES, write_segmentation_scenes
from semantic_segmentation import data
from semantic_segmentation.data import (
    ImagePairs,
    SegmentationDataset,
    ade20k_classes,
    check_labels,
    find_classes,
    find_pairs,
    named_classes,
    read_classes,
    read_labels,
    reduce_zero,
)
from semantic_segmentation.transforms import TrainTransform


@pytest.fixture(autouse=True)
def own_index_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("BEIT_HOME", str(tmp_path / "home"))


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


def write(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array)).save(path, **options)
    return path


def as_decoded(image, label, rng):
    return {"image": image.as_subclass(torch.Tensor), "label": label.as_subclass(torch.Tensor)}


@pytest.fixture
def folders(tmp_path):
    """Three grey-blue images of 6 x 4 pixels with the labels 0 to 23, row by row."""
    for name in "abc":
        write(tmp_path / "images" / f"{name}.png", np.full((6, 4, 3), (90, 90, 120), np.uint8))
        write(tmp_path / "labels" / f"{name}.png", np.arange(24, dtype=np.uint8).reshape(6, 4))
    return tmp_path


def dataset(folders, num_classes=24, reduce_zero_label=False, transform=as_decoded):
    pairs = find_pairs(folders / "images", folders / "labels")
    return SegmentationDataset(pairs, transform, 3, num_classes=num_classes, reduce_zero_label=reduce_zero_label)


# Classes


def test_ade20k_has_150_classes_and_the_colours_of_mmsegmentation():
    classes = ade20k_classes()
    assert len(classes) == len(set(classes.names)) == len(classes.colours) == 150
    # A few places of the published list, from its ends and where a slip by one would show.
    places = {0: "wall", 7: "bed", 12: "person", 44: "chest of drawers", 89: "television receiver", 149: "flag"}
    assert {place: classes.names[place] for place in places} == places
    colours = {0: (120, 120, 120), 7: (204, 5, 255), 12: (150, 5, 61), 89: (0, 255, 194), 149: (92, 0, 255)}
    assert {place: classes.colours[place] for place in colours} == colours
    assert len(set(classes.colours)) == 149  # as published: road and skyscraper share one
    assert classes.colours[classes.names.index("road")] == classes.colours[classes.names.index("skyscraper")]


def test_a_list_of_classes_with_and_without_colours(tmp_path):
    path = tmp_path / "classes.txt"
    text = "\ufeff# comment\nsky\t70 130 180\n\ntraffic light 250  170 30 \nperson, standing\nclass 1\nlane 2 0 0 255\n"
    path.write_text(text, encoding="utf-8")
    classes = read_classes(path)
    assert classes.names == ("sky", "traffic light", "person, standing", "class 1", "lane 2")
    assert classes.colours[:2] == ((70, 130, 180), (250, 170, 30))
    assert classes.colours[4] == (0, 0, 255)
    assert len(set(classes.colours)) == 5
    assert read_classes(path) == classes


def test_colours_that_are_made_up_differ_from_all_others(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("\n".join(f"c{i}" for i in range(255)), encoding="utf-8")
    colours = read_classes(path).colours
    assert len(set(colours)) == 255
    path.write_text(f"first {' '.join(map(str, colours[0]))}\nsecond\n", encoding="utf-8")
    assert len(set(read_classes(path).colours)) == 2
    path.write_text("c0\nc1\n", encoding="utf-8")
    assert read_classes(path).colours == colours[:2]  # and do not change when a class is added


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; it needs one name a line"),
        ("# nothing\n\n", "is empty; it needs one name a line"),
        ("sky\nwall\nsky 1 2 3\n", "names the class 'sky' twice, in lines 1 and 3"),
        ("sky\nwall 256 0 0\n", "line 2 of .*'wall 256 0 0', has a colour beyond 255: write a name, or"),
        ("wall 12 30\n", "line 1 of .*not quite a colour"),
        ("wall 12,30,40\n", "line 1 of .*not quite a colour"),
        ("wall (12, 30, 40)\n", "line 1 of .*not quite a colour"),
        ("wall -1 30 40\n", "line 1 of .*not quite a colour"),
        ("wall 0.5 0.5 0.5\n", "line 1 of .*not quite a colour"),
        ("wall #78a0ff\n", "line 1 of .*not quite a colour"),
        ("120 120 120\n", "line 1 of .*not quite a colour"),
    ],
)
def test_a_list_of_classes_that_cannot_be_right(tmp_path, text, message):
    path = tmp_path / "classes.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message) as error:
        read_classes(path)
    assert str(path) in one_line(error)


def test_a_list_of_classes_that_is_none(tmp_path):
    with pytest.raises(InputError, match=r"cannot read the list of classes .*none\.txt: no such file") as error:
        read_classes(tmp_path / "none.txt")
    one_line(error)
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(InputError, match=r"binary\.txt is not a text file") as error:
        read_classes(tmp_path / "binary.txt")
    one_line(error)


def test_which_list_of_classes_counts(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert find_classes(tmp_path) == ade20k_classes()
    assert "using the 150 classes of ADE20K; --classes names others" in caplog.text
    assert caplog.records[-1].levelno == logging.WARNING  # a guess, unless it is ADE20K's own folder
    assert find_classes(tmp_path / "ADEChallengeData2016") == ade20k_classes()
    assert caplog.records[-1].levelno == logging.INFO
    assert "reduce_zero_label" not in caplog.text
    find_classes(tmp_path, reduce_zero_label=False)
    assert "reduce_zero_label is off: label 0, ignored in ADE20K, is taken for 'wall'" in caplog.text
    (tmp_path / "classes.txt").write_text("own\n", encoding="utf-8")
    (tmp_path / "other.txt").write_text("other\n", encoding="utf-8")
    assert find_classes(tmp_path).names == ("own",)
    assert find_classes(tmp_path, tmp_path / "other.txt").names == ("other",)
    with pytest.raises(InputError, match="missing"):
        find_classes(tmp_path, tmp_path / "missing.txt")


# Pairs


def test_images_and_label_maps_pair_by_name(tmp_path):
    names = ["b.JPG", "a.jpeg", "sub/a.png", "c.d.jpg", "sub-1/z.jpg"]
    for name in names:
        write(tmp_path / "images" / name, np.zeros((2, 2, 3), np.uint8))
        write((tmp_path / "labels" / name).with_suffix(".png"), np.zeros((2, 2), np.uint8))
    (tmp_path / "images" / "notes.txt").write_text("not an image", encoding="utf-8")
    pairs = find_pairs(tmp_path / "images", tmp_path / "labels")
    assert [pairs.name(i) for i in range(len(pairs))] == ["a", "b", "c.d", "sub-1/z", "sub/a"]
    assert [path.name for path in pairs.images] == ["a.jpeg", "b.JPG", "c.d.jpg", "z.jpg", "a.png"]
    assert pairs.labels == tuple(tmp_path / "labels" / f"{pairs.name(i)}.png" for i in range(5))
    alone = find_pairs(tmp_path / "images")
    assert (alone.images, alone.labels) == (pairs.images, ())


@pytest.mark.parametrize("name", ["mask.tif", "mask.TIFF", "mask.bmp", "m\u00fcnster.png", "mu\u0308nster.png"])
def test_label_maps_of_other_kinds_and_spellings_pair(tmp_path, name):
    # Broken by letters with accents, which macOS and Linux spell in two ways that look the same.
    stem = "mask" if name.startswith("mask") else "m\u00fcnster"
    image = write(tmp_path / "images" / f"{stem}.jpg", np.zeros((2, 3, 3), np.uint8))
    labels = write(tmp_path / "labels" / name, np.array([[0, 1, 2], [3, 4, 255]], np.uint8))
    pairs = find_pairs(tmp_path / "images", tmp_path / "labels")
    assert (pairs.images, pairs.labels) == ((image,), (labels,))
    assert read_labels(labels).tolist() == [[0, 1, 2], [3, 4, 255]]


def test_files_without_a_partner_are_named(folders):
    (folders / "labels" / "b.png").unlink()
    with pytest.raises(InputError) as error:
        find_pairs(folders / "images", folders / "labels")
    assert one_line(error) == (
        f"1 of 3 images in {folders / 'images'} have no label map: b (the label map of a.jpg is a.png)"
    )
    for name in "defgh":
        write(folders / "labels" / f"{name}.png", np.zeros((2, 2), np.uint8))
    with pytest.raises(InputError) as error:
        find_pairs(folders / "images", folders / "labels")
    assert one_line(error) == (
        f"1 of 3 images in {folders / 'images'} have no label map: b; 5 of 7 label maps in {folders / 'labels'} have "
        "no image: d, e, f and 2 more (the label map of a.jpg is a.png)"
    )


def test_two_images_for_one_label_map(folders):
    write(folders / "images" / "a.jpg", np.zeros((2, 2, 3), np.uint8))
    with pytest.raises(InputError, match=r"a\.jpg and a\.png would have the same label map") as error:
        find_pairs(folders / "images", folders / "labels")
    one_line(error)


def test_folders_that_are_missing_or_empty(folders):
    with pytest.raises(InputError) as error:
        find_pairs(folders / "images", folders / "label")
    missing = f"no such folder or list of images: {folders / 'label'}"
    assert one_line(error) == f"{missing} (did you mean 'labels'?)"
    for images, labels in (("images", "labels/a.png"), ("images", "a-*.tar"), ("a-*.tar", "labels")):
        with pytest.raises(
            InputError, match=r"(a\.png|a-\*\.tar) is not a folder: images with label maps are"
        ) as error:
            find_pairs(folders / images, folders / labels)
        one_line(error)
    (folders / "empty").mkdir()
    for arguments in ((folders / "empty",), (folders / "images", folders / "empty")):
        with pytest.raises(InputError, match=r"no images in .*empty or the folders below: .*no files at all") as error:
            find_pairs(*arguments)
        one_line(error)
    write(folders / "jpegs" / "a.jpg", np.zeros((2, 2), np.uint8))
    with pytest.raises(
        InputError, match=r"no label maps \(\.png .*\.bmp\) in .*jpegs or .*, but images like a\.jpg"
    ) as error:
        find_pairs(folders / "images", folders / "jpegs")
    one_line(error)


# Label maps


def test_zero_is_left_out_and_the_rest_moves_down():
    expected = [255, *range(254), 255]
    for labels in (torch.arange(256, dtype=torch.uint8), torch.arange(256)):
        before = labels.tolist()
        reduced = reduce_zero(labels)
        assert reduced.dtype == labels.dtype
        assert reduced.tolist() == expected
        assert labels.tolist() == before


def test_only_the_labels_are_reduced(folders):
    """The image has the same levels as the label map, and they must stay as they are."""
    levels = np.array([[0, 1, 2, 254], [0, 7, 150, 255]], np.uint8)
    write(folders / "images" / "a.png", levels[..., None].repeat(3, 2))
    write(folders / "labels" / "a.png", levels)
    sample = dataset(folders, 254, reduce_zero_label=True)[0, 0]
    assert sample["image"].tolist() == [levels.tolist()] * 3
    assert sample["label"].tolist() == [[255, 0, 1, 253], [255, 6, 149, 255]]
    assert dataset(folders, 255)[0, 0]["label"].tolist() == levels.tolist()
    pairs = find_pairs(folders / "images", folders / "labels")
    whole = SegmentationDataset(pairs, num_classes=254, reduce_zero_label=True)[0, 0]
    assert whole["index"] == 0
    assert torch.equal(whole["image"], sample["image"])
    assert torch.equal(whole["label"], sample["label"])


def palette_image(labels):
    image = Image.fromarray(labels).convert("P")
    image.putdata(labels.ravel().tolist())
    image.putpalette([channel for i in range(256) for channel in (255 - i, i // 2, 7)])
    return image


def test_a_palette_is_not_looked_up(tmp_path):
    labels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    palette_image(labels).save(tmp_path / "palette.png")
    palette_image(labels).save(tmp_path / "transparent.png", transparency=3)
    for name in ("palette", "transparent"):
        np.testing.assert_array_equal(read_labels(tmp_path / f"{name}.png"), labels)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_labels_of_fewer_bits_are_the_numbers_in_the_file(tmp_path, bits):
    """Pillow spreads greys of 2 and 4 bits to 0..255, and opens 1 bit as true and false."""
    labels = (np.arange(48, dtype=np.uint8) % 2**bits).reshape(6, 8)
    palette_image(labels).save(tmp_path / "palette.png", bits=bits)
    np.testing.assert_array_equal(read_labels(tmp_path / "palette.png"), labels)
    write_grey_png(tmp_path / "grey.png", labels, bits)
    np.testing.assert_array_equal(read_labels(tmp_path / "grey.png"), labels)


def write_grey_png(path, labels, bits):
    """Writes a PNG by hand: Pillow writes no greys of 2 or 4 bits."""
    import struct
    import zlib

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    as_bits = np.unpackbits(labels[..., None], axis=2)[..., 8 - bits :].reshape(labels.shape[0], -1)
    rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in as_bits)
    header = struct.pack(">IIBBBBB", labels.shape[1], labels.shape[0], bits, 0, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def test_greys_of_16_bits_will_do_below_256(tmp_path):
    labels = np.array([[0, 1], [149, 255]], np.uint16)
    np.testing.assert_array_equal(read_labels(write(tmp_path / "deep.png", labels)), labels)
    write(tmp_path / "deep.png", labels * 256)
    with pytest.raises(InputError, match=r"deep\.png has the label 65280; labels go from 0 to 255") as error:
        read_labels(tmp_path / "deep.png")
    one_line(error)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_colours_are_no_labels(tmp_path, mode):
    Image.new(mode, (4, 4)).save(tmp_path / "colours.png")
    with pytest.raises(InputError, match=rf"colours\.png is a picture in colours \({mode}\), not a label map") as error:
        read_labels(tmp_path / "colours.png")
    one_line(error)


def test_floating_point_numbers_are_no_labels(tmp_path):
    Image.new("F", (4, 4)).save(tmp_path / "floats.tif")
    with pytest.raises(InputError, match=r"floats\.tif is of floating-point numbers, not a label map") as error:
        read_labels(tmp_path / "floats.tif")
    one_line(error)


# Samples


@pytest.mark.parametrize(
    ("reduce_zero_label", "num_classes", "message"),
    [
        (False, 22, "has the label 23, but the 22 classes have the labels 0 to 21 (255 is no class)"),
        (
            False,
            23,
            "has the label 23, but the 23 classes have the labels 0 to 22 (255 is no class); if 0 is no class, as in "
            "ADE20K, set reduce_zero_label",
        ),
        (True, 22, "has the label 23, but the 22 classes have the labels 1 to 22 (0 and 255 are no class)"),
    ],
)
def test_a_label_of_no_class_is_named(folders, reduce_zero_label, num_classes, message):
    with pytest.raises(InputError) as error:
        dataset(folders, num_classes, reduce_zero_label)[0, 1]
    assert one_line(error) == f"{folders / 'labels' / 'b.png'} {message}"
    dataset(folders, 24, reduce_zero_label)[0, 1]
    dataset(folders, 23, reduce_zero_label=True)[0, 1]


def test_a_label_map_of_another_size_is_named(folders):
    write(folders / "labels" / "a.png", np.zeros((6, 5), np.uint8))
    with pytest.raises(InputError) as error:
        dataset(folders)[0, 0]
    assert one_line(error) == (
        f"the label map {folders / 'labels' / 'a.png'} is 6x5 pixels (height x width), but its image "
        f"{folders / 'images' / 'a.png'} 6x4"
    )


def test_files_that_cannot_be_read_are_named(folders):
    (folders / "images" / "a.png").write_bytes(b"not an image")
    (folders / "labels" / "b.png").write_bytes(b"")
    whole = (folders / "labels" / "c.png").read_bytes()
    (folders / "labels" / "c.png").write_bytes(whole[: len(whole) // 2])
    samples = dataset(folders)
    for index, message in [
        (0, r"cannot read the image .*images/a\.png: not an image"),
        (1, r"cannot read the label map .*labels/b\.png: not an image, or an empty file"),
        (2, r"cannot read the label map .*labels/c\.png: .*\w"),
    ]:
        with pytest.raises(InputError, match=message) as error:
            samples[0, index]
        one_line(error)
    (folders / "labels" / "c.png").unlink()
    with pytest.raises(InputError, match=r"labels/c\.png: no such file or directory"):
        samples[0, 2]


def pairs_of(folder, maps):
    """Writes images with label maps of one row."""
    for number, row in enumerate(maps):
        write(folder / "images" / f"{number:03}.png", np.zeros((1, len(row), 3), np.uint8))
        write(folder / "labels" / f"{number:03}.png", np.array([row], np.uint8))
    return find_pairs(folder / "images", folder / "labels")


@pytest.mark.parametrize(
    ("maps", "reduced", "said"),
    [
        # a mask of one object, drawn black and white
        ([[0, 255]], True, "only 0 and 255, and 0 (unless you set reduce_zero_label=False) and 255 mean no label here"),
        ([[255]], False, "there is only 255, and 255 means no label here; write classes as 0, 1, and so on"),
        ([[0, 0]], True, "there is only 0, and 0 (unless"),
        ([[0, 9]], True, "000.png has the label 9, but the 3 classes have the labels 1 to 3 (0 and 255 are no class)"),
        ([[0, 3]], False, "000.png has the label 3, but the 3 classes have the labels 0 to 2"),
    ],
)
def test_label_maps_that_cannot_be_used_are_refused_at_the_start(tmp_path, maps, reduced, said):
    # Broken by masks of 0 and 255, with which training runs to its end and has learnt nothing.
    with pytest.raises(InputError) as caught:
        check_labels(pairs_of(tmp_path, maps), named_classes(["grass", "box", "ball"]), reduced)
    assert said in one_line(caught)


@pytest.mark.parametrize(
    ("maps", "names", "reduced", "said"),
    [
        # 0 is the background, and reduce_zero_label is left on: the object is called background and IoU is 100
        ([[0, 0, 1]], "background object", True, "so 0 (67% of the pixels of 1 of 1 label maps in"),
        ([[0, 1, 1]], "Unlabeled object", True, "no class and 1 is 'Unlabeled': if 0 is a class, as the background is"),
        ([[0, 0, 0, 1, 2]], "grass box ball", True, "so 0 (60% of"),
        ([[1, 1, 0], [2, 2, 0]], "grass box ball", True, "the last class, 3 'ball', does not occur in 2 of 2 label"),
        ([[0, 1, 255]], "grass box ball", False, "the last class, 2 'ball', does not occur"),
        ([[0, 255]] * 2, "grass box", False, "0 is the only class in 2 of 2 label maps"),
        ([[1, 1, 0]], "grass box", True, "1 is the only class in"),
        ([[0, 0, 1, 2]], "background box ball", False, ""),
        ([[1, 2, 255]], "grass box", True, ""),
        ([[0, 0, 0, 1, 2]], "grass box", True, ""),  # much is unlabelled, and the names fit the numbers
        ([[0, 255]] * 20 + [[1, 0]], "grass box", False, ""),  # seen since more than the first are looked at
    ],
)
def test_numbers_and_names_that_hardly_go_together_are_said(tmp_path, caplog, maps, names, reduced, said):
    check_labels(pairs_of(tmp_path, maps), named_classes(names.split()), reduced)
    texts = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any(said in text for text in texts) is bool(said)
    assert bool(texts) is bool(said)
    assert not any("\n" in text for text in texts)


def test_the_labels_seen_are_listed_with_their_names(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    check_labels(pairs_of(tmp_path, [[0, 1, 1, 3], [255, 2, 2, 2]]), named_classes(["sky", "road", "tree"]), True)
    assert [line for line in caplog.messages if line.startswith("labels in")] == [
        f"labels in 2 of 2 label maps in {tmp_path / 'labels'}: 0 (no class) 12.5%, 1 'sky' 25.0%, 2 'road' 37.5%, "
        "3 'tree' 12.5%, 255 (no class) 12.5%"
    ]


def test_label_maps_are_looked_at_until_classes_are_seen(tmp_path, monkeypatch):
    # Broken by every fourth map, in order, of which none has labels while all others have.
    classes, maps = named_classes(["grass", "box"]), [[255, 0] if n % 4 == 0 else [1, 2] for n in range(64)]
    check_labels(pairs_of(tmp_path, maps), classes, True)
    pairs = find_pairs(tmp_path / "images", tmp_path / "labels")

    def looked_at(first):
        """Returns the maps looked at, where those before number `first` have no label."""
        seen = []

        def stand_in(path):
            seen.append(int(path.stem))
            return np.array([[1, 2] if len(seen) >= first else [0, 255]], np.uint8)

        monkeypatch.setattr(data, "read_labels", stand_in)
        check_labels(pairs, classes, True)
        return seen

    for first, count in ((1, 16), (40, 40), (64, 64)):
        seen = looked_at(first)
        assert len(seen) == len(set(seen)) == count
        assert max(seen[:16]) > 40  # from all over
        assert looked_at(first) == seen


def test_a_sample_has_an_end(tmp_path, monkeypatch):
    pairs, seen = pairs_of(tmp_path, [[1, 1]]), []
    monkeypatch.setattr(data, "_upright_size", lambda _: (1, 2))
    monkeypatch.setattr(data, "read_labels", lambda path: seen.append(path) or np.array([[1, 1]], np.uint8))
    check_labels(ImagePairs(pairs.images * 2000, pairs.labels * 2000, pairs.root), named_classes(["a", "b"]), True)
    assert len(seen) == 512


@pytest.mark.parametrize("kind", ["larger", "rotated", "damaged"])
def test_sizes_are_compared_before_the_work(tmp_path, kind):
    # Broken by a map that is not in the sample, and fails at the first evaluation, after hours.
    maps = [[1, 2]] * 60
    for index in (0, 31, 59):
        pairs = pairs_of(tmp_path / f"{index}", maps)
        said = rf"{index:03}\.png is 2x1 pixels \(height x width\), but its image .*{index:03}\.\w+ 1x2; if its EXIF"
        if kind == "larger":
            write(pairs.labels[index], np.ones((4, 2), np.uint8))
            said = rf"{index:03}\.png is 4x2 pixels .* 1x2$"
        elif kind == "rotated":  # as stored it fits, as shown it does not
            pairs.images[index].unlink()
            exif = Image.Exif()
            exif[0x0112] = 8
            Image.new("RGB", (2, 1)).save(pairs.images[index].with_suffix(".jpg"), exif=exif)
            write(pairs.labels[index], np.ones((1, 2), np.uint8))
            said = rf"{index:03}\.png is 1x2 pixels .*, but its image .*{index:03}\.jpg 2x1; if its EXIF data rotate it"
        else:
            pairs.images[index].write_bytes(b"no image")
            said = rf"cannot read the image .*{index:03}\.png: not an image"
        with pytest.raises(InputError, match=said) as error:
            check_labels(
                find_pairs(pairs.root, tmp_path / f"{index}" / "labels"), named_classes(["grass", "box"]), True
            )
        one_line(error)


def test_how_many_classes_a_label_map_can_tell_apart(folders):
    for count, reduce_zero_label, most in [(0, False, 255), (256, False, 255), (255, True, 254)]:
        with pytest.raises(InputError, match=f"1 to {most} classes in label maps of 8 bits, got {count}"):
            dataset(folders, count, reduce_zero_label)
    pairs = find_pairs(folders / "images")
    with pytest.raises(InputError, match=r"there is one class, so nothing to tell apart"):
        dataset(folders, 1, reduce_zero_label=True)
    with pytest.raises(InputError, match=r"training needs label maps; the images in .*images have none"):
        SegmentationDataset(pairs, as_decoded, num_classes=3, reduce_zero_label=False)
    without_labels = SegmentationDataset(pairs, num_classes=3, reduce_zero_label=False)[0, 2]
    assert without_labels["label"].unique().tolist() == [255]


def test_images_of_other_kinds(folders):
    """Greys, CMYK, and a photograph that lies on its side: what is read is upright RGB, of the label map's size."""
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (6, 4), dtype=np.uint8)
    write(folders / "images" / "a.png", grey)
    (folders / "images" / "b.png").unlink()
    Image.new("CMYK", (4, 6), (0, 0, 0, 0)).save(folders / "images" / "b.jpg")
    (folders / "images" / "c.png").unlink()
    lying = Image.new("RGB", (60, 40), "red")
    lying.paste("blue", (0, 0, 30, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn to the right: 40 x 60, the left half on top
    lying.save(folders / "images" / "c.jpg", exif=exif, quality=95)
    write(folders / "labels" / "c.png", np.zeros((60, 40), np.uint8))
    samples = dataset(folders)
    assert samples[0, 0]["image"].tolist() == [grey.tolist()] * 3
    assert (samples[0, 1]["image"] == 255).all()
    image = samples[0, 2]["image"]
    assert image.shape == (3, 60, 40)
    assert image[:, 10, 20].argmax() == 2
    assert image[:, 50, 20].argmax() == 0
    write(folders / "labels" / "c.png", np.zeros((40, 60), np.uint8))
    with pytest.raises(
        InputError, match=r"c\.png is 40x60 pixels .* 60x40; if its EXIF data rotate it, .* upright"
    ) as error:
        samples[0, 2]
    one_line(error)


def test_an_image_of_one_pixel(folders):
    write(folders / "images" / "a.png", np.full((1, 1, 3), 9, np.uint8))
    write(folders / "labels" / "a.png", np.full((1, 1), 4, np.uint8))
    transform = TrainTransform(image_scale=(64, 16), crop_size=24, photometric=False)
    sample = dataset(folders, transform=transform)[0, 0]
    height, width = sample["size"].tolist()
    assert (sample["label"][:height, :width] == 4).all()
    assert (sample["image"][:, :height, :width] == 9).all()


# The same sample for whoever asks


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    write_segmentation_scenes(folder, 6, size=(48, 60), seed=1)
    return folder


def scene_dataset(scenes, seed=0):
    pairs = find_pairs(scenes / "images" / "training", scenes / "annotations" / "training")
    transform = TrainTransform(image_scale=(256, 64), crop_size=(40, 56))
    classes = find_classes(scenes)
    assert classes.names == tuple(SHAPES)
    return SegmentationDataset(pairs, transform, seed, num_classes=len(classes), reduce_zero_label=True)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_sample_follows_from_seed_epoch_and_index(scenes):
    samples = scene_dataset(scenes)
    first = samples[1, 2]
    before = torch.get_rng_state()
    samples[0, 0]
    assert torch.equal(torch.get_rng_state(), before)
    assert equal(samples[1, 2], first)
    assert equal(scene_dataset(scenes)[1, 2], first)
    assert not equal(samples[0, 2], first)
    assert not equal(samples[1, 3], first)
    assert not equal(scene_dataset(scenes, seed=1)[1, 2], first)


def test_batches_do_not_depend_on_workers(scenes):
    batches = []
    for workers in (0, 2):
        loader = EpochLoader(scene_dataset(scenes), batch_size=2, num_workers=workers)
        batches.append([batch for epoch in range(2) for batch in loader.epoch(epoch)])
        loader.close()
    assert len(batches[0]) == len(batches[1]) == 6
    assert all(equal(one, other) for one, other in zip(*batches, strict=True))
    batch = batches[0][0]
    assert {key: tuple(value.shape) for key, value in batch.items()} == {
        "image": (2, 3, 40, 56),
        "label": (2, 40, 56),
        "size": (2, 2),
    }
    assert {type(value) for value in batch.values()} == {torch.Tensor}
    labels = torch.cat([batch["label"].flatten() for batch in batches[0]]).unique().tolist()
    assert labels[-1] == 255
    assert labels[-2] < len(SHAPES)


def test_a_mistake_in_a_worker_arrives_as_one_line(folders):
    write(folders / "labels" / "b.png", np.full((6, 4), 99, np.uint8))
    loader = EpochLoader(dataset(folders), batch_size=3, num_workers=1)
    with pytest.raises(InputError, match=r"b\.png has the label 99, but the 24 classes") as error:
        list(loader.epoch(0))
    one_line(error)
    loader.close()


def test_a_data_set_travels_to_another_process(scenes):
    samples = scene_dataset(scenes)
    assert equal(pickle.loads(pickle.dumps(samples))[0, 1], samples[0, 1])
    assert isinstance(samples.pairs, ImagePairs)
    assert samples.name(0).endswith("ADE_train_00000001.jpg")
