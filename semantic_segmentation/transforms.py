"""Augmentation of images with their label maps for training, and the size of images in tests.

Geometric steps use torchvision's v2 functions, which resize a ``tv_tensors.Mask`` by nearest neighbour. Random choices
come from the sample's generator, in the order of the recipe.

Source: the transforms of mmsegmentation 0.11 and mmcv 1.3, with which the published numbers were produced.

Deviation: OpenCV 5 and torchvision round differently. A resized pixel differs by at most one level; of a label map that
is downscaled, up to 0.3 % of the pixels, whose position falls on a border, take the other neighbour.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import Image, Mask, wrap

from beit.data.transforms import Box, Size, size_pair
from semantic_segmentation.metrics import IGNORED

CROP_TRIES = 10
HUE_STEPS = 180  # OpenCV stores a hue in 8 bits, as steps of 2 degrees

BRIGHTNESS_OFFSET = 32.0  # levels of 255
GAIN_RANGE = (0.5, 1.5)  # of contrast and of saturation
HUE_OFFSET = 18  # steps

Pixels = TypeVar("Pixels", bound=Tensor)


@dataclass(eq=False, kw_only=True)
class TrainTransform:
    """The recipe's training augmentation: random size, random crop, flip, photometric distortion, padding.

    1. The ratio is uniform in ``ratio_range``; the image is resized to fit into ``image_scale`` times the ratio.
    2. The crop's position is uniform, and redrawn up to ten times while one class covers ``cat_max_ratio`` of the
       labelled pixels or more; the last draw is used.
    3. The image is mirrored with probability ``flip``.
    4. Colours change, see :func:`photometric_distortion`.
    5. Anything smaller than the crop is padded on the right and below: the image by 0, the labels by 255.

    The recipe pads after normalising, so that padding is 0 there, not black. Here images are normalised on the device,
    and ``size`` marks where the padding begins.
    """

    image_scale: Size = (2048, 512)  # limits of the long and the short side at ratio 1, in pixels
    ratio_range: Sequence[float] = (0.5, 2.0)
    crop_size: Size  # (H, W) in pixels, or one number
    cat_max_ratio: float = 0.75  # share of the labelled pixels that one class must stay below; 1 accepts any crop
    flip: float = 0.5  # probability
    photometric: bool = True  # change colours

    def __post_init__(self) -> None:
        self.scale, self.crop = size_pair(self.image_scale), size_pair(self.crop_size)

    def __call__(self, image: Image, label: Mask, rng: np.random.Generator) -> dict[str, Tensor]:
        """Transforms an image uint8 ``(3, h, w)`` and its label map uint8 ``(h, w)``.

        Returns ``image`` uint8 ``(3, H, W)``, ``label`` uint8 ``(H, W)`` and ``size`` int64 ``(2,)``: height and width
        of the part at the top left that is not padding.
        """
        ratio = rng.uniform(self.ratio_range[0], self.ratio_range[1])
        size = fit_size((image.shape[-2], image.shape[-1]), scaled(self.scale, ratio))
        image, label = resize(image, size), resize(label, size)
        box = crop_box(label, self.crop, self.cat_max_ratio, rng)
        image, label = F.crop(image, *box), F.crop(label, *box)
        if rng.random() < self.flip:
            image, label = F.horizontal_flip(image), F.horizontal_flip(label)
        pixels = image.as_subclass(Tensor)
        pixels = photometric_distortion(pixels, rng) if self.photometric else pixels
        return {
            "image": padded(pixels, self.crop),
            "label": padded(label.as_subclass(Tensor), self.crop, IGNORED),
            "size": torch.tensor(box[2:]),
        }


def scaled(image_scale: Sequence[int], ratio: float) -> tuple[int, int]:
    """Returns ``image_scale`` times ``ratio``, rounded down to whole pixels as in the recipe."""
    return int(image_scale[0] * ratio), int(image_scale[1] * ratio)


def fit_size(size: tuple[int, int], image_scale: Sequence[int], short_at_least: int = 0) -> tuple[int, int]:
    """Returns the largest size ``(H, W)`` with the aspect ratio of ``size`` that fits into ``image_scale``, in pixels.

    The latter limits the long and the short side, in any order. ``short_at_least`` is a lower bound of the short side,
    usually the test crop, so that windows are never wider than the image; 0 for none. With a bound the long side is not
    limited, as in the recipe's multi-scale test.

    Deviation: No side is ever below one pixel; OpenCV fails there.
    """
    long, short = max(image_scale), min(image_scale)
    if short_at_least:
        factor = max(short, short_at_least) / min(size)
    else:
        factor = min(long / max(size), short / min(size))
    return max(1, int(size[0] * factor + 0.5)), max(1, int(size[1] * factor + 0.5))


def resize(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Resizes an image or a ``Mask`` to ``(H, W)`` as OpenCV does: bilinear without antialiasing, masks by nearest."""
    if tuple(pixels.shape[-2:]) == size:
        return pixels
    if not isinstance(pixels, Mask):
        # With channels last, as decoders leave them, torch is faster; channels first it fails for a single pixel.
        pixels = wrap(pixels.movedim(-3, -1).contiguous().movedim(-1, -3), like=pixels)
    return F.resize(pixels, list(size), InterpolationMode.BILINEAR, antialias=False)


def crop_box(label: Tensor, crop_size: tuple[int, int], cat_max_ratio: float, rng: np.random.Generator) -> Box:
    """Draws a crop of a label map, uint8 ``(H, W)``, in which no class covers too much, if ten draws allow it.

    The crop is smaller than ``crop_size``, in pixels, if the label map is; one class must stay below ``cat_max_ratio``
    of its labelled pixels, and 1 accepts any crop.
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
    top, left = int(rng.integers(label.shape[0] - height + 1)), int(rng.integers(label.shape[1] - width + 1))
    return top, left, height, width


def padded(pixels: Tensor, size: tuple[int, int], value: int = 0) -> Tensor:
    """Pads ``(..., h, w)`` on the right and below to ``size`` = ``(H, W)``."""
    below, right = size[0] - pixels.shape[-2], size[1] - pixels.shape[-1]
    return torch.nn.functional.pad(pixels, (0, right, 0, below), value=value) if below or right else pixels.contiguous()


def photometric_distortion(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Changes brightness, contrast, saturation and hue of an RGB image, uint8 ``(3, H, W)``, each with probability 0.5.

    Brightness comes first, by up to ±32 levels. Contrast (levels times 0.5 to 1.5) comes second or last with equal
    probability. In between, saturation is multiplied by 0.5 to 1.5 and the hue rotated by -18 to 17 of OpenCV's steps
    of 2 degrees.

    Deviation: OpenCV rounds hue and saturation to 8 bits on the way; here they are floating point. Pixels differ by
    half a level on average and by at most six.
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
    """Returns ``image * gain + offset``, clipped to 0 to 255 and rounded down, uint8."""
    return image.float().mul_(gain).add_(offset).clamp_(0, 255).to(torch.uint8)


def multiply_saturation(image: Tensor, factor: float) -> Tensor:
    """Multiplies the S of HSV by ``factor``, up to 1, in an RGB image, uint8 ``(3, H, W)``."""
    value, least = image.amax(dim=0).float(), image.amin(dim=0).float()
    # S is (value - least) / value, and each channel's distance to the value is proportional to it: no hue is needed.
    growth = (value / (value - least).clamp_(min=1)).clamp_(max=factor)
    return _to_levels(value - (value - image).mul_(growth))


def turn_hue(image: Tensor, steps: int) -> Tensor:
    """Rotates the H of HSV by ``steps`` of 2 degrees in an RGB image, uint8 ``(3, H, W)``."""
    # In floating point, as torchvision's is too, but in a quarter of its time.
    value, chroma = image.amax(dim=0).float(), (image.amax(dim=0) - image.amin(dim=0)).float()
    red, green, blue = image.float() / chroma.clamp(min=1)
    # In sectors of 60 degrees: red is at 0, green at 2, blue at 4; in between the two other channels decide.
    second = torch.where(image[1] == value, blue - red + 2, red - green + 4)
    hue = torch.where(image[0] == value, green - blue, second).add_(steps * 6 / HUE_STEPS).remainder_(6)
    # A channel is at full value up to one sector from its own hue, at the least from two sectors on.
    distance = 3 - (hue - torch.tensor([0, 2, 4])[:, None, None]).abs_().sub_(3).abs_()  # on the circle, (3, H, W)
    return _to_levels(value - distance.sub_(1).clamp_(0, 1).mul_(chroma))


def _to_levels(colours: Tensor) -> Tensor:
    return colours.round_().clamp_(0, 255).to(torch.uint8)
