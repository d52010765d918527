"""What happens to an image and its label map: for training, both through the same random changes; for testing, a size.

The geometric steps go through torchvision's v2 functions, which treat a ``tv_tensors.Mask`` as what it is: nearest
neighbour where an image is interpolated. Random choices come from the sample's generator, in the order of the recipe.

Source: the transforms of mmsegmentation 0.11 and mmcv 1.3, which the published numbers were made with.

Deviation: OpenCV 5 and torchvision round differently: a resized pixel differs by at most one level, and of a label map
that is made smaller by some ratios up to 0.3 % of the pixels, whose place falls on a border, take the other neighbour.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import Image, Mask, wrap

from beit.data.transforms import Box, size_pair
from beit.errors import InputError
from semantic_segmentation.metrics import IGNORED

CROP_TRIES = 10
HUE_STEPS = 180  # OpenCV stores a hue in 8 bits, as steps of 2 degrees
HUE_STEPS_OF_A_SECTOR = HUE_STEPS / 6  # from red to yellow, from yellow to green, ...

BRIGHTNESS_OFFSET = 32.0  # levels of 255
GAIN_RANGE = (0.5, 1.5)  # of contrast and of saturation
HUE_OFFSET = 18  # steps

Pixels = TypeVar("Pixels", bound=Tensor)


class TrainTransform:
    """Random size, random crop, flip, photometric distortion, padding: the recipe's training augmentation.

    1. The ratio is uniform in ``ratio_range``, and the image becomes as large as fits into ``image_scale`` times it.
    2. The crop's position is uniform, and drawn again up to ten times while a single class covers ``cat_max_ratio``
       of the labelled pixels or more; the last one drawn is taken.
    3. Left and right change places with probability ``flip``.
    4. Colours change, see :func:`photometric_distortion`.
    5. What is smaller than the crop is padded below and to the right: the image with 0, the labels with 255.

    The recipe pads after normalising, so that padding is 0 there too, and not black. Images here are not normalised
    before they are on the device: the step does both, and ``size`` tells it where the padding begins.

    Args:
        image_scale: Longest and shortest side that an image may have at ratio 1, pixels.
        ratio_range: Lowest and highest ratio.
        crop_size: Pixels, ``(H, W)`` or one number.
        cat_max_ratio: Share of the labelled pixels that one class must stay below; 1 takes the first crop.
        flip: Probability of a flip.
        photometric: Whether colours change.

    Raises:
        InputError: An argument cannot work.
    """

    def __init__(
        self,
        *,
        image_scale: Sequence[int] = (2048, 512),
        ratio_range: Sequence[float] = (0.5, 2.0),
        crop_size: int | Sequence[int],
        cat_max_ratio: float = 0.75,
        flip: float = 0.5,
        photometric: bool = True,
    ) -> None:
        self.image_scale = size_pair(image_scale)
        self.crop_size = size_pair(crop_size)
        if len(ratio_range) != 2 or not 0 < ratio_range[0] <= ratio_range[1]:
            raise InputError(f"ratio_range is the lowest and the highest ratio, both above 0, got {tuple(ratio_range)}")
        if not 0 < cat_max_ratio <= 1:
            raise InputError(f"cat_max_ratio must be above 0 and at most 1, got {cat_max_ratio}")
        if not 0 <= flip <= 1:
            raise InputError(f"flip is a probability from 0 to 1, got {flip}")
        self.ratio_range = (ratio_range[0], ratio_range[1])
        self.cat_max_ratio, self.flip, self.photometric = cat_max_ratio, flip, photometric

    def __call__(self, image: Image, label: Mask, rng: np.random.Generator) -> dict[str, Tensor]:
        """Returns the sample of an image uint8 ``(3, h, w)`` and its label map uint8 ``(h, w)``.

        Returns:
            ``image`` uint8 ``(3, H, W)``, ``label`` uint8 ``(H, W)``, and ``size`` int64 ``(2,)``: height and width
            of the part that is not padding, which begins at the top left.
        """
        ratio = rng.uniform(*self.ratio_range)
        size = fit_size((image.shape[-2], image.shape[-1]), scaled(self.image_scale, ratio))
        image, label = resize(image, size), resize(label, size)
        box = crop_box(label, self.crop_size, self.cat_max_ratio, rng)
        image, label = F.crop(image, *box), F.crop(label, *box)
        if rng.random() < self.flip:
            image, label = F.horizontal_flip(image), F.horizontal_flip(label)
        pixels = image.as_subclass(Tensor)
        if self.photometric:
            pixels = photometric_distortion(pixels, rng)
        return {
            "image": _pad(pixels, self.crop_size, 0),
            "label": _pad(label.as_subclass(Tensor), self.crop_size, IGNORED),
            "size": torch.tensor(box[2:]),
        }


def scaled(image_scale: Sequence[int], ratio: float) -> tuple[int, int]:
    """Returns ``image_scale`` times ``ratio`` in whole pixels, rounded down as in the recipe."""
    return int(image_scale[0] * ratio), int(image_scale[1] * ratio)


def fit_size(size: tuple[int, int], image_scale: Sequence[int], short_at_least: int = 0) -> tuple[int, int]:
    """Returns the largest size with the proportions of ``size`` whose sides fit into ``image_scale``.

    Args:
        size: ``(h, w)`` in pixels.
        image_scale: The most that the longer and the shorter side may have, pixels, in any order.
        short_at_least: The least that the shorter side may have, usually the crop of the test, so that a window is
            never wider than the image; 0 for none. With it, as in the recipe's multi-scale test, the longer side is
            as long as it comes: ``image_scale`` limits the shorter one alone.

    Returns:
        ``(H, W)`` in pixels.

    Deviation: no side is ever below one pixel; OpenCV fails there.
    """
    long, short = max(image_scale), min(image_scale)
    if short_at_least:
        factor = max(short, short_at_least) / min(size)
    else:
        factor = min(long / max(size), short / min(size))
    return max(1, int(size[0] * factor + 0.5)), max(1, int(size[1] * factor + 0.5))


def resize(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Returns an image (or a ``Mask``) at ``size`` = ``(H, W)``, as OpenCV resizes.

    An image is interpolated between the four nearest pixels also where it becomes smaller, and not averaged over all
    that a new pixel covers; a mask takes the nearest neighbour.
    """
    if tuple(pixels.shape[-2:]) == size:
        return pixels
    if not isinstance(pixels, Mask):
        # The channels of a pixel side by side, as decoders leave them: torch is faster so, and fails in the other
        # order on its way to one single pixel.
        pixels = wrap(pixels.movedim(-3, -1).contiguous().movedim(-1, -3), like=pixels)
    return F.resize(pixels, list(size), InterpolationMode.BILINEAR, antialias=False)


def crop_box(label: Tensor, crop_size: tuple[int, int], cat_max_ratio: float, rng: np.random.Generator) -> Box:
    """Draws where to crop, so that, if ten draws allow it, no single class fills the crop.

    Args:
        label: uint8 ``(H, W)``.
        crop_size: ``(h, w)`` in pixels.
        cat_max_ratio: Share of the labelled pixels of the crop that one class must stay below; 1 looks at nothing.
        rng: The sample's generator.

    Returns:
        ``(top, left, height, width)`` within the label map, smaller than ``crop_size`` where that is.
    """
    box = _random_box(label, crop_size, rng)
    if cat_max_ratio >= 1:
        return box
    labels = label.as_subclass(Tensor)
    for _ in range(CROP_TRIES):
        top, left, height, width = box
        pixels = labels[top : top + height, left : left + width].flatten()
        counts = torch.bincount(pixels, minlength=256).numpy()[:IGNORED]
        if np.count_nonzero(counts) > 1 and counts.max() < cat_max_ratio * counts.sum():
            break
        box = _random_box(label, crop_size, rng)
    return box


def _random_box(label: Tensor, crop_size: tuple[int, int], rng: np.random.Generator) -> Box:
    height, width = min(crop_size[0], label.shape[0]), min(crop_size[1], label.shape[1])
    top = int(rng.integers(label.shape[0] - height + 1))
    left = int(rng.integers(label.shape[1] - width + 1))
    return top, left, height, width


def _pad(pixels: Tensor, size: tuple[int, int], value: int) -> Tensor:
    below, right = size[0] - pixels.shape[-2], size[1] - pixels.shape[-1]
    if not (below or right):
        return pixels.contiguous()
    return torch.nn.functional.pad(pixels, (0, right, 0, below), value=value)


def photometric_distortion(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Changes brightness, contrast, saturation and hue, each with probability one half.

    Brightness comes first, by up to 32 levels either way. Contrast (all levels times 0.5 to 1.5) follows or is the
    last, with equal chances. In between, saturation is multiplied by 0.5 to 1.5, and the hue turned by -18 to 17 of
    OpenCV's steps of 2 degrees.

    Args:
        image: uint8 ``(3, H, W)``, RGB.
        rng: The sample's generator.

    Returns:
        uint8 ``(3, H, W)``.

    Deviation: OpenCV rounds hue and saturation to 8 bits on the way; here they are floating point. Half a level of
    difference in the mean, and six at most, for hue and for saturation.
    """
    if rng.random() < 0.5:
        image = change_levels(image, offset=rng.uniform(-BRIGHTNESS_OFFSET, BRIGHTNESS_OFFSET))
    contrast_last = rng.random() < 0.5
    if not contrast_last and rng.random() < 0.5:
        image = change_levels(image, gain=rng.uniform(*GAIN_RANGE))
    if rng.random() < 0.5:
        image = multiply_saturation(image, rng.uniform(*GAIN_RANGE))
    if rng.random() < 0.5:
        image = turn_hue(image, int(rng.integers(-HUE_OFFSET, HUE_OFFSET)))
    if contrast_last and rng.random() < 0.5:
        image = change_levels(image, gain=rng.uniform(*GAIN_RANGE))
    return image


def change_levels(image: Tensor, *, gain: float = 1.0, offset: float = 0.0) -> Tensor:
    """Returns ``image * gain + offset`` within 0 to 255, rounded down, uint8."""
    return image.float().mul_(gain).add_(offset).clamp_(0, 255).to(torch.uint8)


def multiply_saturation(image: Tensor, factor: float) -> Tensor:
    """Returns the image with the S of its HSV colours multiplied by ``factor``, and at most 1.

    Args:
        image: uint8 ``(3, H, W)``, RGB.
        factor: 0 or more; 0 gives greys, of the value of the strongest channel.
    """
    colours = image.float()
    value, chroma = _value_and_chroma(colours)
    # S is chroma / value, and every channel's distance to the value is proportional to it: no hue is needed.
    growth = (value / chroma.clamp(min=1)).clamp_(max=factor)
    return _to_levels(value - (value - colours).mul_(growth))


def turn_hue(image: Tensor, steps: int) -> Tensor:
    """Returns the image with the H of its HSV colours turned by ``steps`` of 2 degrees, OpenCV's unit.

    Args:
        image: uint8 ``(3, H, W)``, RGB.
        steps: Of 180 that lead from red through yellow, green and blue back to red.
    """
    colours = image.float()
    red, green, blue = colours
    value, chroma = _value_and_chroma(colours)
    scale = 1 / chroma.clamp(min=1)
    # In sectors of 60 degrees: red is at 0, green at 2, blue at 4, and what lies between follows from the two others.
    hue = torch.where(
        value == red,
        (green - blue) * scale,
        torch.where(value == green, (blue - red) * scale + 2, (red - green) * scale + 4),
    )
    hue = hue.add_(steps / HUE_STEPS_OF_A_SECTOR).remainder_(6)
    for channel, centre in zip(colours, (0, 2, 4), strict=True):
        # A channel is at full value up to one sector away from its own hue, at the least from two on, and linear
        # between; the way around the circle is 3 - |3 - distance|.
        loss = 2 - (hue - centre).abs_().sub_(3).abs_()
        torch.sub(value, loss.clamp_(0, 1).mul_(chroma), out=channel)
    return _to_levels(colours)


def _value_and_chroma(colours: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the strongest channel and how far the weakest is below it, both ``(H, W)``, of ``(3, H, W)``."""
    red, green, blue = colours
    value = torch.maximum(torch.maximum(red, green), blue)
    return value, value - torch.minimum(torch.minimum(red, green), blue)


def _to_levels(colours: Tensor) -> Tensor:
    return colours.round_().clamp_(0, 255).to(torch.uint8)
