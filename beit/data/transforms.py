"""From a decoded image to the views a task trains on, as uint8 tensors; and to the numbers a network reads.

A transform is called with an RGB image and the sample's own random generator. The image is Pillow's; those here, as
``takes_pixels`` says of them, take it as a tensor too. Python's, NumPy's and PyTorch's global generators are seeded for
the sample as well (see :class:`beit.data.datasets.ImageDataset`), so transforms of other libraries are as reproducible
as these. Images stay uint8 until they are on the device: a quarter of the memory, and of the traffic, of float32.

What is thrown away is not computed: the region is cut out and resized before it is jittered and mirrored, so that
only pixels of the views go through that. The plain order of operations is jitter, flip, crop, resize.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from beit.data.jitter import ViewJitter
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
REDUCTIONS = (8, 4, 2)  # what a JPEG decoder can divide the size by on the way

Box = tuple[int, int, int, int]  # top, left, height, width, in pixels


class MaskedImageModelingTransform:
    """Colour jitter, flip, one random crop seen by the model and by the tokenizer, and a mask.

    Both views show the same region, so that token (i, j) belongs to patch (i, j). The jitter is that of the whole
    image, though only the views are computed: see :class:`beit.data.jitter.ViewJitter`.

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

    takes_pixels = True

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
        self.jitter = ViewJitter(color_jitter) if color_jitter else None
        self.mask_generator = mask_generator

    def __call__(
        self, image: Image.Image | Tensor, rng: np.random.Generator, full_size: tuple[int, int] | None = None
    ) -> dict[str, Tensor]:
        """Returns ``image`` uint8 ``(3, H, W)``, ``token_image`` uint8 ``(3, H2, W2)`` and ``mask`` bool ``(h, w)``.

        Args:
            image: RGB, by Pillow or as uint8 ``(3, h, w)``.
            rng: The sample's generator.
            full_size: ``(width, height)`` of the image in its file, where it was decoded at a smaller scale.
        """
        pixels = as_pixels(image)
        flipped, box = self._draw(full_size or size_of(pixels), rng)
        views = self.views(cut_out(pixels, box, full_size), rng)
        if self.jitter is not None:
            views = self.jitter(views, pixels)
        if flipped:
            views = {name: view.flip(-1) for name, view in views.items()}
        return {**views, "mask": torch.from_numpy(self.mask_generator(rng))}

    def reduction(self, full_size: tuple[int, int], rng: np.random.Generator) -> int:
        """Returns by what an image may be reduced before this transform, called with the same randomness, enlarges.

        Args:
            full_size: ``(width, height)`` in pixels.
            rng: A generator in the state of the one that the transform will be called with.
        """
        sizes = (self.views.size, self.views.second_size or self.views.size)
        return reduction(self._draw(full_size, rng)[1], *sizes)

    def _draw(self, size: tuple[int, int], rng: np.random.Generator) -> tuple[bool, Box]:
        return flip_and_box(size, self.scale, self.ratio, rng)


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

    takes_pixels = True

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

    def __call__(self, image: Image.Image | Tensor, rng: np.random.Generator) -> dict[str, Tensor]:
        """Returns ``image`` uint8 ``(3, H, W)``, ``token_image`` uint8 ``(3, H2, W2)`` and ``mask`` bool ``(h, w)``."""
        pixels = as_pixels(image)
        region = cut_out(pixels, central_box(size_of(pixels), self.views.size, self.crop_fraction))
        return {**self.views(region, rng), "mask": torch.from_numpy(self.mask_generator(rng))}


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

    takes_pixels = True

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

    def __call__(
        self, image: Image.Image | Tensor, rng: np.random.Generator, full_size: tuple[int, int] | None = None
    ) -> dict[str, Tensor]:
        """Returns ``image``, uint8 ``(3, H, W)``; for ``full_size`` see :class:`MaskedImageModelingTransform`."""
        pixels = as_pixels(image)
        flipped, box = self._draw(full_size or size_of(pixels), rng)
        shown = resized(cut_out(pixels, box, full_size), self.size, self.interpolation, rng)
        return {"image": shown.flip(-1) if flipped else shown}

    def reduction(self, full_size: tuple[int, int], rng: np.random.Generator) -> int:
        """Returns by what an image may be reduced before; see :class:`MaskedImageModelingTransform`."""
        return reduction(self._draw(full_size, rng)[1], self.size)

    def _draw(self, size: tuple[int, int], rng: np.random.Generator) -> tuple[bool, Box]:
        return flip_and_box(size, self.scale, self.ratio, rng)


class CenterCropTransform:
    """The central crop alone: for evaluating a tokenizer.

    Args:
        image_size: Size in pixels, ``(H, W)`` or one number.
        interpolation: How the crop is resized.
        crop_fraction: Side of the crop, as a share of the largest one that fits.

    Raises:
        InputError: The interpolation is unknown or the size not usable.
    """

    takes_pixels = True

    def __init__(
        self, image_size: int | Sequence[int], *, interpolation: str = "lanczos", crop_fraction: float = 1.0
    ) -> None:
        self.size = size_pair(image_size)
        self.interpolation = known_interpolation(interpolation)
        self.crop_fraction = crop_fraction

    def __call__(self, image: Image.Image | Tensor, rng: np.random.Generator) -> dict[str, Tensor]:
        """Returns ``image``, uint8 ``(3, H, W)``."""
        pixels = as_pixels(image)
        region = cut_out(pixels, central_box(size_of(pixels), self.size, self.crop_fraction))
        return {"image": resized(region, self.size, self.interpolation, rng)}


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

    def __call__(self, region: Tensor, rng: np.random.Generator) -> dict[str, Tensor]:
        views = {"image": resized(region, self.size, self.interpolation, rng)}
        if self.second_size is not None:
            views["token_image"] = resized(region, self.second_size, self.second_interpolation, rng)
        return views


def as_pixels(image: Image.Image | Tensor) -> Tensor:
    """Returns an RGB image as uint8 ``(3, h, w)``; a tensor as it is."""
    return image if isinstance(image, Tensor) else F.pil_to_tensor(image)


def size_of(pixels: Tensor) -> tuple[int, int]:
    """Returns ``(width, height)`` of an image ``(3, h, w)``, in the order in which Pillow says it."""
    return pixels.shape[2], pixels.shape[1]


def cut_out(pixels: Tensor, box: Box, full_size: tuple[int, int] | None = None) -> Tensor:
    """Returns the region ``box`` of an image, uint8 ``(3, h, w)``, pixel by pixel in memory.

    Args:
        pixels: The image, uint8 ``(3, h, w)``.
        box: The region; in pixels of ``full_size``, if given, to the nearest whole pixel of the image.
        full_size: ``(width, height)`` of the image that this one is a reduction of.
    """
    top, left, height, width = box
    rows, columns = pixels.shape[1:]
    if full_size is not None:
        left, width = _scaled(left, width, columns / full_size[0], columns)
        top, height = _scaled(top, height, rows / full_size[1], rows)
    region = pixels[None, :, top : top + height, left : left + width]
    return region.contiguous(memory_format=torch.channels_last)[0]


def _scaled(start: int, length: int, zoom: float, limit: int) -> tuple[int, int]:
    first = min(round(start * zoom), limit - 1)
    return first, min(max(1, round((start + length) * zoom) - first), limit - first)


def reduction(box: Box, *sizes: tuple[int, int]) -> int:
    """Returns the largest of 1, 2, 4, 8 by which a region may be reduced and still has the sizes ``(H, W)``."""
    height, width = max(size[0] for size in sizes), max(size[1] for size in sizes)
    return next((by for by in REDUCTIONS if box[2] >= by * height and box[3] >= by * width), 1)


def resized(pixels: Tensor, size: tuple[int, int], interpolation: str, rng: np.random.Generator) -> Tensor:
    """Returns an image at another size; ``random`` draws the interpolation.

    PyTorch resizes 8-bit images that lie in memory pixel by pixel, as decoded ones do, several times faster than
    Pillow, with the same filters to a rounding of the weights.

    Args:
        pixels: uint8 ``(3, h, w)``.
        size: ``(H, W)`` in pixels.
        interpolation: bicubic, bilinear, nearest, lanczos, or random.
        rng: The sample's generator.

    Returns:
        uint8 ``(3, H, W)``.
    """
    if interpolation == "random":
        interpolation = RANDOM_CHOICES[rng.integers(len(RANDOM_CHOICES))]
    if interpolation in ("bicubic", "bilinear") or (interpolation == "lanczos" and _torch_has_lanczos()):
        # Not by torchvision, which asks for a result that lies pixel by pixel: batches lie channel by channel. So do
        # the results of PyTorch here, and nothing is left to sort.
        return interpolate(pixels[None], size, mode=interpolation, antialias=True)[0].contiguous()
    return F.pil_to_tensor(F.resize(F.to_pil_image(pixels), list(size), INTERPOLATIONS[interpolation])).contiguous()


@functools.cache
def _torch_has_lanczos() -> bool:
    # Newer versions only.
    try:
        interpolate(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), (2, 2), mode="lanczos", antialias=True)
    except (ValueError, NotImplementedError, RuntimeError):
        return False
    return True


def crop_and_resize(
    image: Image.Image, box: Box, size: tuple[int, int], interpolation: str, rng: np.random.Generator
) -> Image.Image:
    """Returns the region ``box`` of an image at ``size`` = ``(H, W)``; ``random`` draws the interpolation."""
    if interpolation == "random":
        interpolation = RANDOM_CHOICES[rng.integers(len(RANDOM_CHOICES))]
    return F.resized_crop(image, *box, list(size), INTERPOLATIONS[interpolation])


def flip_and_box(
    image_size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> tuple[bool, Box]:
    """Draws whether an image is mirrored, and then the region of a random resized crop of what that leaves.

    Returns:
        Whether, and where the region lies in the image as it is.
    """
    flipped = bool(rng.random() < 0.5)
    top, left, height, width = random_box(image_size, scale, ratio, rng)
    return flipped, (top, image_size[0] - left - width if flipped else left, height, width)


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
    """Returns uint8 images ``(B, 3, H, W)`` as float32 in [0, 1], what a tokenizer reads.

    However the images lie in memory, the result lies channel by channel: what is computed from it does not depend on
    where it came from, to the bit.
    """
    return images.to(torch.float32, memory_format=torch.contiguous_format) / 255


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Returns uint8 images as the float32 numbers a backbone reads: ``(images / 255 - mean) / std``.

    Args:
        images: ``(B, 3, H, W)`` or ``(3, H, W)``, uint8, on any device.
        mean: Per channel, for images in [0, 1].
        std: Per channel, for images in [0, 1].
    """
    constants = _constants(tuple(mean), tuple(std), images.device)
    return to_unit_range(images).sub_(constants[0]).div_(constants[1])


@functools.lru_cache(maxsize=16)
def _constants(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> Tensor:
    # Kept: copying them to a GPU at every step would make the host wait for it. Not as inference tensors, which a
    # later call that needs gradients could not use.
    with torch.inference_mode(False):
        return torch.tensor([mean, std], dtype=torch.float32, device=device).reshape(2, -1, 1, 1)
