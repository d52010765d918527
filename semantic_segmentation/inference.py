"""From an image of any size to the class of each of its pixels: at once, in windows, in several sizes, mirrored."""

import contextlib
import itertools
import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from beit.checkpoints.formats.segmentation import ADE20K_CLASSES
from beit.data.transforms import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, IMAGENET_INCEPTION_MEAN, normalize
from beit.errors import InputError
from beit.training.precision import Precision
from semantic_segmentation.modeling import Segmentor, at_size
from semantic_segmentation.transforms import fit_size, resize, scaled

logger = logging.getLogger(f"beit.{__name__}")

TEST_MODES = ("slide", "whole")
COARSEST_STRIDE = 32  # a smaller image leaves the last level of the pyramid empty
BAND_PIXELS = 1 << 20  # pixels whose logits are enlarged at once: 630 MB of them for 150 classes
MOST_HELD_BYTES = 2 << 30  # of position biases: those of ViT-L at 512 pixels, 1.6 GB in float32, are kept

Key = TypeVar("Key")  # what an image is known by
Corner = tuple[int, int]  # top and left of a window


class Statistics(NamedTuple):
    """Mean and standard deviation of each channel, for images in [0, 1]: what images are normalised with."""

    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN
    std: Sequence[float] = IMAGENET_DEFAULT_STD


def statistics_of(metadata: Mapping[str, Any], num_classes: int) -> Statistics:
    """Returns what a segmentor learnt with: as its checkpoint records, else ImageNet's, as the published ones.

    transformers' copies of the published segmentors record a mean of 0.5, its default when they were converted. Their
    weights learnt with ImageNet's, so a segmentor of ADE20K's 150 classes in its format is not believed about 0.5.

    Args:
        metadata: From :func:`beit.checkpoints.read.read_weights`.
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
        batch_size: Windows at once, also of several images; of whole images, as many pixels. It changes speed and
            memory, not the result.

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
    """Predicts the class of each pixel of an image; of several, :func:`predict_each` does it faster.

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
    """
    ((_, classes),) = predict_each(segmentor, [(None, image)], settings, mean=mean, std=std, precision=precision)
    return classes


def predict_each(
    segmentor: Segmentor,
    images: Iterable[tuple[Key, Tensor]],
    settings: TestSettings,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    precision: Precision,
) -> Generator[tuple[Key, Tensor], None, None]:
    """Predicts the class of each pixel of images, whose windows go through the segmentor together.

    For each size, and for the mirrored image where asked, the logits are resized to the image's own size, and their
    softmax is averaged. Nothing waits for the device.

    Args:
        segmentor: As for :func:`predict`.
        images: Images with whatever they are to be known by. A few are taken ahead: as many as a batch has windows.
        settings: As for :func:`predict`.
        mean: As for :func:`predict`.
        std: As for :func:`predict`.
        precision: As for :func:`predict`.

    Yields:
        In the order of the images, what they are known by, and what :func:`predict` returns.

    Source: mmsegmentation 0.11, ``MultiScaleFlipAug`` and ``EncoderDecoder.aug_test``.
    """
    segmentor.eval()
    device = next(segmentor.parameters()).device
    begun: deque[tuple[Key, _Prediction]] = deque()

    def windows() -> Iterator[_Window]:
        for key, image in images:
            prediction = _Prediction(image.to(device, non_blocking=True), settings, Statistics(mean, std))
            begun.append((key, prediction))
            yield from prediction.windows()

    with _biases_held(segmentor, settings, precision):
        for batch in _batches(windows(), settings.batch_size * math.prod(settings.crop)):
            _answer(segmentor, batch, precision)
            while begun and (classes := begun[0][1].classes) is not None:
                yield begun.popleft()[0], classes.clone()  # made here, it is no inference tensor, and may be changed


@contextlib.contextmanager
def _biases_held(segmentor: Segmentor, settings: TestSettings, precision: Precision) -> Iterator[None]:
    """Keeps the position biases of windows where they leave room in memory; whole images have each its own."""
    size = _model_size(segmentor, settings.crop)
    backbone = segmentor.backbone
    tokens = 1 + math.prod(size) // math.prod(backbone.patch_embed.patch_size)
    needed = backbone.get_num_layers() * backbone.num_heads * tokens**2 * precision.dtype.itemsize
    with contextlib.ExitStack() as held:
        if settings.mode == "slide" and needed <= MOST_HELD_BYTES:
            with precision.autocast():
                held.enter_context(at_size(segmentor, size).backbone.holding_biases())
        yield


class _Window(NamedTuple):
    """A piece of a view: its normalised pixels ``(3, h, w)``, and what takes its logits ``(K, h, w)``."""

    pixels: Tensor
    take: Callable[[Tensor], None]


def _batches(windows: Iterable[_Window], most_pixels: int) -> Iterator[list[_Window]]:
    """Yields neighbours of one size together: as many as have so many pixels, and at least one."""
    batch: list[_Window] = []
    for window in windows:
        if batch and (
            window.pixels.shape != batch[0].pixels.shape
            or (len(batch) + 1) * math.prod(window.pixels.shape[1:]) > most_pixels
        ):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


@torch.inference_mode()
def _answer(segmentor: Segmentor, batch: Sequence[_Window], precision: Precision) -> None:
    with precision.autocast():
        logits = whole(segmentor, torch.stack([window.pixels for window in batch]))
    for window, own in zip(batch, logits, strict=True):  # one by one, so that a sum has one order
        window.take(own)


class _Prediction:
    """The class of each pixel of an image, once all windows of its views are answered.

    Args:
        image: uint8 ``(3, H, W)``.
        settings: Sizes, windows, flip.
        statistics: What images are normalised with.

    Attributes:
        classes: ``(H, W)``; None until then.
    """

    def __init__(self, image: Tensor, settings: TestSettings, statistics: Statistics) -> None:
        self.classes: Tensor | None = None
        self._image, self._settings, self._statistics = image, settings, statistics
        # With a bound on the short side several ratios come to the same size, which need not be computed again.
        sizes = Counter(view_sizes((image.shape[-2], image.shape[-1]), settings))
        mirrored = (False, True) if settings.flip else (False,)
        self._views = [(size, mirror, times) for size, times in sizes.items() for mirror in mirrored]
        self._left = len(self._views)
        self._total: Tensor | None = None

    def windows(self) -> Iterator[_Window]:
        """Yields the windows of all views; a view is made when its turn comes."""
        for size, mirrored, times in self._views:
            mosaic = _Mosaic(self._view(size, mirrored), *_window_of(size, self._settings))
            for corner in mosaic.corners:
                yield _Window(mosaic.window(corner), partial(self._take, mosaic, corner, mirrored, times))

    @torch.inference_mode()
    def _view(self, size: tuple[int, int], mirrored: bool) -> Tensor:
        resized = resize(self._image, size)
        return normalize((resized.flip(-1) if mirrored else resized)[None], *self._statistics)[0]

    def _take(self, mosaic: "_Mosaic", corner: Corner, mirrored: bool, times: int, logits: Tensor) -> None:
        mosaic.add(corner, logits)
        if mosaic.missing:
            return
        self._left -= 1
        size = (self._image.shape[-2], self._image.shape[-1])
        if len(self._views) == 1:
            self.classes = _likeliest(mosaic.mean(), size)
            return
        self._total = _with_probabilities(self._total, mosaic.mean(), size, mirrored, times)
        if not self._left:
            self.classes = self._total.argmax(dim=0).to(_class_dtype(len(self._total)))


def _window_of(size: tuple[int, int], settings: TestSettings) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns height and width of the windows of a view, and the steps between them."""
    return (size, size) if settings.mode == "whole" else (settings.crop, settings.stride)


def view_sizes(size: tuple[int, int], settings: TestSettings) -> list[tuple[int, int]]:
    """Returns the height and width in which an image of some height and width is tested, for each ratio."""
    return [fit_size(size, scaled(settings.image_scale, ratio), settings.short_at_least) for ratio in settings.ratios]


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
    size = _model_size(segmentor, (height, width))
    logits = at_size(segmentor, size).segment(_padded(images, size)).float()
    return logits[..., :height, :width]


def _model_size(segmentor: Segmentor, size: tuple[int, int]) -> tuple[int, int]:
    """Returns the least height and width that the model takes, of at least ``size``."""
    rows, columns = (
        math.ceil(max(side, COARSEST_STRIDE) / patch) * patch
        for side, patch in zip(size, segmentor.backbone.patch_embed.patch_size, strict=True)
    )
    return rows, columns


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
    mosaic = _Mosaic(image[0], crop, stride)
    for first in range(0, len(mosaic.corners), batch_size):
        corners = mosaic.corners[first : first + batch_size]
        logits = whole(segmentor, torch.stack([mosaic.window(corner) for corner in corners]))
        for corner, window in zip(corners, logits, strict=True):
            mosaic.add(corner, window)
    return mosaic.mean()[None]


class _Mosaic:
    """A view cut into windows, and the mean of the logits that come back for them.

    Args:
        view: Normalised, ``(3, H, W)``.
        crop: As for :func:`slide`.
        stride: As for :func:`slide`.

    Attributes:
        corners: Top and left of each window.
        missing: Windows whose logits have not come back.
    """

    def __init__(self, view: Tensor, crop: tuple[int, int], stride: tuple[int, int]) -> None:
        self._size, self._crop = view.shape[-2:], crop
        self._padded = _padded(view, (max(view.shape[-2], crop[0]), max(view.shape[-1], crop[1])))
        self._tops, self._lefts = (
            window_starts(*sides) for sides in zip(self._padded.shape[-2:], crop, stride, strict=True)
        )
        self.corners: list[Corner] = list(itertools.product(self._tops, self._lefts))
        self.missing = len(self.corners)
        self._total: Tensor | None = None

    def window(self, corner: Corner) -> Tensor:
        """Returns a window, ``(3, h, w)``."""
        return self._padded[self._place(corner)]

    def add(self, corner: Corner, logits: Tensor) -> None:
        """Takes the logits ``(K, h, w)`` of a window; in whatever batches they come, it is one after the other."""
        self.missing -= 1
        if len(self.corners) == 1:
            self._total = logits
            return
        if self._total is None:  # the number of classes is known after the first windows
            self._total = logits.new_zeros(len(logits), *self._padded.shape[-2:])
        self._total[self._place(corner)] += logits

    def mean(self) -> Tensor:
        """Returns the mean over the windows that a pixel is in, ``(K, H, W)``; once, when all have come back."""
        assert self._total is not None
        assert not self.missing
        if len(self.corners) > 1:
            rows, columns = (
                _cover(starts, crop, length, self._total)
                for starts, crop, length in zip(
                    (self._tops, self._lefts), self._crop, self._total.shape[-2:], strict=True
                )
            )
            self._total /= rows[:, None] * columns
        return self._total[..., : self._size[0], : self._size[1]]

    def _place(self, corner: Corner) -> tuple[Any, ...]:
        return ..., *(slice(start, start + side) for start, side in zip(corner, self._crop, strict=True))


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
def _likeliest(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns the likeliest class by the logits ``(K, h, w)`` of one view: softmax would change nothing."""
    classes = torch.empty(size, dtype=_class_dtype(len(logits)), device=logits.device)
    for rows, band in enlarged(logits, size):
        classes[rows] = band.argmax(dim=0)
    return classes


def _with_probabilities(
    total: Tensor | None, logits: Tensor, size: tuple[int, int], mirrored: bool, times: int
) -> Tensor:
    """Adds the probabilities of a view, which count ``times`` times, to the sum over views ``(K, H, W)``.

    It is held for the whole image, 4 bytes for each class and pixel: 7 GB for 150 classes and 12 million pixels. To go
    band by band here too, the logits of all views would have to be kept.
    """
    if total is None:
        total = logits.new_zeros(len(logits), *size)
    for rows, band in enlarged(logits, size):
        probabilities = band.softmax(dim=0)
        total[:, rows].add_(probabilities.flip(-1) if mirrored else probabilities, alpha=times)
    return total


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
    if tuple(logits.shape[1:]) == size:
        yield slice(0, height), logits
        return
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
