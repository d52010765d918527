"""One image, decoded and transformed the same way every time it is asked for."""

import contextlib
import os
import random
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from beit.data.index import EXTENSIONS, ImageIndex, index_images
from beit.errors import InputError

LABEL = "label"  # key of a sample's class id
UNREADABLE = "unreadable"  # key of a sample that tells which images it had to do without
REPLACEMENT_TRIES = 20
EXIF_ORIENTATION = 0x0112

Key = tuple[int, int]  # (epoch, index)
Transform = Callable[[Image.Image, np.random.Generator], dict[str, Tensor]]
Reduction = Callable[[tuple[int, int]], int]

_STREAMS = {"sample": 0, "order": 1, "replacement": 2}

__all__ = [
    "EXTENSIONS",
    "LABEL",
    "UNREADABLE",
    "ImageDataset",
    "ImageIndex",
    "UnreadableImageError",
    "index_images",
    "random_stream",
    "read_image",
    "read_indexed",
    "read_reduced",
    "sample_randomness",
    "to_rgb",
    "upright",
]


class UnreadableImageError(Exception):
    """An image file that does not give an image; its text is the reason."""


class ImageDataset(Dataset[dict[str, Any]]):
    """Transformed images, addressed by ``(epoch, index)``, each the same whoever asks and whatever came before.

    Every random choice about a sample follows from ``(seed, epoch, index)``: the transform gets a generator of its
    own, and Python's, NumPy's and PyTorch's (CPU) global generators are seeded for it and restored after it.

    An image that cannot be read is replaced by another one, which also follows from ``(seed, epoch, index)``; the
    sample then has a key ``UNREADABLE``: ``((index, reason), ...)``, for the loader to count.

    Args:
        index: The images.
        transform: Called with an RGB image and a NumPy generator; returns a dict of tensors.
        seed: Of the run.
        labels: Whether samples have a key ``LABEL``: the class of the image that is shown, int64 ``()``.
        strict: Whether the label of an image that another took the place of is -1, so that an evaluation can leave it
            out.
        fast_decode: Whether JPEG files are decoded at a half, a quarter or an eighth of their size where the transform
            shows no more of them: see :func:`read_reduced`. The transform must have a method ``reduction``.
    """

    def __init__(
        self,
        index: ImageIndex,
        transform: Transform,
        seed: int = 0,
        labels: bool = False,
        strict: bool = False,
        *,
        fast_decode: bool = False,
    ) -> None:
        if fast_decode and not hasattr(transform, "reduction"):
            raise ValueError(f"{type(transform).__name__} cannot say how much of an image it shows")
        self.index = index
        self.transform = transform
        self.seed = seed
        self.labels = labels
        self.strict = strict
        self.fast_decode = fast_decode

    def __len__(self) -> int:
        return len(self.index)

    def name(self, index: int) -> str:
        """Returns the path of image ``index``, for messages."""
        return self.index.path(index)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        """Returns the sample ``(epoch, index)``.

        Raises:
            InputError: Neither the image nor any of 20 drawn in its place can be read.
        """
        epoch, index = key
        (image, full_size), shown, unreadable = self._readable(epoch, index)
        with sample_randomness(self.seed, epoch, index) as rng:
            if full_size == image.size:
                sample: dict[str, Any] = dict(self.transform(image, rng))
            else:
                sample = dict(self.transform(image, rng, full_size))  # type: ignore[call-arg]
        if self.labels:
            sample[LABEL] = torch.tensor(-1 if self.strict and unreadable else self.index.class_id(shown))
        if unreadable:
            sample[UNREADABLE] = unreadable
        return sample

    def _readable(
        self, epoch: int, index: int
    ) -> tuple[tuple[Image.Image, tuple[int, int]], int, tuple[tuple[int, str], ...]]:
        def reduction(full_size: tuple[int, int]) -> int:
            # Of a generator of its own in the state that the transform's will be in: nothing is drawn from that one.
            return self.transform.reduction(full_size, _sample_generator(self.seed, epoch, index))  # type: ignore[attr-defined,no-any-return]

        unreadable: list[tuple[int, str]] = []
        for attempt in range(REPLACEMENT_TRIES + 1):
            if attempt:
                stream = random_stream(self.seed, epoch, index, attempt, purpose="replacement")
                candidate = int(stream.integers(len(self)))
            else:
                candidate = index
            try:
                read = read_indexed(self.index, candidate, reduction if self.fast_decode else None)
                return read, candidate, tuple(unreadable)
            except UnreadableImageError as error:
                unreadable.append((candidate, str(error)))
        first, reason = unreadable[0]
        raise InputError(
            f"{len(unreadable)} images in a row cannot be read, the first: {self.index.path(first)} ({reason})"
        )


def random_stream(seed: int, *position: int, purpose: str) -> np.random.Generator:
    """Returns the generator of one place in a run; places and purposes do not share numbers.

    Args:
        seed: Of the run.
        position: For example the epoch and the sample index, each 0 or more.
        purpose: ``sample``, ``order`` or ``replacement``.
    """
    return np.random.default_rng(_seed_sequence(seed, position, purpose))


def _seed_sequence(seed: int, position: Sequence[int], purpose: str) -> np.random.SeedSequence:
    # The purpose stands apart from the entropy: (seed, epoch) and (seed, epoch, 0) would otherwise be the same.
    return np.random.SeedSequence((seed % 2**64, *position), spawn_key=(_STREAMS[purpose],))


@contextlib.contextmanager
def sample_randomness(seed: int, epoch: int, index: int) -> Iterator[np.random.Generator]:
    """Seeds the global generators (CPU only) from ``(seed, epoch, index)``, and restores them at the end.

    Yields:
        A NumPy generator of the sample's own.
    """
    sequence = _seed_sequence(seed, (epoch, index), "sample")
    for_python, for_numpy, for_torch = (int(word) for word in sequence.generate_state(3))
    # torch.manual_seed would also seed, and on first use initialise, the GPUs.
    generator = torch.default_generator
    before = random.getstate(), np.random.get_state(), generator.get_state()  # noqa: NPY002
    try:
        random.seed(for_python)
        np.random.seed(for_numpy)  # noqa: NPY002
        generator.manual_seed(for_torch)
        yield _sample_generator(seed, epoch, index)
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        generator.set_state(before[2])


def _sample_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    return np.random.default_rng(_seed_sequence(seed, (epoch, index), "sample").spawn(1)[0])


def read_indexed(
    index: ImageIndex, number: int, reduction: Reduction | None = None
) -> tuple[Image.Image, tuple[int, int]]:
    """Decodes an image of an index, wherever it is; see :func:`read_reduced`.

    Raises:
        UnreadableImageError: The image cannot be read.
    """
    try:
        file = index.file(number)
    except OSError as error:
        raise UnreadableImageError((error.strerror or str(error)).lower()) from error
    return read_reduced(file, reduction)


def read_image(path: str | os.PathLike[str] | IO[bytes]) -> Image.Image:
    """Decodes an image file to 8-bit RGB.

    Greys of more than 8 bits are scaled, not cut off at 255; transparent images are laid on white.

    Deviation: a photograph whose EXIF data says that it lies on its side is turned upright, as every viewer shows it.
    The official code takes the pixels as stored; in ImageNet that concerns a handful of images, in a folder of phone
    pictures half of them.

    Raises:
        UnreadableImageError: The file is missing, empty, damaged, cut short or no image, or decodes to more than
            179 million pixels (Pillow's limit against decompression bombs).
    """
    return read_reduced(path)[0]


def read_reduced(
    path: str | os.PathLike[str] | IO[bytes], reduction: Reduction | None = None
) -> tuple[Image.Image, tuple[int, int]]:
    """Decodes an image file to 8-bit RGB, a JPEG file at a smaller scale where that is enough.

    The decoder then computes only the lower frequencies. The views differ from those of the whole image, slightly: the
    filter is another, and a region begins at a whole pixel of the reduced image, up to half a pixel of a view off.

    Args:
        path: The file, or one opened for reading.
        reduction: Says of ``(width, height)`` in pixels by what an image may be reduced: 1, 2, 4 or 8; None for 1.

    Returns:
        The image, and ``(width, height)`` that it has in the file.

    Raises:
        UnreadableImageError: See :func:`read_image`.
    """
    try:
        with Image.open(path) as image:
            full_size = _reduce(image, reduction) if reduction is not None and image.format == "JPEG" else None
            image.load()
            if 0 in image.size:
                raise UnreadableImageError("it has no pixels")
            pixels = to_rgb(upright(image))
            return pixels, full_size or pixels.size
    except (MemoryError, UnreadableImageError):
        raise
    except Exception as error:  # Pillow's decoders fail on damaged files with whatever the damage leads to
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror.lower()
        elif "cannot identify image file" in reason:
            reason = "not an image, or an empty file"
        raise UnreadableImageError(reason) from error


def _reduce(image: ImageFile.ImageFile, reduction: Reduction) -> tuple[int, int]:
    """Sets the scale at which a JPEG file will be decoded; returns the whole size, as an upright image has it."""
    size = image.size
    full_size = size[::-1] if _orientation(image) in range(5, 9) else size  # (width, height)
    by = reduction(full_size)
    if by > 1:
        image.draft(None, (size[0] // by, size[1] // by))  # type: ignore[arg-type]
    return full_size


def upright(image: Image.Image) -> Image.Image:
    """Turns a photograph upright whose EXIF data says that it lies on its side; see :func:`read_image`."""
    return ImageOps.exif_transpose(image) if _orientation(image) in range(2, 9) else image


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # damaged metadata; the pixels are fine
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image of any mode to 8-bit RGB; see :func:`read_image`."""
    if image.mode == "F" or image.mode.startswith("I"):
        return _from_deep_grey(image)
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        colours = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), colours).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_deep_grey(image: Image.Image) -> Image.Image:
    """Scales greys of 16 or 32 bits or floating point to 8 bits, by the range the numbers were made for."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0.0, neginf=0.0)
    largest = float(values.max())
    if image.mode.startswith("I;16") or image.format in ("PNG", "PPM"):
        full = 65535.0
    else:
        ranges = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        full = next((full for full in ranges if largest <= full), largest)
    grey = np.clip(values / full * 255, 0, 255).round().astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
