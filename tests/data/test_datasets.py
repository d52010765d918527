import io
import random

import numpy as np
import pytest
import torch
from PIL import Image

from beit.data import datasets
from beit.data import datasets as datasets_module
from beit.data.datasets import (
    UNREADABLE,
    ImageDataset,
    UnreadableImageError,
    index_images,
    random_stream,
    read_image,
    read_pixels,
    sample_randomness,
)
from beit.data.transforms import MaskedImageModelingTransform
from beit.errors import InputError
from beit.masking import BlockwiseMaskGenerator


def noisy(image, rng):
    """A transform that uses all four sources of randomness."""
    draws = [rng.random(), random.random(), np.random.random(), torch.rand(()).item()]  # noqa: NPY002
    return {"draws": torch.tensor(draws, dtype=torch.float64), "red": torch.tensor(np.asarray(image)[0, 0, 0])}


def write_images(folder, count):
    """Image ``i`` has the red value ``10 * i``."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (6, 4), (10 * i, 0, 0)).save(folder / f"{i:02d}.png")


@pytest.fixture
def dataset(tmp_path):
    write_images(tmp_path / "images", 12)
    return ImageDataset(index_images(tmp_path / "images", tmp_path / "cache"), noisy, seed=3)


def test_a_sample_does_not_depend_on_what_came_before(dataset):
    first = dataset[2, 5]["draws"]
    torch.rand(7), np.random.random(3), random.random()  # noqa: NPY002
    dataset[0, 1]
    assert torch.equal(dataset[2, 5]["draws"], first)


def test_samples_differ_between_epochs_images_and_seeds(dataset):
    samples = [dataset[epoch, i]["draws"] for epoch in range(4) for i in range(12)]
    samples += [ImageDataset(dataset.index, noisy, seed=4)[0, i]["draws"] for i in range(12)]
    numbers = torch.cat(samples)
    assert len(set(numbers.tolist())) == len(numbers)


def test_global_generators_are_restored(dataset):
    def state():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002

    before = state()
    dataset[0, 0]
    assert state() == before
    with pytest.raises(KeyError), sample_randomness(0, 0, 0):
        raise KeyError
    assert state() == before


def test_a_batch_has_the_samples_that_one_asks_for_singly_and_restores_the_generators(dataset):
    # Fails when the generators are restored between the samples of a batch only, or seeded only once for it.
    def state():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002

    before = state()
    keys = [(1, 4), (0, 7), (1, 4), (2, 0)]
    together = dataset.__getitems__(keys)
    assert state() == before
    for key, sample in zip(keys, together, strict=True):
        assert torch.equal(sample["draws"], dataset[key]["draws"])
    with pytest.raises(IndexError):
        dataset.__getitems__([(0, 1), (0, 99)])
    assert state() == before
    dataset[0, 0]
    assert state() == before


def test_a_samples_draws_stay_what_they_are():
    # Runs that go on depend on them. By NumPy's seed sequences, as the first version drew: the sample's own generator
    # is that of the sequence's first child.
    sequence = np.random.SeedSequence((7, 2, 5), spawn_key=(0,))
    words = sequence.generate_state(3).tolist()
    own = np.random.default_rng(sequence.spawn(1)[0])
    with sample_randomness(7, 2, 5) as rng:
        drawn = [rng.random(), random.random(), np.random.random(), torch.rand(()).item()]  # noqa: NPY002
    expected = [
        own.random(),
        random.Random(words[0]).random(),
        np.random.RandomState(words[1]).random(),
        torch.rand((), generator=torch.Generator().manual_seed(words[2])).item(),
    ]
    assert drawn == expected


def test_the_gpu_generators_are_not_touched(dataset, monkeypatch):
    # torch.manual_seed in a worker process would start CUDA there; here it would change the model's dropout.
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeded the GPUs"))
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: pytest.fail("seeded a GPU"))
    dataset[0, 0]


def test_streams_of_different_purposes_and_places_differ():
    # (seed, epoch) and (seed, epoch, 0) give one seed sequence when nothing tells them apart.
    places = [(1, ()), (1, (0,)), (1, (0, 0)), (1, (1,)), (0, (1,)), (-1, (1,))]
    draws = {
        random_stream(seed, *place, purpose=p).random() for seed, place in places for p in ("order", "replacement")
    }
    assert len(draws) == 2 * 4  # trailing zeros within one purpose are one place
    assert random_stream(1, 0, purpose="order").random() != random_stream(1, 0, purpose="sample").random()


# Unreadable images


def test_an_unreadable_image_is_replaced_deterministically(dataset, tmp_path):
    (tmp_path / "images" / "05.png").write_bytes(b"not an image")
    sample = dataset[0, 5]
    assert [index for index, _ in sample[UNREADABLE]] == [5]
    assert sample["red"].item() != 50
    assert torch.equal(dataset[0, 5]["red"], sample["red"])
    assert len({dataset[epoch, 5]["red"].item() for epoch in range(10)}) > 2  # not one image over and over
    assert UNREADABLE not in dataset[0, 4]


def test_a_replacement_can_be_unreadable_too(dataset, tmp_path):
    for i in range(1, 12):
        (tmp_path / "images" / f"{i:02d}.png").unlink()
    sample = next(sample for sample in (dataset[epoch, 5] for epoch in range(20)) if len(sample[UNREADABLE]) > 2)
    assert sample["red"].item() == 0
    assert {reason for _, reason in sample[UNREADABLE]} == {"no such file or directory"}


def test_nothing_readable_is_an_error_that_names_a_file(dataset, tmp_path):
    for path in (tmp_path / "images").iterdir():
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"in a row cannot be read.*05\.png"):
        dataset[0, 5]


def jpeg(path, size=(64, 48), **options):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path, **options)
    return path


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda whole: whole[: len(whole) // 2], "truncated"),
        (lambda whole: b"", "empty file"),
        (lambda whole: b"<html>not found</html>", "not an image"),
    ],
)
def test_damaged_files_say_how(tmp_path, content, reason):
    path = jpeg(tmp_path / "x.jpg")
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(UnreadableImageError, match=reason):
        read_image(path)


def test_folders_and_missing_files_say_so(tmp_path):
    with pytest.raises(UnreadableImageError, match="is a directory"):
        read_image(tmp_path)
    with pytest.raises(UnreadableImageError, match="no such file"):
        read_image(tmp_path / "none.jpg")


@pytest.mark.filterwarnings("ignore")  # Pillow warns of much of the damage
@pytest.mark.parametrize("seed", range(8))
def test_any_damage_is_unreadable_or_an_image(tmp_path, seed):
    # Decoders raise SyntaxError, struct.error, zlib.error, … on damaged files; none of them may end the run.
    rng = np.random.default_rng(seed)
    for suffix in ("png", "jpg", "tif", "bmp", "webp", "ppm"):
        path = jpeg(tmp_path / f"x.{suffix}")
        content = bytearray(path.read_bytes())
        for position in rng.integers(0, min(len(content), 200), 12):
            content[position] = rng.integers(256)
        path.write_bytes(bytes(content))
        reason = "none"
        try:
            assert read_image(path).mode == "RGB"
        except UnreadableImageError as error:
            reason = str(error)
        assert reason
        assert "\n" not in reason


def test_a_decompression_bomb_is_unreadable(tmp_path, monkeypatch):
    path = jpeg(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableImageError, match="over 0 million pixels: save a smaller copy"):
        read_image(path)


# Decoding at a reduced scale


class Halved:
    """A transform that shows half of every image, from a corner that it draws."""

    takes_pixels = True

    def __init__(self):
        self.asked, self.drawn, self.sizes = [], [], []

    def reduction(self, full_size, rng):
        self.asked.append((full_size, rng.random()))
        return 2

    def __call__(self, pixels, rng, full_size=None):
        self.drawn.append(rng.random())
        self.sizes.append((tuple(pixels.shape), full_size))
        return {"red": pixels[0].double().mean()}


def smooth(path, **options):
    grey = np.outer(np.linspace(20, 200, 90), np.linspace(0.3, 1, 121)).astype(np.uint8)
    Image.fromarray(np.stack([grey] * 3, axis=-1)).save(path, **options)
    return path


def test_jpeg_files_are_decoded_at_the_scale_that_is_enough(tmp_path):
    for name in ("0.jpg", "1.png"):
        smooth(tmp_path / name)
    lying = Image.Exif()
    lying[0x0112] = 6
    smooth(tmp_path / "2.jpg", exif=lying)
    transform = Halved()
    dataset = ImageDataset(index_images(tmp_path, tmp_path / "cache"), transform, seed=3, fast_decode=True)
    whole = ImageDataset(dataset.index, Halved(), seed=3)
    for i in range(3):
        assert abs(dataset[0, i]["red"] - whole[0, i]["red"]) < 1
    # The size in the file goes along, as an upright image has it; other formats are decoded whole.
    assert transform.sizes == [((3, 45, 61), (121, 90)), ((3, 90, 121), None), ((3, 61, 45), (90, 121))]
    assert [size for size, _ in transform.asked] == [(121, 90), (90, 121)]
    # What the region will be is asked of a generator in the state of the transform's, and takes nothing from it.
    assert [draw for _, draw in transform.asked] == [transform.drawn[0], transform.drawn[2]]
    assert transform.drawn == whole.transform.drawn


def test_fast_decoding_changes_pixels_a_little_and_nothing_else(tmp_path):
    smooth(tmp_path / "0.jpg", quality=95)
    masks = BlockwiseMaskGenerator(4, 6, 2)
    transform = MaskedImageModelingTransform(8, 8, color_jitter=0, mask_generator=masks)
    index = index_images(tmp_path, tmp_path / "cache")
    plain, fast = (ImageDataset(index, transform, fast_decode=fast) for fast in (False, True))
    for epoch in range(10):
        a, b = plain[epoch, 0], fast[epoch, 0]
        assert torch.equal(a["mask"], b["mask"])
        assert (a["image"].float() - b["image"].float()).abs().mean() < 12  # half a pixel of a steep ramp
    assert any(not torch.equal(plain[e, 0]["image"], fast[e, 0]["image"]) for e in range(10))


def test_a_transform_that_cannot_say_what_it_shows_is_not_decoded_for(dataset):
    with pytest.raises(ValueError, match="needs a transform with a method reduction"):
        ImageDataset(dataset.index, noisy, fast_decode=True)


# Decoding straight into tensors


def jpeg_bytes(mode="RGB", size=(37, 29), **options):
    # Smooth and rough parts, so that decoders that sample colours up or round otherwise differ.
    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    pixels[: size[1] // 2] = np.linspace(0, 255, size[0]).astype(np.uint8)[:, None]
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


LYING = Image.Exif()
LYING[0x0112] = 6


@pytest.mark.parametrize(
    ("options", "by_torchvision"),
    [
        ({}, True),
        ({"subsampling": 0, "quality": 100}, True),
        ({"subsampling": 1, "progressive": True}, True),
        ({"size": (1, 1)}, True),
        ({"size": (16, 1), "keep_rgb": True}, True),
        ({"icc_profile": b"x" * 70_000, "restart_marker_rows": 1}, True),
        ({"mode": "L"}, False),
        ({"mode": "CMYK"}, False),
        ({"exif": LYING}, False),
    ],
)
def test_jpeg_files_have_the_same_pixels_whoever_decodes_them(options, by_torchvision, monkeypatch):
    content = jpeg_bytes(**options)
    decoded = []
    plain = datasets._plain_jpeg
    monkeypatch.setattr(datasets, "_plain_jpeg", lambda image: decoded.append(plain(image)) or decoded[-1])
    pixels, full_size = read_pixels(io.BytesIO(content))
    assert full_size is None
    assert pixels.dtype == torch.uint8
    assert np.array_equal(pixels.permute(1, 2, 0), np.asarray(read_image(io.BytesIO(content))))
    assert (decoded[0] is not None) == by_torchvision


def test_without_torchvisions_decoder_pillow_decodes(monkeypatch):
    content = jpeg_bytes()
    expected, _ = read_pixels(io.BytesIO(content))
    monkeypatch.setattr(datasets, "_plain_jpeg", lambda image: None)
    assert torch.equal(read_pixels(io.BytesIO(content))[0], expected)
    monkeypatch.undo()
    monkeypatch.setattr(torch.ops, "image", object())  # as where its library could not be loaded
    assert torch.equal(read_pixels(io.BytesIO(content))[0], expected)


@pytest.mark.filterwarnings("ignore")
def test_damaged_jpeg_files_mean_the_same_whoever_decodes_them():
    # Fails when what torchvision refuses is not left to Pillow, or torchvision takes what Pillow refuses.
    whole = [jpeg_bytes(), jpeg_bytes(progressive=True), jpeg_bytes(restart_marker_rows=1)]
    rng = np.random.default_rng(0)
    outcomes = set()
    for number in range(60):
        content = bytearray(whole[number % 3])
        if number % 2:
            content = content[: rng.integers(2, len(content))]
        for position in rng.integers(0, len(content), 1 + number % 3):
            content[position] = rng.integers(256)
        results = []
        for read in (lambda file: np.asarray(read_image(file)), lambda file: read_pixels(file)[0].permute(1, 2, 0)):
            try:
                results.append(np.asarray(read(io.BytesIO(content))).tobytes())
            except UnreadableImageError as error:
                results.append(str(error))
        assert results[0] == results[1]
        outcomes.add(type(results[0]))
    assert outcomes == {str, bytes}


# Decoding to RGB


def read_back(path, image, **options):
    image.save(path, **options)
    return np.asarray(read_image(path))


def test_sixteen_bit_greys_are_scaled(tmp_path):
    # Pillow's own conversion from some of these modes cuts everything above 255 off to white.
    greys = np.linspace(0, 65535, 200, dtype=np.uint16).reshape(10, 20)
    for name in ("x.png", "x.tif"):
        pixels = read_back(tmp_path / name, Image.fromarray(greys))
        assert np.abs(pixels[..., 0] - greys / 257.0).max() <= 1, name
        assert (pixels[..., 0] == pixels[..., 2]).all()
    dark = (greys // 300).astype(np.uint16)  # all below 256, and yet of 16 bits
    assert read_back(tmp_path / "dark.png", Image.fromarray(dark)).max() <= 1
    (tmp_path / "x.pgm").write_bytes(b"P5 20 10 65535\n" + greys.astype(">u2").tobytes())
    assert np.abs(np.asarray(read_image(tmp_path / "x.pgm"))[..., 0] - greys / 257.0).max() <= 1


def test_floating_point_greys_are_scaled(tmp_path):
    ramp = np.linspace(0, 1, 50, dtype=np.float32).reshape(5, 10)
    for factor in (1, 255, 65535):
        pixels = read_back(tmp_path / "x.tif", Image.fromarray(ramp * factor))
        assert np.abs(pixels[..., 0] - ramp * 255).max() <= 1, factor
    ramp[0, 0] = np.nan
    assert read_back(tmp_path / "x.tif", Image.fromarray(ramp))[0, 0, 0] == 0


def test_transparent_pixels_are_white(tmp_path):
    # Their stored colour is arbitrary, mostly black: dropping the transparency alone would show it.
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    assert read_back(tmp_path / "x.png", image).tolist() == [[[255, 0, 0], [255, 255, 255]]]
    grey = Image.new("LA", (1, 1), (7, 0))
    assert read_back(tmp_path / "grey.png", grey).tolist() == [[[255, 255, 255]]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 0, 200, 0])
    palette.putpixel((1, 0), 1)
    assert read_back(tmp_path / "p.png", palette, transparency=0).tolist() == [[[255, 255, 255], [0, 200, 0]]]


@pytest.mark.parametrize(
    ("mode", "colour", "name", "expected"),
    [
        ("L", 77, "x.png", (77, 77, 77)),
        ("1", 1, "x.png", (255, 255, 255)),
        ("P", 0, "x.png", (0, 0, 0)),
        ("CMYK", (0, 255, 255, 0), "x.jpg", (254, 0, 0)),
        ("CMYK", (0, 255, 255, 0), "x.tif", (255, 0, 0)),
        ("YCbCr", (76, 85, 255), "x.jpg", (254, 0, 0)),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, mode, colour, name, expected):
    pixels = read_back(tmp_path / name, Image.new(mode, (16, 16), colour))
    assert pixels.shape == (16, 16, 3)
    assert np.abs(pixels[8, 8].astype(int) - expected).max() <= 3


def test_a_photograph_on_its_side_is_turned_upright(tmp_path):
    image = Image.new("RGB", (32, 16), "white")
    image.paste("black", (0, 0, 16, 16))  # the left half as stored
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned a quarter clockwise: the left half is the upper one then
    pixels = read_back(tmp_path / "x.jpg", image, exif=exif)
    assert pixels.shape == (32, 16, 3)
    assert pixels[:14].mean() < 10
    assert pixels[18:].mean() > 245


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_orientation_is_ignored(tmp_path):
    assert read_back(tmp_path / "x.jpg", Image.new("RGB", (32, 16)), exif=b"Exif\0\0MM\0*garbage").shape == (16, 32, 3)


@pytest.fixture
def grey_warnings(caplog):
    datasets_module._warned.clear()
    return lambda: [record.getMessage() for record in caplog.records if record.name == "beit.data.datasets"]


@pytest.mark.parametrize(("kind", "full"), [(np.float32, 1), (np.float32, 255), (np.float32, 65535), (np.int32, 255)])
@pytest.mark.parametrize("overshoot", [1.0004, 1.09])
def test_greys_a_little_above_their_range_do_not_turn_the_image_black(tmp_path, kind, full, overshoot, grey_warnings):
    # One pixel at 1.0004, as after bicubic resampling, made a mean of 130 one of 0.5.
    values = np.linspace(0, full, 48 * 72).reshape(48, 72)
    values[0, 0] = np.ceil(full * overshoot) if kind is np.int32 else full * overshoot
    pixels = read_back(tmp_path / "x.tif", Image.fromarray(values.astype(kind)))
    assert abs(pixels.mean() - 127.5) < 1
    assert pixels[0, 0, 0] == 255
    assert not grey_warnings()


@pytest.mark.parametrize(
    "values",
    [
        np.linspace(0, 4095, 50).astype(np.uint16),  # 12 bits, as cameras and scanners store them
        np.linspace(0, 1000, 50).astype(np.int32),
        np.linspace(0, 300_000, 50).astype(np.float32),
        np.linspace(-1, 1, 50).astype(np.float32),
    ],
)
def test_greys_of_another_range_are_warned_of_once(tmp_path, values, grey_warnings):
    for name in ("x.tif", "x.tif", "y.tif"):
        read_back(tmp_path / name, Image.fromarray(values.reshape(5, 10)))
    (warning,) = grey_warnings()
    assert warning.startswith(f"{tmp_path / 'x.tif'} has more than 8 bits")


def test_an_image_without_a_finite_value_is_unreadable(tmp_path):
    Image.fromarray(np.full((5, 10), np.nan, np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(UnreadableImageError, match="none of its values is finite"):
        read_image(tmp_path / "x.tif")


def test_pages_that_are_not_read_are_warned_of_once(tmp_path, grey_warnings):
    pages = [Image.new("L", (10, 5), 100 + page) for page in range(3)]
    pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:])
    for _ in range(2):
        assert np.asarray(read_image(tmp_path / "x.tif")).max() == 100
    (warning,) = grey_warnings()
    assert warning.startswith(f"{tmp_path / 'x.tif'} has 3 pages")
