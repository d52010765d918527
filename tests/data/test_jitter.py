import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from skimage import data
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from beit.data import jitter as jitter_module
from beit.data.datasets import sample_randomness
from beit.data.jitter import ViewJitter
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
    # Fails when contrast takes the crop's mean grey, when factors or their order are drawn otherwise, or when what
    # Pillow cuts off after each step is forgotten: that would show as a difference of half a level or more.
    transform = MaskedImageModelingTransform(mask_generator=MASKS)
    apart = {name: [] for name, *_ in VIEWS}
    for number, image in enumerate(photographs * 6):
        with sample_randomness(0, 0, number) as rng:
            ours = transform(image, rng)
        with sample_randomness(0, 0, number) as rng:
            plain = plain_order(image, rng)
        for name in apart:
            apart[name].append(ours[name].float() - plain[name].float())
    for differences in apart.values():
        each = [difference.abs().mean().item() for difference in differences]
        assert np.mean(each) < 0.7  # of 255 levels
        assert max(each) < 2  # where much is black or white: cut off before the resize there, after it here
        assert abs(np.mean([difference.mean().item() for difference in differences])) < 0.15


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
def test_each_pixel_is_what_pillow_makes_of_it(photographs, order, monkeypatch):
    # Not resized, the pixels differ by roundings alone, whatever is cut off at black and white on the way. Fails when
    # a step is left out or misplaced, and when half a level that Pillow cuts off is.
    monkeypatch.setattr(jitter_module, "CONTRAST_PIXELS", 10**9)  # the mean of every pixel
    jitter = ViewJitter(0.9)
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for image, factors in zip(
        photographs, [(1.39, 0.65, 1.35), (0.62, 1.38, 0.7), (1.23, 1.4, 0.85), (1.37, 1.29, 1.25)], strict=True
    ):
        monkeypatch.setattr(jitter, "_draw", lambda f=factors: [(jitter_module._STEPS[i], f[i]) for i in order])
        expected = image
        for step in order:
            expected = enhancers[step](expected).enhance(factors[step])
        whole = F.pil_to_tensor(image)
        ours = jitter({"all": whole, "part": whole[:, 40:140, 30:180]}, whole)
        apart = ours["all"].int() - F.pil_to_tensor(expected).int()
        assert apart.abs().max() <= 2
        assert apart.abs().float().mean() < 0.7
        assert torch.equal(ours["part"], ours["all"][:, 40:140, 30:180])


def test_factors_and_order_are_drawn_as_by_torchvision():
    theirs = v2.ColorJitter(0.7, 0.7, 0.7)
    make_params = getattr(theirs, "make_params", None) or theirs._get_params
    for seed in range(20):
        torch.manual_seed(seed)
        drawn = make_params([])
        named = [("brightness", "contrast", "saturation", "hue")[i] for i in drawn["fn_idx"].tolist()]
        expected = [(name, drawn[f"{name}_factor"]) for name in named if name != "hue"]
        after = torch.rand(())
        torch.manual_seed(seed)
        assert ViewJitter(0.7)._draw() == expected
        assert torch.rand(()) == after
    assert all(factor >= 0 for _ in range(20) for _, factor in ViewJitter(3.0)._draw())


def test_the_mean_grey_of_a_large_image_is_known_from_a_part_of_it(photographs):
    grey = torch.tensor([0.299, 0.587, 0.114])
    for image in photographs:
        large = F.pil_to_tensor(image.resize((1800, 1400), Image.Resampling.BICUBIC)).float()
        thinned = jitter_module._thinned(large)
        assert thinned.shape[1] < 2.5 * jitter_module.CONTRAST_PIXELS
        assert abs(jitter_module._mean_grey(thinned) - grey @ large.flatten(1).mean(dim=1)) <= 1
    for size in ((1, 1), (1, 90_000), (90_000, 1), (3, 40_000)):
        assert jitter_module._mean_grey(jitter_module._thinned(torch.full((3, *size), 7.0))) == 7


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
    image = torch.zeros(3, 9, 13)  # 100 x 70 reduced by 8
    for box in ((0, 0, 70, 100), (69, 99, 1, 1), (62, 92, 8, 8), (0, 99, 70, 1), (0, 0, 1, 1)):
        region = cut_out(image, box, (100, 70))
        assert region.shape[0] == 3
        assert min(region.shape) >= 1
