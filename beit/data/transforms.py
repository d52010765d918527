"""From a decoded image to the views a task trains on, as uint8 tensors; and to the numbers a network reads.

A transform is called with an RGB image and the sample's random generator. The image is Pillow's or, for transforms with
a true attribute ``takes_pixels`` such as those here, a tensor. Python's, NumPy's and PyTorch's global generators are
seeded for the sample too (see :class:`beit.data.datasets.ImageDataset`), so other libraries' transforms are just as
reproducible. Images stay uint8 until they are on the device: a quarter of the memory and traffic of float32.

The plain order is jitter, flip, crop, resize. Here the crop is cut out and resized first, so that only pixels of the
views are jittered and flipped.
"""

import contextlib
import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from beit.data.jitter import ViewJitter
from beit.data.preprocessing import COLOURS
from beit.errors import InputError, did_you_mean
from beit.masking import MaskGenerator

logger = logging.getLogger(__name__)

INTERPOLATIONS = {mode.value: mode for mode in map(InterpolationMode, ("bicubic", "bilinear", "nearest", "lanczos"))}
RANDOM_CHOICES = ("bilinear", "bicubic")  # what "random" chooses from, anew for every image
CROP_TRIES = 10
REDUCTIONS = (8, 4, 2)  # factors by which a JPEG decoder can reduce an image while decoding

Size = int | Sequence[int]  # (H, W), or one number for both
Box = tuple[int, int, int, int]  # top, left, height, width, in pixels


@dataclass(eq=False)
class _Views:
    """A region of an image at one size or two, so that token (i, j) belongs to patch (i, j), and a mask if asked.

    Raises:
        InputError: An interpolation is unknown, or a size is not usable.
    """

    takes_pixels: ClassVar = True

    input_size: Size  # in pixels, (H, W) or one number
    second_input_size: Size | None = None  # (H2, W2) or one number; None for no second view of the region
    _: KW_ONLY
    interpolation: str = "lanczos"  # or bicubic, bilinear, nearest, random
    second_interpolation: str = "lanczos"  # of the second view
    mask_generator: MaskGenerator | None = None  # draws the patches to mask
    in_chans: int = COLOURS  # of the images; other numbers than 3 come and go as float32

    def __post_init__(self) -> None:
        self.sizes = {"image": size_pair(self.input_size)}
        if self.second_input_size is not None:
            self.sizes["token_image"] = size_pair(self.second_input_size)
        self._how = known_interpolation(self.interpolation), known_interpolation(self.second_interpolation)

    def _views(self, region: Tensor, rng: np.random.Generator) -> dict[str, Tensor]:
        sizes = zip(self.sizes.items(), self._how, strict=False)
        return {name: resized(region, size, how, rng) for (name, size), how in sizes}

    def _masked(self, views: dict[str, Tensor], rng: np.random.Generator) -> dict[str, Tensor]:
        return views if self.mask_generator is None else {**views, "mask": torch.from_numpy(self.mask_generator(rng))}


@dataclass(eq=False)
class RandomCropTransform(_Views):
    """One random crop with jittered colours, flipped half of the time: for training.

    The jitter is that of the whole image, though only the views are computed: see :class:`beit.data.jitter.ViewJitter`.
    """

    _: KW_ONLY
    color_jitter: float = 0.0  # brightness, contrast and saturation change by a factor in 1 ± this
    scale: tuple[float, float] = (0.08, 1.0)  # range of the crop's share of the image area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # range of the crop's width over height

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.color_jitter and self.in_chans != COLOURS:
            logger.warning("no colour jitter: it is for images of 3 channels, and these have %d", self.in_chans)
        self._jitter = ViewJitter(self.color_jitter) if self.color_jitter and self.in_chans == COLOURS else None

    def __call__(
        self, image: Image.Image | Tensor, rng: np.random.Generator, full_size: tuple[int, int] | None = None
    ) -> dict[str, Tensor]:
        """Returns ``image``, uint8 ``(3, H, W)``, and if asked ``token_image``, ``(3, H2, W2)``, and bool ``mask``.

        The image is RGB, Pillow's or uint8 ``(3, h, w)``; ``full_size`` is ``(width, height)`` of it in its file, if it
        was decoded at a smaller scale.
        """
        pixels, size = as_pixels(image)
        flipped, box = flip_and_box(full_size or size, self.scale, self.ratio, rng)
        views = self._views(cut_out(pixels, box, full_size), rng)
        if self._jitter is not None:
            views = self._jitter(views, pixels)
        return self._masked({name: view.flip(-1) for name, view in views.items()} if flipped else views, rng)

    def reduction(self, full_size: tuple[int, int], rng: np.random.Generator) -> int:
        """Returns how far an image of ``(width, height)`` may be reduced before this transform would enlarge it.

        The generator is in the state of the one that the transform will be called with.
        """
        _, (_, _, height, width) = flip_and_box(full_size, self.scale, self.ratio, rng)
        rows, columns = (max(sides) for sides in zip(*self.sizes.values(), strict=True))
        return next((by for by in REDUCTIONS if height >= by * rows and width >= by * columns), 1)


@dataclass(eq=False)
class CenterCropTransform(_Views):
    """The central crop, whose side is the share ``crop_fraction`` of the largest one that fits: for evaluation."""

    _: KW_ONLY
    crop_fraction: float = 1.0

    def __call__(self, image: Image.Image | Tensor, rng: np.random.Generator) -> dict[str, Tensor]:
        """Returns ``image``, uint8 ``(3, H, W)``, and if asked ``token_image``, ``(3, H2, W2)``, and bool ``mask``."""
        pixels, size = as_pixels(image)
        box = central_box(size, self.sizes["image"], self.crop_fraction)
        return self._masked(self._views(cut_out(pixels, box), rng), rng)


@dataclass(eq=False)
class MaskedImageModelingTransform(RandomCropTransform):
    """The training crop, with the defaults of pre-training. Source: section 3.1 of arXiv 2106.08254."""

    input_size: Size = 224
    second_input_size: Size | None = 112
    _: KW_ONLY
    interpolation: str = "bicubic"
    color_jitter: float = 0.4


@dataclass(eq=False)
class MaskedImageModelingEvalTransform(CenterCropTransform):
    """The central crop of held-out images: 224 of 256 pixels.

    The mask is drawn from the sample's generator, so with the epoch fixed every evaluation asks the same questions.
    """

    input_size: Size = 224
    second_input_size: Size | None = 112
    _: KW_ONLY
    interpolation: str = "bicubic"
    crop_fraction: float = 0.875


def as_pixels(image: Image.Image | Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Returns an RGB image as uint8 ``(3, h, w)``, a tensor as it is, and its ``(width, height)``."""
    pixels = image if isinstance(image, Tensor) else F.pil_to_tensor(image)
    return pixels, (pixels.shape[2], pixels.shape[1])


def cut_out(pixels: Tensor, box: Box, full_size: tuple[int, int] | None = None) -> Tensor:
    """Returns the region ``box`` of an image, uint8 ``(3, h, w)``, channels last in memory.

    With ``full_size``, ``(width, height)`` of the image before it was reduced, the box is in pixels of that size, and
    is rounded to whole pixels of the image.
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


def resized(pixels: Tensor, size: tuple[int, int], interpolation: str, rng: np.random.Generator) -> Tensor:
    """Returns an image, uint8 ``(3, h, w)``, at another size ``(H, W)``; ``random`` draws the interpolation.

    PyTorch resizes 8-bit channels-last images, as decoders give them, several times faster than Pillow, with the same
    filters up to the rounding of their weights.
    """
    interpolation = drawn_interpolation(interpolation, rng)
    if pixels.is_floating_point():
        # By Pillow, channel by channel: PyTorch does not have every filter for them. They overshoot at edges.
        bands = [F.resize(Image.fromarray(band.numpy()), list(size), INTERPOLATIONS[interpolation]) for band in pixels]
        return torch.cat([F.pil_to_tensor(band) for band in bands]).clamp(pixels.min(), pixels.max())
    if interpolation != "nearest":
        with contextlib.suppress(ValueError, NotImplementedError, RuntimeError):  # older versions have no lanczos
            # Not torchvision's function, which returns channels last: batches are contiguous, as PyTorch's results are.
            return interpolate(pixels[None], size, mode=interpolation, antialias=True)[0].contiguous()
    return F.pil_to_tensor(F.resize(F.to_pil_image(pixels), list(size), INTERPOLATIONS[interpolation])).contiguous()


def drawn_interpolation(name: str, rng: np.random.Generator) -> str:
    """Returns an interpolation by name; of ``random``, one that is drawn."""
    return RANDOM_CHOICES[rng.integers(len(RANDOM_CHOICES))] if name == "random" else name


def flip_and_box(
    image_size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> tuple[bool, Box]:
    """Draws whether an image is mirrored, and the region of a random resized crop in the image as it is."""
    flipped = bool(rng.random() < 0.5)
    top, left, height, width = random_box(image_size, scale, ratio, rng)
    return flipped, (top, image_size[0] - left - width if flipped else left, height, width)


def random_box(
    image_size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> Box:
    """Draws the region of a random resized crop, as torchvision's ``RandomResizedCrop`` does.

    The image is ``(width, height)`` in pixels; the region's share of its area is uniform in ``scale``, its width over
    height log-uniform in ``ratio``. After 10 misfits it is the central region with the nearest allowed ratio.
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
    """Returns the central region shaped like ``size`` = ``(H, W)`` that spans ``fraction``, in (0, 1], of what fits.

    ``image_size`` is ``(width, height)`` in pixels.
    """
    width, height = image_size
    zoom = fraction * min(width / size[1], height / size[0])
    return _central(image_size, size[1] * zoom, size[0] * zoom)


def _central(image_size: tuple[int, int], width: float, height: float) -> Box:
    # An image one pixel wide must still give a region of one pixel.
    w, h = max(1, round(width)), max(1, round(height))
    return (image_size[1] - h) // 2, (image_size[0] - w) // 2, h, w


def size_pair(size: Size) -> tuple[int, int]:
    """Returns a size as ``(H, W)``; raises :class:`InputError` unless it is one or two positive numbers."""
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or min(pair) < 1:
        raise InputError(f"an image size is one positive number or (height, width), got {size}")
    return pair[0], pair[1]


def known_interpolation(name: str) -> str:
    """Returns ``name`` if it is an interpolation, or raises :class:`InputError`."""
    choices = (*INTERPOLATIONS, "random")
    if name not in choices:
        raise InputError(f"unknown interpolation {name!r}{did_you_mean(name, choices)}: use {', '.join(choices)}")
    return name


def to_unit_range(images: Tensor) -> Tensor:
    """Returns uint8 ``(B, C, H, W)`` as float32 in [0, 1], contiguous so that results do not depend on the layout.

    Images of floating point, which have that range already, stay as they are.
    """
    if images.is_floating_point():
        return images
    return images.to(torch.float32, memory_format=torch.contiguous_format) / 255


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Returns uint8 images ``([B,] C, H, W)`` as float32, normalised per channel: ``(images / 255 - mean) / std``.

    Images of floating point have the range [0, 1].
    """
    constants = _constants(tuple(mean), tuple(std), images.device)
    if images.is_floating_point():
        return (images - constants[0]) / constants[1]
    return to_unit_range(images).sub_(constants[0]).div_(constants[1])


@functools.lru_cache(maxsize=16)
def _constants(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> Tensor:
    # Cached, as copying them to a GPU at every step would make the host wait for it. Not as inference tensors, which
    # a later call that needs gradients could not use.
    with torch.inference_mode(False):
        return torch.tensor([mean, std], dtype=torch.float32, device=device).reshape(2, -1, 1, 1)
