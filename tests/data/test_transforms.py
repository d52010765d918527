import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from beit.data import transforms
from beit.data.datasets import sample_randomness
from beit.data.preprocessing import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from beit.data.transforms import (
    CenterCropTransform,
    MaskedImageModelingEvalTransform,
    MaskedImageModelingTransform,
    RandomCropTransform,
    central_box,
    flip_and_box,
    normalize,
    random_box,
    to_unit_range,
)
from beit.errors import InputError
from beit.masking import BlockwiseMaskGenerator

MASKS = BlockwiseMaskGenerator((6, 4), 10, 4)


@pytest.fixture
def image():
    """A picture whose red and green are its coordinates, so that a view says where it was cut."""
    y, x = np.mgrid[0:120, 0:160]
    return Image.fromarray(np.stack([x * 255 // 159, y * 255 // 119, 0 * x + 128], axis=-1).astype(np.uint8))


def apply(transform, image, key=(0, 0)):
    with sample_randomness(0, *key) as rng:
        return transform(image, rng)


def test_shapes_and_types(image):
    sample = apply(MaskedImageModelingTransform((96, 64), (48, 32), mask_generator=MASKS), image)
    assert {name: (tuple(value.shape), value.dtype) for name, value in sample.items()} == {
        "image": ((3, 96, 64), torch.uint8),
        "token_image": ((3, 48, 32), torch.uint8),
        "mask": ((6, 4), torch.bool),
    }
    square = apply(MaskedImageModelingTransform(64, 32, mask_generator=MASKS), image)
    assert square["image"].shape == (3, 64, 64)


def test_an_image_by_pillow_and_its_pixels_give_the_same_views(image):
    pixels = F.pil_to_tensor(image)
    for transform in (
        MaskedImageModelingTransform(64, 32, mask_generator=MASKS),
        MaskedImageModelingEvalTransform(64, 32, mask_generator=MASKS),
        RandomCropTransform(64),
        CenterCropTransform(64),
    ):
        assert transform.takes_pixels
        before = pixels.clone()
        ours, theirs = (apply(transform, given, (0, 3)) for given in (pixels, image))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert torch.equal(pixels, before)


def test_a_flipped_region_is_one_of_the_mirror_image():
    # The official order flips before it crops: the box is drawn in the mirror image.
    for seed in range(12):
        flipped, (top, left, height, width) = flip_and_box(
            (160, 120), (0.1, 0.5), (0.5, 2), np.random.default_rng(seed)
        )
        rng = np.random.default_rng(seed)
        assert flipped == (rng.random() < 0.5)
        there = random_box((160, 120), (0.1, 0.5), (0.5, 2), rng)
        columns = np.arange(160)[::-1] if flipped else np.arange(160)
        assert sorted(columns[there[1] : there[1] + width]) == list(range(left, left + width))
        assert (top, height, width) == (there[0], *there[2:])


@pytest.mark.parametrize("key", [(0, i) for i in range(6)])
def test_both_views_show_the_same_region(image, key):
    # Fails when the tokenizer's view is cropped, flipped or jittered on its own.
    sample = apply(MaskedImageModelingTransform(64, 32, mask_generator=MASKS), image, key)
    halved = torch.nn.functional.avg_pool2d(sample["image"].float(), 2)
    assert (halved - sample["token_image"].float())[:, 2:-2, 2:-2].abs().max() < 12


def test_the_views_are_what_torchvision_makes_of_the_box(image, monkeypatch):
    monkeypatch.setattr(transforms, "random_box", lambda *_: (10, 20, 70, 90))
    transform = MaskedImageModelingTransform(64, 32, color_jitter=0, mask_generator=MASKS)
    for key in [(0, i) for i in range(4)]:
        sample = apply(transform, image, key)
        source = image
        if sample["image"][0, 32, 0] > sample["image"][0, 32, -1]:
            source = F.horizontal_flip(image)
        for name, size, how in (
            ("image", 64, InterpolationMode.BICUBIC),
            ("token_image", 32, InterpolationMode.LANCZOS),
        ):
            expected = F.pil_to_tensor(F.resized_crop(source, 10, 20, 70, 90, [size, size], how))
            # Pillow rounds the filters' weights otherwise: single pixels are a level or two apart.
            apart = (sample[name].int() - expected.int()).abs()
            assert apart.max() <= 3
            assert apart.float().mean() < 0.1


def test_flip_and_jitter_happen(image):
    transform = MaskedImageModelingTransform(64, 32, mask_generator=MASKS)
    samples = [apply(transform, image, (0, i)) for i in range(200)]
    flipped = np.mean([bool(s["image"][0, 32, 0] > s["image"][0, 32, -1]) for s in samples])
    assert 0.38 < flipped < 0.62
    blue = np.array([s["image"][2].float().mean().item() for s in samples])
    assert blue.min() < 100
    assert blue.max() > 156  # constant 128 without jitter
    still = MaskedImageModelingTransform(64, 32, color_jitter=0, mask_generator=MASKS)
    assert all((apply(still, image, (0, i))["image"][2] == 128).all() for i in range(20))


def test_the_whole_image_is_jittered_before_the_crop(monkeypatch):
    # Contrast pulls towards the mean of what it is given: of the image, not of a crop from its black half.
    image = Image.new("RGB", (100, 100), "white")
    image.paste("black", (0, 0, 50, 100))
    monkeypatch.setattr(transforms, "random_box", lambda *_: (10, 5, 30, 30))
    transform = MaskedImageModelingTransform(32, 32, mask_generator=MASKS)
    values = {int(apply(transform, image, (0, i))["image"].float().mean()) for i in range(40)}
    assert any(5 < value < 100 for value in values)


def test_boxes_are_distributed_as_torchvisions(image):
    rng = np.random.default_rng(0)
    scale, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
    ours = np.array([random_box((160, 120), scale, ratio, rng) for _ in range(4000)])
    torch.manual_seed(0)
    make = v2.RandomResizedCrop(10, scale, ratio)
    tensor = torch.zeros(3, 120, 160)
    make_params = getattr(make, "make_params", None) or make._get_params
    drawn = [make_params([tensor]) for _ in range(4000)]
    theirs = np.array([[p[name] for name in ("top", "left", "height", "width")] for p in drawn])
    deviation = np.sqrt((ours.var(0) + theirs.var(0)) / 4000)
    assert (np.abs(ours.mean(0) - theirs.mean(0)) / deviation).max() < 4
    assert np.allclose(ours.std(0), theirs.std(0), rtol=0.06)
    assert (ours[:, 0] + ours[:, 2]).max() <= 120
    assert (ours[:, 1] + ours[:, 3]).max() <= 160


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 1000)])
def test_extreme_images_give_views(size):
    image = Image.new("RGB", size, "red")
    for transform in (
        MaskedImageModelingTransform(16, 8, mask_generator=MASKS),
        MaskedImageModelingEvalTransform(16, 8, mask_generator=MASKS),
        RandomCropTransform(16),
        CenterCropTransform(16),
    ):
        assert apply(transform, image)["image"].shape == (3, 16, 16)


def test_evaluation_is_the_central_crop_and_a_fixed_mask(image):
    transform = MaskedImageModelingEvalTransform(64, 32, mask_generator=MASKS)
    first, second = apply(transform, image), apply(transform, image)
    assert all(torch.equal(first[name], second[name]) for name in first)
    red = first["image"][0].float()  # 105 of 160 columns, centred: 27.5 … 132.5
    assert abs(red[:, 0].mean() - 255 * 28 / 160) < 4
    assert abs(red[:, -1].mean() - 255 * 132 / 160) < 4
    assert not torch.equal(apply(transform, image, (0, 1))["mask"], first["mask"])


@pytest.mark.parametrize(
    ("image_size", "size", "fraction", "box"),
    [
        ((160, 120), (64, 64), 1.0, (0, 20, 120, 120)),
        ((160, 120), (64, 64), 0.5, (30, 50, 60, 60)),
        ((100, 100), (50, 100), 1.0, (25, 0, 50, 100)),
        ((5, 5), (64, 64), 1.0, (0, 0, 5, 5)),
    ],
)
def test_central_box(image_size, size, fraction, box):
    assert central_box(image_size, size, fraction) == box


def test_random_interpolation_chooses_per_image(image):
    views = {
        how: [apply(RandomCropTransform(48, interpolation=how), image, (0, i))["image"] for i in range(20)]
        for how in ("random", "bilinear", "bicubic", "nearest", "lanczos")
    }
    chosen = [
        [how for how in ("bilinear", "bicubic") if torch.equal(view, views[how][i])]
        for i, view in enumerate(views["random"])
    ]
    assert all(chosen)
    assert {how for found in chosen for how in found} == {"bilinear", "bicubic"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"interpolation": "bicubik"}, "did you mean 'bicubic'"),
        ({"second_interpolation": "area"}, "unknown interpolation 'area'"),
        ({"input_size": 0}, "image size"),
        ({"second_input_size": (1, 2, 3)}, "image size"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(InputError, match=message):
        MaskedImageModelingTransform(mask_generator=MASKS, **arguments)


def test_normalize():
    images = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8)
    expected = torch.stack(
        [
            (images[:, c].double() / 255 - IMAGENET_DEFAULT_MEAN[c]) / IMAGENET_DEFAULT_STD[c]
            for c in range(3)
        ],
        dim=1,
    )  # fmt: skip
    ours = normalize(images, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    assert ours.dtype == torch.float32
    assert torch.allclose(ours.double(), expected, atol=1e-6)
    assert torch.equal(normalize(images[0], (0.5,) * 3, (0.5,) * 3), normalize(images, [0.5] * 3, [0.5] * 3)[0])
    assert to_unit_range(images).max() <= 1


def test_normalize_keeps_no_inference_tensor():
    # A constant made in inference mode would break the first step that needs gradients after it.
    transforms._constants.cache_clear()
    images = torch.zeros(1, 3, 2, 2)
    with torch.inference_mode():
        normalize(images, (0.1,) * 3, (0.2,) * 3)
    images = torch.zeros(1, 3, 2, 2, requires_grad=True)  # as for a saliency map
    normalize(images, (0.1,) * 3, (0.2,) * 3).sum().backward()
    assert images.grad is not None
