"""Images of other than three channels: what is read, how it is scaled and transformed, against arrays of NumPy."""

import io

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from beit.data.classification import ClassificationEvalTransform, ClassificationTransform
from beit.data.datasets import ImageDataset, UnreadableImageError, index_images, read_channels
from beit.data.transforms import CenterCropTransform, MaskedImageModelingTransform, normalize
from beit.errors import InputError

RNG = np.random.default_rng(0)
DEEP = RNG.integers(0, 65536, (40, 50), dtype=np.uint16)
FIVE = RNG.integers(0, 65536, (5, 40, 50), dtype=np.uint16)


def saved_by_numpy(values):
    np.save(file := io.BytesIO(), values)
    file.seek(0)
    return file


def saved_by_tifffile(values, **options):
    tifffile.imwrite(file := io.BytesIO(), values, **options)
    file.seek(0)
    return file


def saved_by_pillow(values, kind, **options):
    Image.fromarray(values).save(file := io.BytesIO(), kind, **options)
    file.seek(0)
    return file


EIGHT = (DEEP >> 8).astype(np.uint8)
ONE_CHANNEL = {
    "PNG of 8 bits": (saved_by_pillow(EIGHT, "PNG"), EIGHT / 255),
    "PNG of 16 bits": (saved_by_pillow(DEEP, "PNG"), DEEP / 65535),
    "TIFF of 16 bits, compressed": (saved_by_pillow(DEEP, "TIFF", compression="tiff_lzw"), DEEP / 65535),
    "TIFF of floats": (saved_by_tifffile(np.float32(DEEP) / 1000), np.float32(DEEP) / 1000),
    "npy of floats": (saved_by_numpy(DEEP / 7.0), DEEP / 7),
    "npy of 32 bits": (saved_by_numpy(DEEP.astype(np.int32)), DEEP / (2**31 - 1)),
    "npy with a channel axis": (saved_by_numpy(EIGHT[..., None]), EIGHT / 255),
    "npy of bits": (saved_by_numpy(EIGHT > 9), (EIGHT > 9) * 1.0),
    "colours as greys": (saved_by_pillow(np.stack([EIGHT] * 3, -1), "PNG"), EIGHT / 255),
}


@pytest.mark.parametrize("kind", ONE_CHANNEL)
def test_one_channel_keeps_its_bits(kind):
    file, values = ONE_CHANNEL[kind]
    pixels = read_channels(file, 1)
    assert (pixels.shape, pixels.dtype) == ((1, 40, 50), torch.float32)
    np.testing.assert_allclose(pixels[0], values, rtol=1e-6)


@pytest.mark.parametrize(
    ("file", "values"),
    [
        (saved_by_tifffile(FIVE, photometric="minisblack", planarconfig="separate"), FIVE / 65535),
        (saved_by_tifffile(np.moveaxis(FIVE, 0, -1), photometric="minisblack"), FIVE / 65535),
        (saved_by_numpy(FIVE), FIVE / 65535),
        (saved_by_numpy(np.moveaxis(FIVE, 0, -1)), FIVE / 65535),
        (saved_by_pillow(np.moveaxis(FIVE[:4] >> 8, 0, -1).astype(np.uint8), "PNG"), (FIVE[:4] >> 8) / 255),
    ],
    ids=["TIFF in planes", "TIFF", "npy in planes", "npy", "RGBA"],
)
def test_several_channels_come_in_their_order(file, values):
    np.testing.assert_allclose(read_channels(file, len(values)), values, rtol=1e-6)


def test_what_is_missing_or_malicious_is_refused(monkeypatch):
    nan = np.array([[1.0, np.nan], [np.inf, -2]])
    assert read_channels(saved_by_numpy(nan), 1)[0].tolist() == [[1, 0], [0, -2]]
    np.save(objects := io.BytesIO(), np.array([{"a": 1}], dtype=object), allow_pickle=True)
    objects.seek(0)
    for file, reason in (
        (objects, "allow_pickle"),
        (saved_by_numpy(FIVE), "uint16 of shape .5, 40, 50., not of 4 channels"),
        (saved_by_numpy(np.array([["a"]])), "not of 4 channels"),
        (io.BytesIO(b"nothing of the kind"), "not an image"),
    ):
        with pytest.raises(UnreadableImageError, match=reason):
            read_channels(file, 4)
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    with pytest.raises(InputError, match="pip install tifffile"):
        read_channels(saved_by_tifffile(FIVE), 5)


def rng():
    return np.random.default_rng(7)


def test_views_are_those_of_8_bit_colours_but_for_their_rounding():
    """A grey picture as one channel, and as three equal ones on the other path, by the same draws."""
    picture = Image.fromarray(EIGHT[:7, :9]).resize((90, 70), Image.Resampling.BICUBIC)
    one = read_channels(picture, 1)
    for build in (
        lambda n: MaskedImageModelingTransform(32, 16, color_jitter=0, in_chans=n),
        lambda n: CenterCropTransform(24, interpolation="bilinear", in_chans=n),
        lambda n: ClassificationTransform(
            48, mean=[0.5] * n, std=[0.5] * n, auto_augment="", color_jitter=0, erasing=0
        ),
        lambda n: ClassificationEvalTransform(48, in_chans=n),
        lambda n: ClassificationEvalTransform((48, 40), crop_mode="squash", interpolation="lanczos", in_chans=n),
    ):
        ours, theirs = build(1)(one, rng()), build(3)(picture.convert("RGB"), rng())
        for name, view in theirs.items():
            assert ours[name].shape == (1, *view.shape[1:])
            assert torch.allclose(ours[name] * 255, view[:1].float(), atol=2.0), name  # whole levels on that path


def test_erased_parts_have_normal_noise_whatever_the_channels():
    options = {"auto_augment": "", "color_jitter": 0, "erasing": 1.0}
    transform = ClassificationTransform(64, mean=[0.2] * 4, std=[0.1] * 4, **options)
    torch.manual_seed(0)
    image = transform(torch.full((4, 80, 80), 0.2), rng())["image"]
    erased = normalize(image, [0.2] * 4, [0.1] * 4)
    noise = erased[erased.abs() > 1e-5]
    assert len(noise) > 100
    assert noise.std().item() == pytest.approx(1, abs=0.1)


def test_colours_are_not_jittered_and_a_word_says_so(caplog):
    image = read_channels(Image.fromarray(EIGHT), 1)
    jittered = MaskedImageModelingTransform(32, None, color_jitter=0.4, in_chans=1)(image, rng())
    assert torch.equal(
        jittered["image"], MaskedImageModelingTransform(32, None, color_jitter=0, in_chans=1)(image, rng())["image"]
    )
    assert "no colour jitter" in caplog.text
    ClassificationTransform(32, mean=[0.5], std=[0.5])
    assert "no augmentation policy" in caplog.text


def test_a_folder_of_arrays_is_listed_and_arrays_beside_images_are_not(tmp_path, caplog):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "x.npy", FIVE)
    index = index_images(tmp_path)
    assert (index.class_names, len(index)) == (("a", "b"), 2)
    sample = ImageDataset(index, CenterCropTransform(16, in_chans=5))[0, 1]["image"]
    assert (sample.shape, sample.dtype) == ((5, 16, 16), torch.float32)
    with pytest.raises(InputError, match="--in_chans"):
        ImageDataset(index, CenterCropTransform(16))
    Image.fromarray(EIGHT).save(tmp_path / "a" / "y.png")
    assert len(index_images(tmp_path)) == 1
    assert ", 2 .npy" in caplog.text


def test_integers_without_a_known_scale_are_refused(tmp_path):
    # Breaks if 0 to 255 in NumPy's default integers count as shares of 2 ** 63: an image of zeros.
    np.save(tmp_path / "a.npy", np.arange(16).reshape(4, 4))
    with pytest.raises(UnreadableImageError, match=r"int64.*save it with 8, 16 or 32 bits"):
        read_channels(tmp_path / "a.npy", 1)
