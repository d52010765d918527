"""One image, decoded and transformed the same way every time it is asked for."""

import contextlib
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.io import ImageReadMode
from torchvision.transforms.v2 import functional as F

from beit.data.index import EXTENSIONS, ImageIndex, index_images
from beit.errors import InputError

LABEL = "label"  # key of a sample's class id
UNREADABLE = "unreadable"  # key of a sample that tells which images it had to do without
REPLACEMENT_TRIES = 20
EXIF_ORIENTATION = 0x0112

Key = tuple[int, int]  # (epoch, index)
Transform = Callable[..., dict[str, Tensor]]  # (image, generator of the sample[, size in the file])
Read = tuple[Image.Image | Tensor, tuple[int, int] | None]  # an image, and (width, height) of its file if reduced
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
    "kept_randomness",
    "opened_image",
    "random_stream",
    "read_image",
    "read_pixels",
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
        transform: Called with an RGB image and a NumPy generator; returns a dict of tensors. The image is Pillow's, or
            uint8 ``(3, h, w)`` for a transform with a true attribute ``takes_pixels``.
        seed: Of the run.
        labels: Whether samples have a key ``LABEL``: the class of the image that is shown, int64 ``()``.
        strict: Whether the label of an image that another took the place of is -1, so that an evaluation can leave it
            out.
        fast_decode: Whether JPEG files are decoded at a half, a quarter or an eighth of their size where the transform
            shows no more of them: see :func:`read_pixels`. The transform must take pixels and have a method
            ``reduction``; it is called with a third argument, ``(width, height)`` of the file, for a reduced image.
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
        if fast_decode and not (hasattr(transform, "reduction") and getattr(transform, "takes_pixels", False)):
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
            sample: dict[str, Any] = dict(self.transform(image, rng, *(() if full_size is None else (full_size,))))
        if self.labels:
            sample[LABEL] = torch.tensor(-1 if self.strict and unreadable else self.index.class_id(shown))
        if unreadable:
            sample[UNREADABLE] = unreadable
        return sample

    def __getitems__(self, keys: Sequence[Key]) -> list[dict[str, Any]]:
        """Returns several samples; the global generators are restored after the last one."""
        with kept_randomness():
            return [self[key] for key in keys]

    def _readable(self, epoch: int, index: int) -> tuple[Read, int, tuple[tuple[int, str], ...]]:
        unreadable: list[tuple[int, str]] = []
        for attempt in range(REPLACEMENT_TRIES + 1):
            if attempt:
                stream = random_stream(self.seed, epoch, index, attempt, purpose="replacement")
                candidate = int(stream.integers(len(self)))
            else:
                candidate = index
            try:
                return self._read(candidate, epoch, index), candidate, tuple(unreadable)
            except UnreadableImageError as error:
                unreadable.append((candidate, str(error)))
        first, reason = unreadable[0]
        raise InputError(
            f"{len(unreadable)} images in a row cannot be read, the first: {self.index.path(first)} ({reason})"
        )

    def _read(self, number: int, epoch: int, index: int) -> Read:
        """Decodes image ``number``, wherever it is, to be the sample ``(epoch, index)``."""

        def reduction(full_size: tuple[int, int]) -> int:
            # Of a generator of its own in the state that the transform's will be in: nothing is drawn from that one.
            return self.transform.reduction(full_size, _sample_generator(self.seed, epoch, index))  # type: ignore[attr-defined,no-any-return]

        try:
            file = self.index.file(number)
        except OSError as error:
            raise UnreadableImageError((error.strerror or str(error)).lower()) from error
        if getattr(self.transform, "takes_pixels", False):
            return read_pixels(file, reduction if self.fast_decode else None)
        return read_image(file), None


def random_stream(seed: int, *position: int, purpose: str) -> np.random.Generator:
    """Returns the generator of one place in a run; places and purposes do not share numbers.

    Args:
        seed: Of the run.
        position: For example the epoch and the sample index, each 0 or more.
        purpose: ``sample``, ``order`` or ``replacement``.
    """
    return np.random.default_rng(_seed_sequence(seed, position, purpose))


def _seed_sequence(seed: int, position: Sequence[int], purpose: str, *child: int) -> np.random.SeedSequence:
    # The purpose stands apart from the entropy: (seed, epoch) and (seed, epoch, 0) would otherwise be the same.
    return np.random.SeedSequence((seed % 2**64, *position), spawn_key=(_STREAMS[purpose], *child))


@contextlib.contextmanager
def kept_randomness() -> Iterator[None]:
    """Restores the global generators (CPU only) at the end; does nothing inside another such block."""
    if _kept.get():
        yield
        return
    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()  # noqa: NPY002
    token = _kept.set(True)
    try:
        yield
    finally:
        _kept.reset(token)
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.default_generator.set_state(before[2])


_kept: ContextVar[bool] = ContextVar("_kept", default=False)


@contextlib.contextmanager
def sample_randomness(seed: int, epoch: int, index: int) -> Iterator[np.random.Generator]:
    """Seeds the global generators (CPU only) from ``(seed, epoch, index)``, and restores them at the end.

    Inside :func:`kept_randomness` that restores them: doing so for every sample takes longer than the seeding.

    Yields:
        A NumPy generator of the sample's own.
    """
    sequence = _seed_sequence(seed, (epoch, index), "sample")
    for_python, for_numpy, for_torch = sequence.generate_state(3).tolist()
    with kept_randomness():
        random.seed(for_python)
        np.random.seed(for_numpy)  # noqa: NPY002
        # torch.manual_seed would also seed, and on first use initialise, the GPUs.
        torch.default_generator.manual_seed(for_torch)
        yield _sample_generator(seed, epoch, index)


def _sample_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    return np.random.default_rng(_seed_sequence(seed, (epoch, index), "sample", 0))


def read_image(path: str | os.PathLike[str] | IO[bytes]) -> Image.Image:
    """Decodes an image file to 8-bit RGB.

    Greys of more than 8 bits are scaled, not cut off at 255; transparent images are laid on white.

    Deviation: a photograph whose EXIF data says that it lies on its side is turned upright, as every viewer shows it.
    The official code takes the pixels as stored; in ImageNet that concerns a handful of images, in a folder of phone
    pictures half of them.

    Args:
        path: The file, or one opened for reading.

    Raises:
        UnreadableImageError: The file is missing, empty, damaged, cut short or no image, or decodes to more than
            179 million pixels (Pillow's limit against decompression bombs).
    """
    with opened_image(path) as image:
        return _decoded(image)


def read_pixels(
    path: str | os.PathLike[str] | IO[bytes], reduction: Reduction | None = None
) -> tuple[Tensor, tuple[int, int] | None]:
    """Decodes an image file as :func:`read_image` does, a JPEG file at a smaller scale where that is enough.

    The decoder then computes only the lower frequencies. The views differ from those of the whole image, slightly: the
    filter is another, and a region begins at a whole pixel of the reduced image, up to half a pixel of a view off.

    Args:
        path: The file, or one opened for reading.
        reduction: Says of ``(width, height)`` in pixels by what an image may be reduced: 1, 2, 4 or 8; None for 1.

    Returns:
        uint8 ``(3, h, w)``, pixel by pixel in memory; and ``(width, height)`` of the file where it was reduced.

    Raises:
        UnreadableImageError: See :func:`read_image`.
    """
    with opened_image(path) as image:
        full_size = None if reduction is None or image.format != "JPEG" else _reduce(image, reduction)
        pixels = _plain_jpeg(image) if full_size is None else None
        return F.pil_to_tensor(_decoded(image)) if pixels is None else pixels, full_size


@contextlib.contextmanager
def opened_image(path: str | os.PathLike[str] | IO[bytes]) -> Iterator[ImageFile.ImageFile]:
    """Opens an image file; whatever fails in the block is an ``UnreadableImageError``, except for lack of memory."""
    try:
        with Image.open(path) as image:
            yield image
    except (MemoryError, UnreadableImageError):
        raise
    except Exception as error:  # Pillow's decoders fail on damaged files with whatever the damage leads to
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror.lower()
        elif "cannot identify image file" in reason:
            reason = "not an image, or an empty file"
        raise UnreadableImageError(reason) from error


def _decoded(image: ImageFile.ImageFile) -> Image.Image:
    image.load()
    if 0 in image.size:
        raise UnreadableImageError("it has no pixels")
    return to_rgb(upright(image))


def _plain_jpeg(image: ImageFile.ImageFile) -> Tensor | None:
    """Returns the pixels of an upright colour JPEG file; None for any other, and for one that is damaged.

    By torchvision's decoder, where there is one: the same library as Pillow's and the same pixels, but straight into a
    tensor, a quarter faster. What it refuses is left to Pillow, which knows what can be done or how to say what is
    wrong.
    """
    if image.format != "JPEG" or image.mode != "RGB" or _orientation(image) != 1 or image.fp is None:
        return None
    image.fp.seek(0)
    data = torch.frombuffer(bytearray(image.fp.read()), dtype=torch.uint8)
    try:
        # The operator, as the function around it warns that it will go: TorchCodec would be another dependency.
        pixels: Tensor = torch.ops.image.decode_jpeg(data, ImageReadMode.UNCHANGED.value, False)
    except (AttributeError, RuntimeError):
        return None
    return pixels if pixels.shape == (3, image.height, image.width) else None


def _reduce(image: ImageFile.ImageFile, reduction: Reduction) -> tuple[int, int] | None:
    """Sets the scale at which a JPEG file will be decoded.

    Returns:
        ``(width, height)`` of the whole image, upright; None if it will not be reduced.
    """
    size = image.size
    full_size = size[::-1] if _orientation(image) in range(5, 9) else size
    by = reduction(full_size)
    if by > 1:
        image.draft(None, (size[0] // by, size[1] // by))  # type: ignore[arg-type]
    return None if image.size == size else full_size


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
