"""From a decoded image to the views a task trains on, as uint8 tensors; and to the numbers a network reads.

A transform is called with an RGB image and the sample's own random generator. Python's, NumPy's and PyTorch's global
generators are seeded for the sample as well (see :class:`beit.data.datasets.ImageDataset`), so transforms of other
libraries are as reproducible as these. Images stay uint8 until they are on the device: a quarter of the memory, and
of the traffic, of float32.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from beit.errors import InputError, did_you_mean
from beit.masking import MaskGenerator

IMAGENET_DEFAULT_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEFAULT_STD = (0.229, 0.224, 0.225)
IMAGENET_INCEPTION_MEAN = (0.5, 0.5, 0.5)
IMAGENET_INCEPTION_STD = (0.5, 0.5, 0.5)

INTERPOLATIONS = {
    "bicubic": InterpolationMode.BICUBIC,
    "bilinear": InterpolationMode.BILINEAR,
    "nearest": InterpolationMode.NEAREST,
    "lanczos": InterpolationMode.LANCZOS,
}
RANDOM_CHOICES = ("bilinear", "bicubic")  # what "random" chooses from, anew for every image
CROP_TRIES = 10

Box = tuple[int, int, int, int]  # top, left, height, width, in pixels


class MaskedImageModelingTransform:
    """Colour jitter, flip, one random crop seen by the model and by the tokenizer, and a mask.

    Both views show the same region, so that token (i, j) belongs to patch (i, j). The whole image is jittered before
    it is cropped.

    Source: section 3.1 of arXiv 2106.08254.

    Args:
        input_size: Size of the model's view in pixels, ``(H, W)`` or one number.
        second_input_size: Size of the tokenizer's view in pixels, ``(H2, W2)`` or one number; None for no such view.
        interpolation: How the model's view is resized: bicubic, bilinear, nearest, lanczos, or random.
        second_interpolation: How the tokenizer's view is resized.
        color_jitter: Brightness, contrast and saturation change by a factor in ``1 ± color_jitter``.
        scale: Range of the crop's share of the image area.
        ratio: Range of the crop's width over height.
        mask_generator: Draws the patches to mask.

    Raises:
        InputError: An interpolation is unknown, or a size or the jitter is not usable.
    """

    def __init__(
        self,
        input_size: int | Sequence[int] = 224,
        second_input_size: int | Sequence[int] | None = 112,
        *,
        interpolation: str = "bicubic",
        second_interpolation: str = "lanczos",
        color_jitter: float = 0.4,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        mask_generator: MaskGenerator,
    ) -> None:
        self.views = _TwoViews(input_size, second_input_size, interpolation, second_interpolation)
        self.scale, self.ratio = scale, ratio
        if color_jitter < 0:
            raise InputError(f"color_jitter must be 0 or more, got {color_jitter}")
        self.jitter = v2.ColorJitter(color_jitter, color_jitter, color_jitter) if color_jitter else None
        self.mask_generator = mask_generator

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> dict[str, Tensor]:
        """Returns ``image`` uint8 ``(3, H, W)``, ``token_image`` uint8 ``(3, H2, W2)`` and ``mask`` bool ``(h, w)``."""
        if self.jitter is not None:
            image = self.jitter(image)
        if rng.random() < 0.5:
            image = F.horizontal_flip(image)
        box = random_box(image.size, self.scale, self.ratio, rng)
        return {**self.views(image, box, rng), "mask": torch.from_numpy(self.mask_generator(rng))}


class MaskedImageModelingEvalTransform:
    """The central crop, seen by the model and by the tokenizer, and a mask: for held-out images.

    The mask is drawn from the sample's generator, so with the epoch fixed every evaluation asks the same questions.

    Args:
        input_size: Size of the model's view in pixels, ``(H, W)`` or one number.
        second_input_size: Size of the tokenizer's view in pixels, ``(H2, W2)`` or one number; None for no such view.
        interpolation: How the model's view is resized.
        second_interpolation: How the tokenizer's view is resized.
        crop_fraction: Side of the crop, as a share of the largest one that fits; 0.875 is 224 of 256 pixels.
        mask_generator: Draws the patches to mask.

    Raises:
        InputError: An interpolation is unknown, or a size is not usable.
    """

    def __init__(
        self,
        input_size: int | Sequence[int] = 224,
        second_input_size: int | Sequence[int] | None = 112,
        *,
        interpolation: str = "bicubic",
        second_interpolation: str = "lanczos",
        crop_fraction: float = 0.875,
        mask_generator: MaskGenerator,
    ) -> None:
        self.views = _TwoViews(input_size, second_input_size, interpolation, second_interpolation)
        self.crop_fraction = crop_fraction
        self.mask_generator = mask_generator

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> dict[str, Tensor]:
        """Returns ``image`` uint8 ``(3, H, W)``, ``token_image`` uint8 ``(3, H2, W2)`` and ``mask`` bool ``(h, w)``."""
        box = central_box(image.size, self.views.size, self.crop_fraction)
        return {**self.views(image, box, rng), "mask": torch.from_numpy(self.mask_generator(rng))}


class RandomCropTransform:
    """One random crop, flipped half of the time: for training a tokenizer.

    Args:
        image_size: Size in pixels, ``(H, W)`` or one number.
        interpolation: How the crop is resized.
        scale: Range of the crop's share of the image area.
        ratio: Range of the crop's width over height.

    Raises:
        InputError: The interpolation is unknown or the size not usable.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        *,
        interpolation: str = "lanczos",
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
    ) -> None:
        self.size = size_pair(image_size)
        self.interpolation = known_interpolation(interpolation)
        self.scale, self.ratio = scale, ratio

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> dict[str, Tensor]:
        """Returns ``image``, uint8 ``(3, H, W)``."""
        if rng.random() < 0.5:
            image = F.horizontal_flip(image)
        box = random_box(image.size, self.scale, self.ratio, rng)
        return {"image": view(image, box, self.size, self.interpolation, rng)}


class CenterCropTransform:
    """The central crop alone: for evaluating a tokenizer.

    Args:
        image_size: Size in pixels, ``(H, W)`` or one number.
        interpolation: How the crop is resized.
        crop_fraction: Side of the crop, as a share of the largest one that fits.

    Raises:
        InputError: The interpolation is unknown or the size not usable.
    """

    def __init__(
        self, image_size: int | Sequence[int], *, interpolation: str = "lanczos", crop_fraction: float = 1.0
    ) -> None:
        self.size = size_pair(image_size)
        self.interpolation = known_interpolation(interpolation)
        self.crop_fraction = crop_fraction

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> dict[str, Tensor]:
        """Returns ``image``, uint8 ``(3, H, W)``."""
        box = central_box(image.size, self.size, self.crop_fraction)
        return {"image": view(image, box, self.size, self.interpolation, rng)}


class _TwoViews:
    """One region of an image at two sizes, or at one."""

    def __init__(
        self,
        size: int | Sequence[int],
        second_size: int | Sequence[int] | None,
        interpolation: str,
        second_interpolation: str,
    ) -> None:
        self.size = size_pair(size)
        self.second_size = None if second_size is None else size_pair(second_size)
        self.interpolation = known_interpolation(interpolation)
        self.second_interpolation = known_interpolation(second_interpolation)

    def __call__(self, image: Image.Image, box: Box, rng: np.random.Generator) -> dict[str, Tensor]:
        views = {"image": view(image, box, self.size, self.interpolation, rng)}
        if self.second_size is not None:
            views["token_image"] = view(image, box, self.second_size, self.second_interpolation, rng)
        return views


def view(image: Image.Image, box: Box, size: tuple[int, int], interpolation: str, rng: np.random.Generator) -> Tensor:
    """Returns the region ``box`` of an image at ``size``, uint8 ``(3, H, W)``."""
    return F.pil_to_tensor(crop_and_resize(image, box, size, interpolation, rng))


def crop_and_resize(
    image: Image.Image, box: Box, size: tuple[int, int], interpolation: str, rng: np.random.Generator
) -> Image.Image:
    """Returns the region ``box`` of an image at ``size`` = ``(H, W)``; ``random`` draws the interpolation."""
    if interpolation == "random":
        interpolation = RANDOM_CHOICES[rng.integers(len(RANDOM_CHOICES))]
    return F.resized_crop(image, *box, list(size), INTERPOLATIONS[interpolation])


def random_box(
    image_size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> Box:
    """Draws the region of a random resized crop, as torchvision's ``RandomResizedCrop`` does.

    Args:
        image_size: ``(width, height)`` in pixels, as Pillow says it.
        scale: Range of the region's share of the image area, uniform.
        ratio: Range of its width over height, log-uniform.
        rng: The sample's generator.

    Returns:
        ``(top, left, height, width)``; after 10 draws that do not fit, the central region with the nearest allowed
        width over height.
    """
    width, height = image_size
    for _ in range(CROP_TRIES):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])
    return _central(image_size, min(width, height * aspect), min(height, width / aspect))


def central_box(image_size: tuple[int, int], size: tuple[int, int], fraction: float = 1.0) -> Box:
    """Returns the central region shaped like ``size`` = ``(H, W)`` that spans ``fraction`` of what fits.

    Args:
        image_size: ``(width, height)`` in pixels, as Pillow says it.
        size: The shape wanted, ``(H, W)``.
        fraction: In (0, 1].
    """
    width, height = image_size
    zoom = fraction * min(width / size[1], height / size[0])
    return _central(image_size, size[1] * zoom, size[0] * zoom)


def _central(image_size: tuple[int, int], width: float, height: float) -> Box:
    # An image one pixel wide must still give a region of one pixel.
    w, h = max(1, round(width)), max(1, round(height))
    return (image_size[1] - h) // 2, (image_size[0] - w) // 2, h, w


def size_pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Returns ``(H, W)`` of a size given as such or as one number.

    Raises:
        InputError: It is not one or two positive numbers.
    """
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or min(pair) < 1:
        raise InputError(f"an image size is one positive number or (height, width), got {size}")
    return pair[0], pair[1]


def known_interpolation(name: str) -> str:
    """Returns the name of an interpolation.

    Raises:
        InputError: There is no such interpolation.
    """
    choices = (*INTERPOLATIONS, "random")
    if name not in choices:
        raise InputError(f"unknown interpolation {name!r}{did_you_mean(name, choices)}: use {', '.join(choices)}")
    return name


def to_unit_range(images: Tensor) -> Tensor:
    """Returns uint8 images ``(B, 3, H, W)`` as float32 in [0, 1], what a tokenizer reads."""
    return images.float() / 255


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Returns uint8 images as the float32 numbers a backbone reads: ``(images / 255 - mean) / std``.

    Args:
        images: ``(B, 3, H, W)`` or ``(3, H, W)``, uint8, on any device.
        mean: Per channel, for images in [0, 1].
        std: Per channel, for images in [0, 1].
    """
    constants = _constants(tuple(mean), tuple(std), images.device)
    return (to_unit_range(images) - constants[0]) / constants[1]


@functools.lru_cache(maxsize=16)
def _constants(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> Tensor:
    # Kept: copying them to a GPU at every step would make the host wait for it. Not as inference tensors, which a
    # later call that needs gradients could not use.
    with torch.inference_mode(False):
        return torch.tensor([mean, std], dtype=torch.float32, device=device).reshape(2, -1, 1, 1)
