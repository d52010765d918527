import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from skimage import data
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from beit.data import jitter as jitter_module
from beit.data.datasets import sample_randomness
from beit.data.jitter import RegionJitter
from beit.data.transforms import MaskedImageModelingTransform, RandomCropTransform, cut_out, random_box
from beit.masking import BlockwiseMaskGenerator

MASKS = BlockwiseMaskGenerator((14, 14), 75, 16)
VIEWS = (("image", 224, InterpolationMode.BICUBIC), ("token_image", 112, InterpolationMode.LANCZOS))


@pytest.fixture(scope="module")
def photographs():
    return [Image.fromarray(pixels) for pixels in (data.astronaut(), data.coffee(), data.chelsea(), data.rocket())]


def plain_order(image, rng):
    """Colour jitter of the whole image, flip, crop, resize: all by torchvision on Pillow's images, as official."""
    image = v2.ColorJitter(0.4, 0.4, 0.4)(image)
    if rng.random() < 0.5:
        image = F.horizontal_flip(image)
    box = random_box(image.size, (0.08, 1.0), (3 / 4, 4 / 3), rng)
    return {name: F.pil_to_tensor(F.resized_crop(image, *box, [size, size], how)) for name, size, how in VIEWS}


def test_the_views_are_those_of_the_plain_order_of_operations(photographs):
    # Fails when contrast takes the crop's mean grey, factors or order are drawn otherwise, or values are rounded
    # where Pillow cuts them off.
    transform = MaskedImageModelingTransform(mask_generator=MASKS)
    apart = {name: [] for name, *_ in VIEWS}
    for number, image in enumerate(photographs * 6):
        with sample_randomness(0, 0, number) as rng:
            ours = transform(image, rng)
        with sample_randomness(0, 0, number) as rng:
            plain = plain_order(image, rng)
        for name in apart:
            apart[name].append((ours[name].float() - plain[name].float()).abs().mean().item())
    for values in apart.values():
        assert max(values) < 1  # of 255 levels, for each image
        assert np.mean(values) < 0.2


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
def test_a_jittered_region_is_the_region_of_the_jittered_image_to_the_bit(photographs, order, monkeypatch):
    monkeypatch.setattr(jitter_module, "CONTRAST_PIXELS", 10**9)  # the mean of every pixel
    jitter = RegionJitter(0.9)
    for image, factors in zip(
        photographs, [(1.7, 0.3, 1.9), (0.2, 1.8, 0.4), (1.0, 1.0, 0.0), (0.0, 1.5, 1.0)], strict=True
    ):
        names = ("brightness_factor", "contrast_factor", "saturation_factor")
        drawn = {"fn_idx": torch.tensor([*order, 3]), **dict(zip(names, factors, strict=True))}
        monkeypatch.setattr(jitter._draw, "make_params", lambda _, drawn=drawn: drawn, raising=False)
        whole = image
        for step in order:
            enhancer = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[step]
            whole = enhancer(whole).enhance(factors[step])
        box = (40, 30, 100, 150)
        region = jitter(cut_out(image, box), image)
        assert np.array_equal(np.asarray(region), np.asarray(cut_out(whole, box)))


def test_the_mean_grey_of_a_large_image_is_known_from_a_part_of_it(photographs):
    for image in photographs:
        large = image.resize((1800, 1400), Image.Resampling.BICUBIC)
        thinned = jitter_module._thinned(large)
        assert thinned.width * thinned.height < 2.5 * jitter_module.CONTRAST_PIXELS
        assert abs(jitter_module._mean_grey(thinned) - jitter_module._mean_grey(large)) <= 1


# Decoding at a reduced scale


def test_a_reduced_image_gives_nearly_the_same_views(photographs):
    # Fails when the region is not taken over to the reduced image, or the mirror image's is.
    gradient = np.indices((1200, 1600)).transpose(1, 2, 0) * (255 / 1600)
    image = Image.fromarray(np.dstack([gradient, np.full((1200, 1600), 90)]).astype(np.uint8))
    for transform in (
        MaskedImageModelingTransform(64, 32, mask_generator=MASKS, color_jitter=0.4),
        RandomCropTransform(64),
    ):
        reductions = []
        for number in range(12):
            with sample_randomness(0, 0, number) as rng:
                reductions.append(transform.reduction(image.size, rng))
            reduced = image.reduce(reductions[-1])
            with sample_randomness(0, 0, number) as rng:
                whole = transform(image, rng)
            with sample_randomness(0, 0, number) as rng:
                ours = transform(reduced, rng, image.size)
            assert (whole["image"].float() - ours["image"].float()).abs().mean() < 2.5
            if "mask" in whole:
                assert torch.equal(whole["mask"], ours["mask"])
        assert set(reductions) <= {1, 2, 4, 8}
        assert max(reductions) == 8


def test_an_image_is_not_reduced_below_what_the_views_show():
    transform = MaskedImageModelingTransform((96, 64), (48, 128), mask_generator=MASKS)
    for number in range(50):
        with sample_randomness(0, 0, number) as rng:
            by = transform.reduction((1600, 1200), rng)
        with sample_randomness(0, 0, number) as rng:
            rng.random()
            _, _, height, width = random_box((1600, 1200), (0.08, 1.0), (3 / 4, 4 / 3), rng)
        assert height >= 96 * by or by == 1
        assert width >= 128 * by or by == 1
        assert by == 8 or height < 96 * 2 * by or width < 128 * 2 * by  # as far as it goes


def test_regions_at_the_edges_of_reduced_images_stay_inside():
    image = Image.new("RGB", (13, 9), "red")  # 100 x 70 reduced by 8
    for box in ((0, 0, 70, 100), (69, 99, 1, 1), (62, 92, 8, 8), (0, 99, 70, 1)):
        for flipped in (False, True):
            region = cut_out(image, box, flipped, (100, 70))
            assert min(region.size) >= 1
            assert np.asarray(region).min(axis=(0, 1)).tolist() == [255, 0, 0]  # no black from outside
