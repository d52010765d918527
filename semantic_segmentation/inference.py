"""From an image of any size to the class of each of its pixels: at once, in windows, in several sizes, mirrored."""

import itertools
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from beit.data.transforms import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, IMAGENET_INCEPTION_MEAN, normalize
from beit.errors import InputError
from beit.interop.segmentation import ADE20K_CLASSES
from beit.training.precision import Precision
from semantic_segmentation.modeling import Segmentor, at_size
from semantic_segmentation.transforms import fit_size, resize, scaled

logger = logging.getLogger(f"beit.{__name__}")

TEST_MODES = ("slide", "whole")
COARSEST_STRIDE = 32  # a smaller image leaves the last level of the pyramid empty
BAND_PIXELS = 1 << 20  # pixels whose logits are enlarged at once: 630 MB of them for 150 classes


class Statistics(NamedTuple):
    """Mean and standard deviation of each channel, for images in [0, 1]: what images are normalised with."""

    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN
    std: Sequence[float] = IMAGENET_DEFAULT_STD


def statistics_of(metadata: Mapping[str, Any], num_classes: int) -> Statistics:
    """Returns what a segmentor learnt with: as its checkpoint records, else ImageNet's, as the published ones.

    transformers' copies of the published segmentors record a mean of 0.5, its default when they were converted. Their
    weights learnt with ImageNet's, so a segmentor of ADE20K's 150 classes in its format is not believed about 0.5.

    Args:
        metadata: From :func:`beit.weights.read_weights`.
        num_classes: Classes of the segmentor.
    """
    usual = Statistics()
    recorded = Statistics(metadata.get("mean", usual.mean), metadata.get("std", usual.std))
    copied = metadata.get("dialect") == "huggingface" and num_classes == ADE20K_CLASSES
    if copied and tuple(recorded.mean) == tuple(recorded.std) == tuple(IMAGENET_INCEPTION_MEAN):
        logger.warning(
            "%s says that images have a mean of 0.5, as transformers' copies of the published segmentors do, which "
            "learnt with ImageNet's: taking ImageNet's (did it learn with 0.5? then use what `beit convert --to unilm` "
            "makes of it)",
            metadata.get("source"),
        )
        return usual
    return recorded


@dataclass(frozen=True)
class TestSettings:
    """How an image is tested.

    Args:
        mode: ``slide``: in windows of the size that the model was trained at; ``whole``: at once, for which the model's
            position biases are resized.
        crop: Height and width of a window, in pixels.
        stride: From a window to the next, down and to the right, in pixels.
        image_scale: The image is resized, keeping its ratio, so that its long side is at most the larger of the two and
            its short side at most the smaller, in pixels.
        ratios: Each multiplies ``image_scale``; the results are averaged.
        flip: Average with the results of the mirrored image too.
        short_at_least: The short side is never resized to less than this, in pixels; with it the limit on the long side
            falls, as in the official multi-scale test. 0 for no such bound.
        batch_size: Windows at once; it changes speed and memory, not the result.

    Raises:
        InputError: A setting that cannot work.
    """

    mode: str = "slide"
    crop: tuple[int, int] = (512, 512)
    stride: tuple[int, int] = (341, 341)
    image_scale: tuple[int, int] = (2048, 512)
    ratios: tuple[float, ...] = (1.0,)
    flip: bool = False
    short_at_least: int = 0
    batch_size: int = 4

    def __post_init__(self) -> None:
        if self.mode not in TEST_MODES:
            raise InputError(f"the test mode is {' or '.join(TEST_MODES)}, not {self.mode!r}")
        for stride, crop in zip(self.stride, self.crop, strict=True):
            if not 0 < stride <= crop:
                raise InputError(
                    f"the stride of the windows must be from 1 to their size, {crop} pixels, got {stride}: "
                    "more would leave pixels out"
                )
        if not self.ratios or min(self.ratios) <= 0:
            raise InputError(f"the test ratios must be positive, and at least one, got {self.ratios}")
        if self.batch_size < 1:
            raise InputError(f"there must be at least 1 window at once, got {self.batch_size}")


def predict(
    segmentor: Segmentor,
    image: Tensor,
    settings: TestSettings,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    precision: Precision,
) -> Tensor:
    """Predicts the class of each pixel of an image.

    For each size, and for the mirrored image where asked, the logits are resized to the image's own size, and their
    softmax is averaged.

    Args:
        segmentor: Put into evaluation mode.
        image: As decoded, uint8 ``(3, H, W)``, on any device.
        settings: Sizes, windows, flip.
        mean: Per channel, for images in [0, 1].
        std: Per channel, for images in [0, 1].
        precision: The number format of the forward pass; all after it is float32.

    Returns:
        The likeliest class of each pixel, ``(H, W)`` on the segmentor's device: uint8, or int64 for more than 256
        classes.

    Source: mmsegmentation 0.11, ``MultiScaleFlipAug`` and ``EncoderDecoder.aug_test``.
    """
    segmentor.eval()
    height, width = image.shape[-2:]
    with torch.inference_mode():
        image = image.to(next(segmentor.parameters()).device, non_blocking=True)
        views = _views(image, settings)
        results = (
            (_logits(segmentor, normalize(view[None], mean, std), settings, precision)[0], mirrored, times)
            for view, mirrored, times in views
        )
        only_one = len(settings.ratios) == 1 and not settings.flip
        classes = _likeliest(results, (height, width)) if only_one else _likeliest_on_average(results, (height, width))
    return classes.clone()  # made here, it is no inference tensor, and may be changed


def _views(image: Tensor, settings: TestSettings) -> Iterator[tuple[Tensor, bool, int]]:
    """Yields the image in its sizes, whether it is mirrored, and how many times it counts."""
    # With a bound on the short side several ratios come to the same size, which need not be computed again.
    for size, times in Counter(view_sizes((image.shape[-2], image.shape[-1]), settings)).items():
        resized = resize(image, size)
        yield resized, False, times
        if settings.flip:
            yield resized.flip(-1), True, times


def view_sizes(size: tuple[int, int], settings: TestSettings) -> list[tuple[int, int]]:
    """Returns the height and width in which an image of some height and width is tested, for each ratio."""
    return [fit_size(size, scaled(settings.image_scale, ratio), settings.short_at_least) for ratio in settings.ratios]


def _logits(segmentor: Segmentor, images: Tensor, settings: TestSettings, precision: Precision) -> Tensor:
    with precision.autocast():
        if settings.mode == "whole":
            return whole(segmentor, images)
        return slide(segmentor, images, crop=settings.crop, stride=settings.stride, batch_size=settings.batch_size)


# ---------------------------------------------------------------------------------------- logits at the size of images
def whole(segmentor: Segmentor, images: Tensor) -> Tensor:
    """Returns the logits of whole images, the model's position biases resized to their size.

    Args:
        segmentor: In evaluation mode.
        images: Normalised, ``(B, 3, H, W)``. To a multiple of the patch size, and at least one pixel of the coarsest
            level, they are padded by 0 on the right and below; the logits there are left out.

    Returns:
        float32 ``(B, K, H, W)``.
    """
    height, width = images.shape[-2:]
    patch_size = segmentor.backbone.patch_embed.patch_size
    rows, columns = (
        math.ceil(max(side, COARSEST_STRIDE) / patch) * patch
        for side, patch in zip((height, width), patch_size, strict=True)
    )
    size = rows, columns
    logits = at_size(segmentor, size).segment(_padded(images, size)).float()
    return logits[..., :height, :width]


def slide(
    segmentor: Segmentor, image: Tensor, *, crop: tuple[int, int], stride: tuple[int, int], batch_size: int
) -> Tensor:
    """Returns the logits of an image, averaged over the windows that a pixel is in.

    Args:
        segmentor: In evaluation mode.
        image: Normalised, ``(1, 3, H, W)``. Where it is smaller than a window it is padded by 0 on the right and below;
            the logits there are left out.
        crop: Height and width of a window.
        stride: From a window to the next, down and to the right; the last one is shifted back to end with the image.
        batch_size: Windows at once.

    Returns:
        float32 ``(1, K, H, W)``.

    Source: mmsegmentation 0.11, ``EncoderDecoder.slide_inference``.

    Deviation: mmsegmentation gives a window beyond the image to the model at the size that is left; the model is of one
    size here.
    """
    height, width = image.shape[-2:]
    image = _padded(image, (max(height, crop[0]), max(width, crop[1])))
    tops, lefts = (window_starts(*sides) for sides in zip(image.shape[-2:], crop, stride, strict=True))
    corners = list(itertools.product(tops, lefts))
    total: Tensor | None = None  # the number of classes is known after the first windows
    for first in range(0, len(corners), batch_size):
        places = [
            (..., slice(top, top + crop[0]), slice(left, left + crop[1]))
            for top, left in corners[first : first + batch_size]
        ]
        logits = whole(segmentor, torch.cat([image[place] for place in places]))
        if total is None:
            total = logits.new_zeros(1, logits.shape[1], *image.shape[-2:])
        for place, window in zip(places, logits, strict=True):  # one by one, so that the sum has one order
            total[place] += window
    assert total is not None
    total /= _cover(tops, crop[0], total.shape[-2], total)[:, None] * _cover(lefts, crop[1], total.shape[-1], total)
    return total[..., :height, :width]


def window_starts(length: int, crop: int, stride: int) -> list[int]:
    """Returns where windows of ``crop`` pixels start on a side of ``length`` pixels, at least as long."""
    count = math.ceil(max(length - crop, 0) / stride) + 1
    return [min(number * stride, length - crop) for number in range(count)]


def _cover(starts: Sequence[int], crop: int, length: int, like: Tensor) -> Tensor:
    """Returns how many windows each pixel of a side is in, counted on the device of ``like``."""
    cover = like.new_zeros(length)
    for start in starts:
        cover[start : start + crop] += 1
    return cover


def _padded(images: Tensor, size: tuple[int, int]) -> Tensor:
    below, right = size[0] - images.shape[-2], size[1] - images.shape[-1]
    return F.pad(images, (0, right, 0, below)) if below or right else images


# ------------------------------------------------------------------------------------------------ the class of a pixel
def _likeliest(results: Iterator[tuple[Tensor, bool, int]], size: tuple[int, int]) -> Tensor:
    """Returns the likeliest class by the logits ``(K, h, w)`` of one view: softmax would change nothing."""
    logits, _, _ = next(results)
    classes = logits.new_empty(size, dtype=_class_dtype(len(logits)))
    for rows, band in enlarged(logits, size):
        classes[rows] = band.argmax(dim=0)
    return classes


def _likeliest_on_average(results: Iterator[tuple[Tensor, bool, int]], size: tuple[int, int]) -> Tensor:
    """Returns the likeliest class by the mean over several views.

    The sum is held for the whole image, 4 bytes for each class and pixel: 7 GB for 150 classes and 12 million pixels.
    To go band by band here too, the logits of all views would have to be kept.
    """
    total: Tensor | None = None
    for logits, mirrored, times in results:
        if total is None:
            total = logits.new_zeros(len(logits), *size)
        for rows, band in enlarged(logits, size):
            probabilities = band.softmax(dim=0)
            total[:, rows].add_(probabilities.flip(-1) if mirrored else probabilities, alpha=times)
    assert total is not None
    return total.argmax(dim=0).to(_class_dtype(len(total)))


def enlarged(logits: Tensor, size: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
    """Resizes logits bilinearly, as ``interpolate`` without ``align_corners``, a band of rows at a time.

    The logits of 150 classes at the size of a photograph, 12 million pixels, would take 7 GB.

    Args:
        logits: ``(K, h, w)``.
        size: Height and width to resize to, ``(H, W)``.

    Yields:
        Rows, and the logits in them, ``(K, rows, W)``.
    """
    height, width = size
    rows_at_once = max(1, BAND_PIXELS // width)
    if rows_at_once >= height:
        yield slice(0, height), F.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0]
        return
    for first in range(0, height, rows_at_once):
        rows = torch.arange(first, min(first + rows_at_once, height), device=logits.device, dtype=torch.float32)
        source = ((rows + 0.5) * (logits.shape[1] / height) - 0.5).clamp(min=0)  # the centres of the pixels
        above = source.long()
        below = (above + 1).clamp(max=logits.shape[1] - 1)
        band = torch.lerp(logits[:, above], logits[:, below], (source - above)[:, None])  # (K, rows, w)
        band = F.interpolate(band[None], size=(len(rows), width), mode="bilinear", align_corners=False)[0]
        yield slice(first, first + len(rows)), band


def _class_dtype(num_classes: int) -> torch.dtype:
    return torch.uint8 if num_classes <= 256 else torch.int64
