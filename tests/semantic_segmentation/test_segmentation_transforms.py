"""The training augmentation against its definition in plain NumPy; wrong arithmetic, odds or order fails here."""

import colorsys

import numpy as np
import pytest
import torch
from torchvision.tv_tensors import Image, Mask

from beit.data.datasets import sample_randomness
from beit.errors import InputError
from semantic_segmentation import transforms
from semantic_segmentation.transforms import (
    TrainTransform,
    change_levels,
    crop_box,
    fit_size,
    multiply_saturation,
    photometric_distortion,
    resize,
    scaled,
    turn_hue,
)


def pair(height, width, labels=7, seed=0):
    """A smooth image, and a label map of blocks; the red of the image is 30 times its label, wherever they go."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, labels, (-(-height // 16), -(-width // 16)), dtype=np.uint8)
    label = blocks.repeat(16, 0).repeat(16, 1)[:height, :width]
    image = np.stack([label * 30, rng.integers(0, 256, (height, width)), rng.integers(0, 256, (height, width))])
    return Image(torch.from_numpy(image.astype(np.uint8))), Mask(torch.from_numpy(label.copy()))


class Scripted:
    """A generator that answers what it is told, and checks that it is asked for the right thing."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def _next(self, question):
        expected, answer = self.answers.pop(0)
        assert question == expected
        return answer

    def random(self):
        return self._next("random")

    def uniform(self, low, high):
        return self._next(("uniform", low, high))

    def integers(self, low, high=None):
        return self._next(("integers", low) if high is None else ("integers", low, high))


YES, NO = ("random", 0.49), ("random", 0.5)


# Sizes


@pytest.mark.parametrize(
    ("size", "scale", "expected"),
    [
        ((512, 683), (2048, 512), (512, 683)),
        ((683, 512), (512, 2048), (683, 512)),  # the longer limit is for the longer side, however both are written
        ((300, 400), (2048, 512), (512, 683)),  # 400 * 512 / 300 = 682.67
        ((100, 1000), (2048, 512), (205, 2048)),  # the long side decides: 204.8
        ((333, 500), (1024, 256), (256, 384)),  # 384.38
        ((1, 1), (2048, 512), (512, 512)),
        ((1, 5000), (1024, 256), (1, 1024)),  # 0.2 of a pixel is still one
    ],
)
def test_an_image_becomes_as_large_as_fits(size, scale, expected):
    assert fit_size(size, scale) == expected


def test_with_a_least_short_side_the_long_side_is_free():
    assert fit_size((100, 1000), (2048, 512), short_at_least=512) == (512, 5120)
    assert fit_size((300, 400), (1024, 256), short_at_least=512) == (512, 683)  # the three smallest ratios coincide
    assert fit_size((300, 400), (1536, 384), short_at_least=512) == (512, 683)
    assert fit_size((300, 400), (2560, 640), short_at_least=512) == (640, 853)


def test_a_scale_is_cut_to_whole_pixels():
    assert scaled((2048, 512), 0.7) == (1433, 358)  # 1433.6, 358.4
    assert scaled((2048, 512), 1.9999) == (4095, 1023)


def naive_bilinear(image, height, width):
    """Half-pixel centres, four neighbours, edges repeated: also where the image becomes smaller."""

    def axis(new, old):
        place = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        low = np.floor(place).astype(int)
        return low, np.minimum(low + 1, old - 1), place - low

    top, bottom, down = axis(height, image.shape[1])
    left, right, across = axis(width, image.shape[2])
    image, down = image.astype(np.float64), down[:, None]
    rows = [image[:, y][:, :, left] * (1 - across) + image[:, y][:, :, right] * across for y in (top, bottom)]
    return rows[0] * (1 - down) + rows[1] * down


@pytest.mark.parametrize("size", [(17, 23), (130, 61), (37, 41), (1, 1)])
def test_an_image_is_interpolated_between_four_pixels_and_a_mask_is_not(size):
    image, label = pair(37, 41)
    found = resize(image, size).as_subclass(torch.Tensor).numpy()
    assert np.abs(found - naive_bilinear(image.numpy(), *size)).max() < 1.01  # rounded twice
    rows, columns = (np.arange(new) * old // new for new, old in zip(size, (37, 41), strict=True))
    np.testing.assert_array_equal(resize(label, size).numpy(), label.numpy()[rows][:, columns])


def test_a_test_image_has_the_size_of_its_ratio():
    assert fit_size((300, 400), (2048, 512)) == (512, 683)
    assert fit_size((300, 400), scaled((2048, 512), 1.75)) == (896, 1195)
    assert fit_size((300, 400), scaled((2048, 512), 0.5), short_at_least=512) == (512, 683)


# Crop


def test_a_crop_is_drawn_again_while_one_class_fills_it():
    label = torch.zeros(8, 30, dtype=torch.uint8)
    label[:, 20:] = 1
    draws = [(("integers", 1), 0), (("integers", 23), 0)]  # columns 0 to 8: class 0 alone
    draws += [(("integers", 1), 0), (("integers", 23), 14)]  # columns 14 to 22: 6 of 8 are class 0, which is 0.75
    draws += [(("integers", 1), 0), (("integers", 23), 15)]  # 5 of 8
    rng = Scripted(*draws)
    assert crop_box(label, (8, 8), 0.75, rng) == (0, 15, 8, 8)
    assert not rng.answers


def test_pixels_without_a_label_do_not_count():
    label = torch.full((8, 16), 255, dtype=torch.uint8)
    label[:, 0], label[0, 8] = 0, 1  # 8 and 1 labelled pixels; a class and what is ignored are not two classes
    draws = [(("integers", 1), 0), (("integers", 9), 0), (("integers", 1), 0), (("integers", 9), 1)]
    label[:2, 5] = torch.tensor([3, 4], dtype=torch.uint8)
    rng = Scripted(*draws)
    assert crop_box(label, (8, 8), 0.6, rng) == (0, 1, 8, 8)  # the first has 8 of 10 labelled pixels in one class
    assert not rng.answers


def test_after_ten_tries_the_last_crop_drawn_is_taken():
    draws = [item for i in range(11) for item in ((("integers", 3), i % 3), (("integers", 21), i))]
    rng = Scripted(*draws)
    assert crop_box(torch.zeros(10, 28, dtype=torch.uint8), (8, 8), 0.75, rng) == (10 % 3, 10, 8, 8)
    assert not rng.answers


def test_a_ratio_of_one_takes_the_first_crop_and_small_images_are_taken_whole():
    label = torch.zeros(5, 28, dtype=torch.uint8)
    assert crop_box(label, (8, 8), 1.0, Scripted((("integers", 1), 0), (("integers", 21), 20))) == (0, 20, 5, 8)


def test_crops_reach_every_corner():
    label, rng = torch.zeros(10, 12, dtype=torch.uint8), np.random.default_rng(0)
    boxes = {crop_box(label, (8, 8), 1.0, rng)[:2] for _ in range(400)}
    assert boxes == {(y, x) for y in range(3) for x in range(5)}


# Colours


def opencv_hsv(image):
    """OpenCV's 8-bit HSV of an RGB image: H in steps of 2 degrees, S and V to 255."""
    hsv = np.array([colorsys.rgb_to_hsv(*pixel) for pixel in image.reshape(3, -1).T / 255])
    return np.round(hsv * (180, 255, 255)) % (180, 256, 256)


def from_opencv_hsv(hsv, shape):
    return np.array([colorsys.hsv_to_rgb(*pixel) for pixel in hsv / (180, 255, 255)]).T.reshape(shape) * 255


def colours(seed=1, side=24):
    image = np.random.default_rng(seed).integers(0, 256, (3, side, side), dtype=np.uint8)
    image[:, 0] = image[:1, 0]  # greys, whose hue is no number
    image[:, 1, :4], image[:, 1, 4:8] = 0, 255
    image[:, 2, :6] = np.eye(3, dtype=np.uint8).repeat(2, 1) * 255
    return torch.from_numpy(image)


@pytest.mark.parametrize("steps", [-90, -18, -7, 0, 1, 17, 60, 90])
def test_hue_turns_by_steps_of_two_degrees(steps):
    image = colours()
    exact = np.array([colorsys.rgb_to_hsv(*pixel) for pixel in image.numpy().reshape(3, -1).T / 255])
    exact[:, 0] = (exact[:, 0] + steps / 180) % 1
    expected = np.array([colorsys.hsv_to_rgb(*pixel) for pixel in exact]).T.reshape(image.shape) * 255
    assert np.abs(turn_hue(image, steps).numpy() - expected).max() < 0.51  # rounding, and nothing else
    # The recipe's own 8-bit arithmetic is a few levels off it, and so are we from that.
    hsv = opencv_hsv(image.numpy())
    hsv[:, 0] = (hsv[:, 0] + steps) % 180
    difference = np.abs(turn_hue(image, steps).numpy() - from_opencv_hsv(hsv, image.shape))
    assert difference.mean() < 1
    assert difference.max() < 6


@pytest.mark.parametrize("factor", [0.5, 0.93, 1.0, 1.2, 1.5])
def test_saturation_is_multiplied_and_stops_at_full(factor):
    image = colours()
    exact = np.array([colorsys.rgb_to_hsv(*pixel) for pixel in image.numpy().reshape(3, -1).T / 255])
    exact[:, 1] = np.minimum(exact[:, 1] * factor, 1)
    expected = np.array([colorsys.hsv_to_rgb(*pixel) for pixel in exact]).T.reshape(image.shape) * 255
    assert np.abs(multiply_saturation(image, factor).numpy() - expected).max() < 0.51
    hsv = opencv_hsv(image.numpy())
    hsv[:, 1] = np.floor(np.minimum(hsv[:, 1] * factor, 255))
    difference = np.abs(multiply_saturation(image, factor).numpy() - from_opencv_hsv(hsv, image.shape))
    assert difference.mean() < 1.5
    assert difference.max() < 6


@pytest.mark.parametrize(("gain", "offset"), [(1.0, -32.0), (1.0, 31.7), (0.5, 0.0), (1.37, 0.0)])
def test_levels_are_cut_off_and_rounded_down(gain, offset):
    image = torch.arange(256, dtype=torch.uint8).repeat(3, 1, 1)
    expected = np.clip(image.numpy().astype(np.float32) * np.float32(gain) + np.float32(offset), 0, 255)
    np.testing.assert_array_equal(change_levels(image, gain=gain, offset=offset).numpy(), expected.astype(np.uint8))


BRIGHTNESS = (("uniform", -32.0, 32.0), 20.0)
CONTRAST = (("uniform", 0.5, 1.5), 1.4)
SATURATION = (("uniform", 0.5, 1.5), 0.6)
HUE = (("integers", -18, 18), 9)


def test_contrast_comes_second():
    image = colours()
    # brightness? contrast last? contrast? saturation? hue?
    rng = Scripted(YES, BRIGHTNESS, NO, YES, CONTRAST, YES, SATURATION, YES, HUE)
    found = photometric_distortion(image, rng)
    steps = change_levels(change_levels(image, offset=20.0), gain=1.4)
    assert torch.equal(found, turn_hue(multiply_saturation(steps, 0.6), 9))
    assert not rng.answers


def test_contrast_comes_last():
    image = colours()
    # brightness? contrast last? saturation? hue? contrast?
    rng = Scripted(YES, BRIGHTNESS, YES, YES, SATURATION, YES, HUE, YES, CONTRAST)
    found = photometric_distortion(image, rng)
    steps = turn_hue(multiply_saturation(change_levels(image, offset=20.0), 0.6), 9)
    assert torch.equal(found, change_levels(steps, gain=1.4))
    assert not rng.answers


def test_nothing_changes_when_every_coin_says_no():
    image = colours()
    before = image.clone()
    assert torch.equal(photometric_distortion(image, Scripted(NO, NO, NO, NO, NO)), image)
    photometric_distortion(image, np.random.default_rng(0))
    assert torch.equal(image, before)  # and what is given is never changed in place


def test_every_change_happens_half_of_the_time(monkeypatch):
    counts = dict.fromkeys(("change_levels", "multiply_saturation", "turn_hue"), 0)

    def count(name):
        def call(image, *args, **kwargs):
            counts[name] += 1
            return image

        return call

    for name in counts:
        monkeypatch.setattr(transforms, name, count(name))
    rng, image = np.random.default_rng(0), colours()
    for _ in range(2000):
        photometric_distortion(image, rng)
    assert counts["change_levels"] / 2000 == pytest.approx(1.0, abs=0.06)  # brightness and contrast
    assert counts["multiply_saturation"] / 2000 == pytest.approx(0.5, abs=0.04)
    assert counts["turn_hue"] / 2000 == pytest.approx(0.5, abs=0.04)


# All together


def naive_sample(image, label, answers, crop):
    """The recipe without colours, with what its random choices were: resize, crop, flip, pad."""
    ratio, top, left, flip = answers
    long, short = int(2048 * ratio), int(512 * ratio)
    height, width = label.shape
    factor = min(long / max(height, width), short / min(height, width))
    new = int(height * factor + 0.5), int(width * factor + 0.5)
    image = naive_bilinear(image, *new)
    label = label[np.arange(new[0]) * height // new[0]][:, np.arange(new[1]) * width // new[1]]
    image, label = (
        image[:, top : top + crop[0], left : left + crop[1]],
        label[top : top + crop[0], left : left + crop[1]],
    )
    size = label.shape
    if flip:
        image, label = image[:, :, ::-1], label[:, ::-1]
    padding = ((0, crop[0] - size[0]), (0, crop[1] - size[1]))
    return np.pad(image, ((0, 0), *padding)), np.pad(label, padding, constant_values=255), size


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize(("ratio", "margins", "place"), [(1.25, (193, 351), (120, 350)), (0.5, (1, 5), (0, 3))])
def test_a_sample_is_what_the_recipe_says(ratio, margins, place, flip):
    image, label = pair(96, 128)  # 640 x 853 at 1.25, 256 x 341 at 0.5
    crop = (448, 503) if ratio > 1 else (400, 337)
    answers = [
        (("uniform", 0.5, 2.0), ratio),
        (("integers", margins[0]), place[0]),
        (("integers", margins[1]), place[1]),
    ]
    rng = Scripted(*answers, YES if flip else NO)
    transform = TrainTransform(crop_size=crop, cat_max_ratio=1.0, photometric=False)
    sample = transform(image, label, rng)
    assert not rng.answers
    expected, expected_label, size = naive_sample(image.numpy(), label.numpy(), (ratio, *place, flip), crop)
    assert np.abs(sample["image"].numpy() - expected).max() < 1.01  # rounded twice
    np.testing.assert_array_equal(sample["label"].numpy(), expected_label)
    assert sample["size"].tolist() == list(size)
    assert [type(sample[key]) for key in ("image", "label", "size")] == [torch.Tensor] * 3
    assert [sample[key].dtype for key in ("image", "label", "size")] == [torch.uint8, torch.uint8, torch.int64]


def test_image_and_labels_stay_together():
    """The image's red tells its label; at any scale, crop and flip nearly all pixels must still agree."""
    image, label = pair(90, 130)
    transform = TrainTransform(image_scale=(400, 100), crop_size=(64, 80), photometric=False)
    for seed in range(20):
        sample = transform(image, label, np.random.default_rng(seed))
        height, width = sample["size"].tolist()
        told = (sample["image"][0, :height, :width].float() / 30).round()
        agree = (told == sample["label"][:height, :width]).float().mean()
        assert agree > 0.85  # all but the borders between blocks, where colours mix
        padding = torch.ones(64, 80, dtype=torch.bool)
        padding[:height, :width] = False
        assert (sample["image"][:, padding] == 0).all()
        assert (sample["label"][padding] == 255).all()


def test_colours_change_the_image_alone_and_not_the_padding():
    image, label = pair(40, 60)
    plain = TrainTransform(image_scale=(200, 50), crop_size=128, photometric=False)
    coloured = TrainTransform(image_scale=(200, 50), crop_size=128)
    changed = 0
    for seed in range(10):
        one, other = (transform(image, label, np.random.default_rng(seed)) for transform in (plain, coloured))
        assert torch.equal(one["label"], other["label"])
        changed += not torch.equal(one["image"], other["image"])
        height, width = other["size"].tolist()
        assert not other["image"][:, height:].any()
        assert not other["image"][:, :, width:].any()
    assert changed >= 8


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (299, 1), (3, 2), (513, 127)])
def test_odd_sizes_give_whole_samples(size):
    image, label = pair(*size)
    for seed in range(5):
        sample = TrainTransform(image_scale=(256, 64), crop_size=(48, 33))(image, label, np.random.default_rng(seed))
        assert sample["image"].shape == (3, 48, 33)
        assert sample["label"].shape == (48, 33)
        assert sample["image"].is_contiguous()
        assert sample["label"].is_contiguous()


def test_only_the_samples_generator_decides():
    """A transform that used a global generator would see others here: it would not follow from (seed, epoch, index)."""
    image, label = pair(90, 130)
    transform = TrainTransform(image_scale=(400, 100), crop_size=64)
    samples = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        with sample_randomness(seed, 0, 0):
            samples.append(transform(image, label, np.random.default_rng(5)))
    assert all(torch.equal(samples[0][key], samples[1][key]) for key in samples[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop_size": 0}, "positive"),
        ({"image_scale": (1, 2, 3)}, "image size"),
    ],
)
def test_arguments_that_cannot_work_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        TrainTransform(**{"crop_size": 32, **arguments})
