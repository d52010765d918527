"""Images with classes: found, checked, augmented; CIFAR's archives; every sample the same whoever asks."""

import hashlib
import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets, transforms
from torchvision.transforms import v2

from beit.data.classification import (
    CIFAR,
    ArrayImages,
    ClassificationEvalTransform,
    ClassificationTransform,
    build_policy,
    check_classes,
    find_images,
    labelled_dataset,
)
from beit.data.loaders import EpochLoader
from beit.data.preprocessing import default_crop_pct
from beit.data.transforms import normalize
from beit.errors import InputError

HALF = (0.5, 0.5, 0.5)
RNG = np.random.default_rng


def photo(width=60, height=48, seed=0):
    pixels = RNG(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def write_classes(folder, classes, per_class=3, extension="jpg"):
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for image in range(per_class):
            photo(seed=10 * number + image).save(folder / name / f"{image}.{extension}")
    return folder


def plain(size=32, **options):
    settings = {"mean": HALF, "std": HALF, "auto_augment": "", "color_jitter": 0.0, "erasing": 0.0}
    return ClassificationTransform(size, **{**settings, **options})


# The images and their classes


def test_the_default_policy_bears_its_full_magnitude():
    # Pillow 13 refuses to keep no bits; timm asks for that about once in 600 images of the default policy.
    image = Image.fromarray(np.full((8, 8, 3), 200, np.uint8))
    policy = build_policy("rand-m9-mstd0.5-inc1", (8, 8), (0.5, 0.5, 0.5), "bicubic")
    (operation,) = [op for op in policy.ops if op.name == "PosterizeIncreasing"]
    operation.prob, operation.magnitude_std, operation.magnitude = 1.0, 0, 10
    assert np.asarray(operation(image)).max() == 0
    operation.magnitude = 5  # 2 of 8 bits stay
    assert np.asarray(operation(image)).max() == 192


def test_imagenet_s_layout_and_image_folders(tmp_path):
    train = write_classes(tmp_path / "train", "abc")
    val = write_classes(tmp_path / "val", "abc", per_class=2)
    found = find_images("IMNET", str(tmp_path), train=True), find_images("IMNET", str(tmp_path), train=False)
    assert [len(split) for split in found] == [9, 6]
    assert check_classes(found) == ("a", "b", "c")
    folders = [find_images("image_folder", str(train), str(val), train=train_) for train_ in (True, False)]
    assert [len(split) for split in folders] == [9, 6]
    reference = datasets.ImageFolder(str(train))
    assert [folders[0].class_id(i) for i in range(9)] == reference.targets
    assert list(folders[0].class_names) == reference.classes


def test_a_sample_has_the_class_of_the_image_it_shows(tmp_path):
    # Breaks if an unreadable image's replacement keeps the label of the image that it replaces.
    folder = write_classes(tmp_path / "train", "ab")
    for image in folder.glob("a/*"):
        image.write_bytes(b"no image")
    source = find_images("image_folder", str(folder), train=True)
    dataset = labelled_dataset(source, plain(), 0)
    samples = [dataset[(epoch, index)] for epoch in range(2) for index in range(6)]
    assert {int(sample["label"]) for sample in samples} == {1}
    assert sum("unreadable" in sample for sample in samples) == 6


def test_data_of_one_class_are_used_with_a_warning(tmp_path, caplog):
    # Breaks when someone who named a folder too deep trains for hours on 100 % accuracy without a word.
    assert check_classes([find_images("image_folder", str(write_classes(tmp_path, "a")), train=True)]) == ("a",)
    assert "only one class, a:" in caplog.text


def test_wrong_numbers_of_classes_and_other_classes_are_named(tmp_path):
    train = find_images("image_folder", str(write_classes(tmp_path / "train", "abcd")), train=True)
    val = find_images("image_folder", "", str(write_classes(tmp_path / "val", "abde")), train=False)
    assert check_classes([train], 4) == ("a", "b", "c", "d")
    with pytest.raises(
        InputError, match=r"--nb_classes 10, but .*train has 4 classes \(a, b, c and 1 more\): give --nb_classes 4"
    ):
        check_classes([train], 10)
    with pytest.raises(
        InputError, match=r"1 in \S*train but not in \S*val \(c\), 1 in \S*val but not in \S*train \(e\)"
    ):
        check_classes([train, val])


def test_missing_and_classless_folders(tmp_path):
    photo().save(tmp_path / "loose.png")
    with pytest.raises(InputError, match="without a class"):
        find_images("image_folder", str(tmp_path), train=True)
    with pytest.raises(InputError, match="--eval_data_path is missing"):
        find_images("image_folder", str(tmp_path), train=False)
    with pytest.raises(InputError, match="val"):
        find_images("IMNET", str(tmp_path), train=False)


def write_cifar(root, archive, monkeypatch, classes):
    """A tiny archive in CIFAR's own format, whose checksums are the expected ones."""
    folder = root / archive.base_folder
    folder.mkdir()
    label_key = "labels" if archive is datasets.CIFAR10 else "fine_labels"
    rng = RNG(0)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    for attribute in ("train_list", "test_list"):
        files = []
        for name, _ in getattr(archive, attribute):
            pixels = rng.integers(0, 256, (4, 3072), dtype=np.uint8)
            files.append([name, write(name, {"data": pixels, label_key: [0, 1, 2, 1]})])
        monkeypatch.setattr(archive, attribute, files)
    meta = dict(archive.meta)
    meta["md5"] = write(meta["filename"], {meta["key"]: list(classes)})
    monkeypatch.setattr(archive, "meta", meta)


@pytest.mark.parametrize("data_set", CIFAR)
def test_cifar_archives(tmp_path, monkeypatch, data_set):
    write_cifar(tmp_path, CIFAR[data_set], monkeypatch, ["cat", "dog", "bird"])
    train, val = (find_images(data_set, str(tmp_path), train=train) for train in (True, False))
    assert check_classes([train, val], 3) == ("cat", "dog", "bird")
    assert len(train) == (4 if data_set == "CIFAR" else 20)
    reference = CIFAR[data_set](str(tmp_path), train=True)
    sample = labelled_dataset(train, ClassificationEvalTransform(32), 0)[(0, 1)]
    image, label = reference[1]
    assert torch.equal(sample["image"], transforms.functional.pil_to_tensor(image))
    assert sample["label"] == label


def test_a_missing_or_damaged_cifar_archive(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"cifar-100-python is missing; --download_data downloads it"):
        find_images("CIFAR", str(tmp_path), train=True)
    write_cifar(tmp_path, datasets.CIFAR100, monkeypatch, "abc")
    (tmp_path / "cifar-100-python" / "train").write_bytes(b"cut short")
    with pytest.raises(InputError, match="damaged"):
        find_images("CIFAR", str(tmp_path), train=True)


def array_source(count=8, size=32):
    images = RNG(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return ArrayImages(images, np.arange(count) % 2, ("even", "odd"), "nowhere")


def test_the_fingerprint_of_images_in_memory_is_of_pixels_and_classes():
    images, other_pixels, other_classes = array_source(), array_source(), array_source()
    assert images.fingerprint() == array_source().fingerprint()
    other_pixels.images[3, 1, 1] ^= 1
    other_classes.class_ids[:2] = 1, 0
    rolled = ArrayImages(images.images.transpose(0, 2, 1, 3), images.class_ids, images.class_names, "elsewhere")
    assert len({source.fingerprint() for source in (images, other_pixels, other_classes, rolled)}) == 4


@pytest.mark.parametrize("source", ["files", "arrays"])
def test_a_sample_follows_from_seed_epoch_and_index_alone(tmp_path, source):
    # Breaks if a transform draws from a generator that is not seeded for the sample (RandAugment, erasing, jitter).
    images = (
        array_source()
        if source == "arrays"
        else find_images("image_folder", str(write_classes(tmp_path / "x", "ab")), train=True)
    )
    transform = ClassificationTransform(32, mean=HALF, std=HALF, erasing=0.9, erasing_count=2)

    def samples(order, seed=0):
        dataset = labelled_dataset(images, transform, seed)
        return {key: dataset[key]["image"] for key in order}

    keys = [(epoch, index) for epoch in range(2) for index in range(4)]
    once = samples(keys)
    random.seed(99), torch.manual_seed(99), np.random.seed(99)  # noqa: NPY002
    again = samples(reversed(keys))
    assert all(torch.equal(once[key], again[key]) for key in keys)
    other = samples(keys, seed=1)
    assert not any(torch.equal(once[key], other[key]) for key in keys)
    assert not torch.equal(once[0, 0], once[1, 0])


def test_array_images_come_through_the_loader_on_workers():
    loaders = [
        EpochLoader(labelled_dataset(array_source(), plain(16), 0), 4, num_workers=workers) for workers in (0, 1)
    ]
    for ours, theirs in zip(*(loader.epoch(0) for loader in loaders), strict=True):
        assert torch.equal(ours["image"], theirs["image"])
        assert ours["label"].tolist() == theirs["label"].tolist()
        assert ours["label"].dtype == torch.int64
    loaders[1].close()


# The transforms


@pytest.mark.parametrize(("size", "crop_pct"), [(224, None), (384, None), (64, 0.5), (96, 1.0)])
@pytest.mark.parametrize("shape", [(500, 375), (375, 500), (301, 301)])
def test_evaluation_equals_torchvision_s_resize_and_centre_crop(size, crop_pct, shape):
    # Breaks with another interpolation, another rounding of the size, or a crop that is not centred.
    image = photo(*shape)
    pct = crop_pct or (1.0 if size == 384 else 0.875)
    bicubic = transforms.InterpolationMode.BICUBIC
    reference = transforms.Compose(
        [transforms.Resize(int(size / pct), bicubic), transforms.CenterCrop(size), transforms.PILToTensor()]
    )
    assert torch.equal(ClassificationEvalTransform(size, crop_pct=crop_pct)(image)["image"], reference(image))


def test_evaluation_at_sizes_that_are_not_square():
    transform = ClassificationEvalTransform((64, 128))
    assert transform(photo(300, 300))["image"].shape == (3, 64, 128)
    assert transform.resized((300, 300)) == [146, 146]  # the width is scarce
    assert transform.resized((900, 100)) == [73, 657]  # the height is
    assert transform(photo(20, 900))["image"].shape == (3, 64, 128)
    assert default_crop_pct((384, 512)) == 1.0
    assert default_crop_pct((224, 512)) == 0.875


@pytest.mark.parametrize(
    ("size", "input_size"), [((8000, 1), 224), ((1, 3000), 32), ((5000, 2), (32, 96)), ((3, 900), (96, 32))]
)
def test_very_long_images_take_no_memory(size, input_size, monkeypatch):
    # Resized whole, 8000 x 1 pixels became 2,048,000 x 256, 2 GB, of which 224 x 224 were shown.
    areas = []
    resize = v2.functional.resize
    monkeypatch.setattr(
        v2.functional, "resize", lambda image, to, *rest: areas.append(to[0] * to[1]) or resize(image, to, *rest)
    )
    image = Image.fromarray(np.full((size[1], size[0], 3), 77, dtype=np.uint8))
    shown = ClassificationEvalTransform(input_size)(image)["image"]
    assert (shown == 77).all()
    assert max(areas) < 100 * shown[0].numel()


def test_the_middle_of_a_long_image_is_shown():
    # As without the cut: to within the half pixel that it may be off.
    image = Image.fromarray(np.linspace(0, 255, 3 * 900).reshape(3, 900).astype(np.uint8)).convert("RGB")
    shown = ClassificationEvalTransform(32)(image)["image"].float()
    assert abs(shown.mean() - 127.5) < 1


def test_small_images_of_the_right_size_are_shifted_not_zoomed():
    image = photo(32, 32)
    assert torch.equal(ClassificationEvalTransform(32)(image)["image"], transforms.functional.pil_to_tensor(image))
    pixels = np.asarray(Image.fromarray(np.full((32, 32, 3), 200, dtype=np.uint8)))
    for seed in range(20):
        sample = plain(32)(Image.fromarray(pixels), RNG(seed))["image"]
        rows, columns = (sample[0] == 200).any(1).sum(), (sample[0] == 200).any(0).sum()
        assert (sample == 0).sum() + (sample == 200).sum() == sample.numel()
        assert 28 <= rows <= 32
        assert 28 <= columns <= 32
    assert plain(32)(photo(60, 48), RNG(0))["image"].shape == (3, 32, 32)


def test_images_travel_as_bytes_unless_they_are_erased():
    image = photo()
    untouched = plain()(image, RNG(3))["image"]
    assert untouched.dtype == torch.uint8
    random.seed(0)
    erased = plain(erasing=1.0)(image, RNG(3))["image"]
    assert erased.dtype == torch.float32
    changed = (erased != normalize(untouched, HALF, HALF)).any(0)
    assert 0.01 < changed.float().mean() < 0.4
    assert erased[:, changed].std() == pytest.approx(1, abs=0.2)  # noise of the normalised image, not cut off at ±1
    random.seed(0)
    blank = plain(erasing=1.0, erasing_mode="const")(image, RNG(3))["image"]
    assert (blank[:, changed] == 0).all()


def test_the_policy_takes_the_place_of_colour_jitter():
    grey = Image.new("RGB", (40, 40), (90, 120, 150))
    torch.manual_seed(0)
    assert plain(color_jitter=0.4)(grey, RNG(0))["image"].unique().numel() == 3
    assert plain(auto_augment="rand-m0-n1", color_jitter=0.4).augment is not plain(color_jitter=0.4).augment
    for policy in ("rand-m9-mstd0.5-inc1", "original-mstd0.5", "augmix-m3-w3"):
        assert plain(auto_augment=policy)(photo(), RNG(0))["image"].shape == (3, 32, 32)
    assert plain(auto_augment="none").augment is None
    assert plain(interpolation="random", auto_augment="rand-m9")(photo(), RNG(0))["image"].shape == (3, 32, 32)


MISTAKES = {
    "policy": ({"auto_augment": "rnad-m9"}, "policy 'rnad-m9'"),
    "policy's section": ({"auto_augment": "rand-q9"}, "policy 'rand-q9'"),
    "mode": ({"erasing_mode": "pixels"}, "pixel, rand, const, not 'pixels'"),
    "interpolation": ({"interpolation": "cubic"}, "bicubic"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_settings_that_cannot_be_used(mistake):
    options, message = MISTAKES[mistake]
    with pytest.raises(InputError, match=message):
        plain(**options)


@pytest.mark.parametrize("crop_pct", [0.0, 1.2])
def test_a_crop_share_outside_its_range(crop_pct):
    with pytest.raises(InputError, match="--crop_pct"):
        ClassificationEvalTransform(32, crop_pct=crop_pct)
    with pytest.raises(InputError, match="random interpolation"):
        ClassificationEvalTransform(32, interpolation="random")


@pytest.mark.parametrize("mode", ["CMYK", "I;16", "P", "L", "RGBA", "1"])
def test_images_of_any_mode_become_three_channels(tmp_path, mode):
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    if mode == "I;16":
        Image.fromarray(RNG(0).integers(0, 65536, (40, 40), dtype=np.uint16)).save(folder / "0.png")
    else:
        photo().convert(mode).save(folder / ("0.jpg" if mode == "CMYK" else "0.png"))
    source = find_images("image_folder", str(tmp_path / "train"), train=True)
    assert labelled_dataset(source, ClassificationEvalTransform(32), 0)[(0, 0)]["image"].shape == (3, 32, 32)
