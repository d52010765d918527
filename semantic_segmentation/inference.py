"""From an image of any size to the class of each pixel: whole or in windows, at several sizes, mirrored."""

import itertools
import logging
import math
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from beit.checkpoints.formats.segmentation import ADE20K_CLASSES
from beit.data.preprocessing import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, IMAGENET_INCEPTION_MEAN
from beit.data.transforms import normalize, size_pair
from beit.errors import InputError
from beit.modeling import Biases
from beit.training.precision import Precision
from semantic_segmentation.modeling import Segmentor, at_size
from semantic_segmentation.transforms import fit_size, padded, resize, scaled

logger = logging.getLogger(f"beit.{__name__}")

TEST_MODES = ("slide", "whole")
COARSEST_STRIDE = 32  # a smaller image leaves the last level of the pyramid empty
BAND_PIXELS = 1 << 20  # pixels whose logits are enlarged at once: 630 MB for 150 classes
MOST_BIAS_BYTES = 2 << 30  # biases kept for all windows: 1.6 GB for ViT-L at 512 pixels in float32
SIZES_KEPT = 4  # the index of a large image alone takes 100 MB

Key = TypeVar("Key")


class Statistics(NamedTuple):
    """Per-channel mean and standard deviation that images in [0, 1] are normalised with."""

    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN
    std: Sequence[float] = IMAGENET_DEFAULT_STD


def statistics_of(metadata: Mapping[str, Any], num_classes: int) -> Statistics:
    """Returns the statistics a segmentor was trained with: as recorded, else ImageNet's, as the published ones.

    transformers' copies of the published segmentors record a mean of 0.5, its default when they were converted, but
    their weights were trained with ImageNet's. So 0.5 is ignored for a segmentor of ADE20K's 150 classes in its format.
    ``metadata`` comes from :func:`beit.checkpoints.read.read_weights`.
    """
    usual = Statistics()
    recorded = Statistics(metadata.get("mean", usual.mean), metadata.get("std", usual.std))
    copied = metadata.get("dialect") == "huggingface" and num_classes == ADE20K_CLASSES
    if copied and tuple(recorded.mean) == tuple(recorded.std) == tuple(IMAGENET_INCEPTION_MEAN):
        logger.warning(
            "%s records an image mean of 0.5, as transformers' copies of the published segmentors do, which were "
            "trained with ImageNet's: using ImageNet's (trained with 0.5? convert it with `beit convert --to unilm`)",
            metadata.get("source"),
        )
        return usual
    return recorded


@dataclass(frozen=True)
class TestSettings:
    """How an image is tested; raises :class:`InputError` for a setting that cannot work.

    An image is resized, keeping its aspect ratio, so that its long side is at most the larger and its short side at
    most the smaller number of ``image_scale``. With ``short_at_least`` the short side is never resized below that, and
    the long side not limited, as in the official multi-scale test.
    """

    mode: str = "slide"  # in windows of the model's training size; whole: at once, with resized position biases
    crop: tuple[int, int] = (512, 512)  # height and width of a window, in pixels
    stride: tuple[int, int] = (341, 341)  # between windows, down and to the right, in pixels
    image_scale: tuple[int, int] = (2048, 512)  # pixels
    ratios: tuple[float, ...] = (1.0,)  # factors on image_scale whose results are averaged
    flip: bool = False  # average with the results for the mirrored image too
    short_at_least: int = 0  # pixels; 0 for no such bound
    batch_size: int = 4  # windows, also of several images; affects speed and memory, not the result

    def __post_init__(self) -> None:
        if self.mode not in TEST_MODES:
            raise InputError(f"the test mode is {' or '.join(TEST_MODES)}, not {self.mode!r}")
        for stride, crop in zip(self.stride, self.crop, strict=True):
            if not 0 < stride <= crop:
                raise InputError(f"the stride of the windows must be from 1 to their size, {crop} pixels, got {stride}")
        if not self.ratios or min(self.ratios) <= 0:
            raise InputError(f"the test ratios must be positive, and at least one, got {self.ratios}")
        if self.batch_size < 1:
            raise InputError(f"the batch must hold at least 1 window, got {self.batch_size}")

    @classmethod
    def of(cls, known: Mapping[str, Any], crop: tuple[int, int], batch_size: int) -> "TestSettings":
        """Returns the test that a run's settings ask for, by their names, with windows of ``crop`` pixels.

        What they lack is as in the published tests: with several ratios, the short side is never below a window.
        """
        ratios = tuple(known.get("test_ratios", (1.0,)))
        stride = size_pair(known.get("slide_stride", (crop[0] * 2 // 3, crop[1] * 2 // 3)))
        long, short = known.get("image_scale", (4 * min(crop), min(crop)))
        return cls(
            mode=known.get("test_mode", "slide"),
            crop=crop,
            stride=(min(stride[0], crop[0]), min(stride[1], crop[1])),
            image_scale=(long, short),
            ratios=ratios,
            flip=known.get("test_flip", False),
            short_at_least=min(crop) if known.get("test_short_at_least_crop", len(ratios) > 1) else 0,
            batch_size=batch_size,
        )

    def windows_of(self, view: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Returns the size of the windows of a view, and the steps between them."""
        return (view, view) if self.mode == "whole" else (self.crop, self.stride)


def predict_each(
    segmentor: Segmentor,
    images: Iterable[tuple[Key, Tensor]],
    settings: TestSettings,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    precision: Precision,
) -> Generator[tuple[Key, Tensor], None, None]:
    """Predicts the class of each pixel of images, batching windows across images.

    For each size, and for the mirrored image if asked, the logits are resized to the original size, and their softmax
    is averaged. Nothing waits for the device.

    The segmentor is put into evaluation mode and must not change meanwhile. ``images`` are pairs of anything that
    identifies an image and the image as decoded, uint8 ``(3, H, W)``, on any device; at most a batch of windows is read
    ahead. ``mean`` and ``std`` are per channel, for images in [0, 1]. All but the forward pass is in float32.

    Yields:
        In order, the identifier and the likeliest class of each pixel, ``(H, W)`` on the segmentor's device: uint8, or
        int64 for more than 256 classes.

    Source: mmsegmentation 0.11, ``MultiScaleFlipAug`` and ``EncoderDecoder.aug_test``.
    """
    segmentor.eval()
    device = next(segmentor.parameters()).device
    model = AnySize(segmentor, precision, keep_biases=_biases_fit(segmentor, settings, precision))
    waiting: deque[tuple[Key, tuple[int, int]]] = deque()

    def windows() -> Iterator[Tensor]:
        for key, image in images:
            pixels, size = image.to(device, non_blocking=True), (image.shape[-2], image.shape[-1])
            waiting.append((key, size))
            for view, mirrored, _ in _views(size, settings):
                shown = resize(pixels, view)
                shown = normalize((shown.flip(-1) if mirrored else shown)[None], mean, std)[0]
                yield from cut_windows(shown, *settings.windows_of(view))

    # Logits come back in the order of the windows: the next ones belong to the first image that waits.
    batches = _batches(windows(), settings.batch_size * math.prod(settings.crop))
    logits = itertools.chain.from_iterable(map(model, batches))
    for first in logits:
        key, size = waiting.popleft()
        of_image = itertools.chain(iter([first]), logits)
        del first  # a reference to one window keeps its whole batch in memory
        yield key, _classes(of_image, size, settings)


def _biases_fit(segmentor: Segmentor, settings: TestSettings, precision: Precision) -> bool:
    """Whether to keep the position biases of windows: in memory they fit, and whole images each have their own."""
    backbone = segmentor.backbone
    tokens = 1 + math.prod(model_size(segmentor, settings.crop)) // math.prod(backbone.patch_embed.patch_size)
    elements = backbone.get_num_layers() * backbone.num_heads * tokens**2
    return settings.mode == "slide" and elements * precision.dtype.itemsize <= MOST_BIAS_BYTES


class AnySize:
    """Computes logits for images of any size by a segmentor in evaluation mode; the last few sizes are kept.

    With ``keep_biases`` position biases are looked up once per size and not in each call.
    """

    def __init__(self, segmentor: Segmentor, precision: Precision, *, keep_biases: bool) -> None:
        self._segmentor, self._precision, self._keep_biases = segmentor, precision, keep_biases
        self._sized: dict[tuple[int, int], tuple[Segmentor, Biases | None]] = {}

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Returns float32 logits ``(B, K, H, W)`` for normalised images ``(B, 3, H, W)``.

        The model sees them padded by 0 on the right and below, to a size of :func:`model_size`.
        """
        height, width = images.shape[-2:]
        size = model_size(self._segmentor, (height, width))
        with self._precision.autocast():
            if size not in self._sized:
                if len(self._sized) == SIZES_KEPT:
                    del self._sized[next(iter(self._sized))]
                sized = at_size(self._segmentor, size)
                self._sized[size] = sized, sized.backbone.position_biases() if self._keep_biases else None
            sized, biases = self._sized[size]
            return sized.segment(padded(images, size), biases).float()[..., :height, :width]


def model_size(segmentor: Segmentor, size: tuple[int, int]) -> tuple[int, int]:
    """Returns the smallest height and width, of at least ``size``, that the model takes."""
    rows, columns = segmentor.backbone.patch_embed.patch_size
    height, width = (max(side, COARSEST_STRIDE) for side in size)
    return math.ceil(height / rows) * rows, math.ceil(width / columns) * columns


def _batches(windows: Iterable[Tensor], most_pixels: int) -> Iterator[Tensor]:
    """Stacks consecutive windows of the same size, as many as ``most_pixels`` allow and at least one."""
    batch: list[Tensor] = []
    for window in windows:
        full = (len(batch) + 1) * math.prod(window.shape[1:]) > most_pixels
        if batch and (full or window.shape != batch[0].shape):
            yield torch.stack(batch)
            batch = []
        batch.append(window)
    if batch:
        yield torch.stack(batch)


def _views(size: tuple[int, int], settings: TestSettings) -> list[tuple[tuple[int, int], bool, int]]:
    """Returns the size of each distinct view of an image, whether it is mirrored, and how often it counts."""
    scales = [scaled(settings.image_scale, ratio) for ratio in settings.ratios]
    sizes = Counter(fit_size(size, scale, settings.short_at_least) for scale in scales)
    mirrored = (False, True) if settings.flip else (False,)
    return [(view, mirror, times) for view, times in sizes.items() for mirror in mirrored]


def _places(size: Sequence[int], crop: tuple[int, int], stride: tuple[int, int]) -> list[tuple[slice, slice]]:
    tops, lefts = (window_starts(*sides) for sides in zip(size, crop, stride, strict=True))
    return [(slice(top, top + crop[0]), slice(left, left + crop[1])) for top in tops for left in lefts]


def window_starts(length: int, crop: int, stride: int) -> list[int]:
    """Returns where windows of ``crop`` pixels start on a side of ``length`` pixels; the last ends with the side."""
    count = math.ceil(max(length - crop, 0) / stride) + 1
    return [min(number * stride, length - crop) for number in range(count)]


def cut_windows(view: Tensor, crop: tuple[int, int], stride: tuple[int, int]) -> Iterator[Tensor]:
    """Cuts a normalised image ``(3, H, W)`` into windows of ``crop`` pixels, row by row, ``stride`` pixels apart.

    The last window of a row or column is shifted back to end with the image. An image smaller than a window is padded
    by 0 on the right and below.

    Source: mmsegmentation 0.11, ``EncoderDecoder.slide_inference``.

    Deviation: mmsegmentation gives the model a smaller window where the image is smaller.
    """
    view = padded(view, (max(view.shape[-2], crop[0]), max(view.shape[-1], crop[1])))
    for rows, columns in _places(view.shape[-2:], crop, stride):
        yield view[:, rows, columns]


def merge_windows(
    windows: Iterator[Tensor], size: tuple[int, int], crop: tuple[int, int], stride: tuple[int, int]
) -> Tensor:
    """Returns the logits ``(K, H, W)`` of an image of ``size``: those of its windows, averaged where they overlap.

    ``windows`` are logits ``(K, h, w)`` in the order of :func:`cut_windows` with the same ``crop`` and ``stride``; as
    many as it cuts are taken.
    """
    height, width = max(size[0], crop[0]), max(size[1], crop[1])
    places = _places((height, width), crop, stride)
    logits = next(windows)
    if len(places) == 1:
        return logits[:, : size[0], : size[1]]
    total, count = logits.new_zeros(len(logits), height, width), logits.new_zeros(height, width)
    windows = itertools.chain(iter([logits]), windows)
    del logits  # as above: the next batch is computed in this loop
    for rows, columns in places:
        total[:, rows, columns] += next(windows)
        count[rows, columns] += 1
    return total.div_(count)[:, : size[0], : size[1]]


def _classes(windows: Iterator[Tensor], size: tuple[int, int], settings: TestSettings) -> Tensor:
    """Returns the likeliest classes ``(H, W)`` of an image, given the logits of all windows of all its views.

    The probabilities of several views are summed for the whole image, 4 bytes per class and pixel: 7 GB for 150 classes
    and 12 million pixels. Going band by band would take the logits of all views instead.
    """
    views = _views(size, settings)
    total: Tensor | None = None
    for view, mirrored, times in views:
        logits = merge_windows(windows, view, *settings.windows_of(view))
        dtype = torch.uint8 if len(logits) <= 256 else torch.int64
        if len(views) == 1:  # softmax would change nothing
            classes = torch.empty(size, dtype=dtype, device=logits.device)
            for rows, band in enlarged(logits, size):
                classes[rows] = band.argmax(dim=0)
            return classes
        total = logits.new_zeros(len(logits), *size) if total is None else total
        for rows, band in enlarged(logits, size):
            probabilities = band.softmax(dim=0)
            total[:, rows].add_(probabilities.flip(-1) if mirrored else probabilities, alpha=times)
    assert total is not None
    return total.argmax(dim=0).to(dtype)


def enlarged(logits: Tensor, size: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
    """Resizes logits ``(K, h, w)`` to ``size`` bilinearly, and yields bands: rows, and their logits ``(K, rows, W)``.

    Equals ``interpolate`` without ``align_corners``. All logits of 150 classes for a photograph, 12 million pixels,
    would take 7 GB.
    """
    height, width = size
    rows_at_once = max(1, BAND_PIXELS // width)
    if rows_at_once >= height:
        yield slice(0, height), F.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0]
        return
    for first in range(0, height, rows_at_once):
        rows = torch.arange(first, min(first + rows_at_once, height), device=logits.device, dtype=torch.float32)
        source = ((rows + 0.5) * (logits.shape[1] / height) - 0.5).clamp(min=0)  # pixel centres
        above = source.long()
        below = (above + 1).clamp(max=logits.shape[1] - 1)
        band = torch.lerp(logits[:, above], logits[:, below], (source - above)[:, None])  # (K, rows, w)
        band = F.interpolate(band[None], size=(len(rows), width), mode="bilinear", align_corners=False)[0]
        yield slice(first, first + len(rows)), band
