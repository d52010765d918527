"""One image, decoded and transformed the same way every time it is asked for."""

import contextlib
import logging
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.io import ImageReadMode
from torchvision.transforms.v2 import functional as F

from beit.data.index import ARRAYS, IndexedImage
from beit.data.index import ImageIndex as ImageIndex
from beit.data.index import Images as Images
from beit.data.index import index_images as index_images
from beit.data.preprocessing import COLOURS
from beit.errors import InputError, counted

logger = logging.getLogger(__name__)
_warned = set[str]()  # kinds of images

LABEL = "label"  # key of a sample's class id
UNREADABLE = "unreadable"  # key of a sample for the images that it had to replace
REPLACEMENT_TRIES = 20
EXIF_ORIENTATION = 0x0112
ARRAY = b"\x93NUMPY"  # how a .npy file begins, and below a TIFF file
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

ImageSource = str | os.PathLike[str] | IO[bytes] | IndexedImage  # a path, a file opened for reading, or in an index
Key = tuple[int, int]  # (epoch, index)
Transform = Callable[..., dict[str, Tensor]]  # (image, generator of the sample[, size in the file])
Read = tuple[Image.Image | Tensor, tuple[int, int] | None]  # an image, and (width, height) of its file if reduced
Reduction = Callable[[tuple[int, int]], int]

_STREAMS = {"sample": 0, "order": 1, "replacement": 2}


class UnreadableImageError(Exception):
    """An image file that cannot be decoded; the message is the reason."""


@dataclass(eq=False)
class ImageDataset(Dataset[dict[str, Any]]):
    """Transformed images, addressed by ``(epoch, index)``; a sample is the same whoever asks and whatever came before.

    Every random choice about a sample depends on ``(seed, epoch, index)``: the transform gets its own generator, and
    Python's, NumPy's and PyTorch's (CPU) global generators are seeded for it and restored after it.

    An image that cannot be read is replaced by another one, also chosen by ``(seed, epoch, index)``; if ``strict``, by
    a black one. The sample then has a key ``UNREADABLE`` for the loader to count: ``((index, reason), ...)``.

    The transform is called with an RGB image and a NumPy generator, and returns a dict of tensors. The image is
    Pillow's, or uint8 ``(3, h, w)`` for a transform with a true attribute ``takes_pixels``. A transform whose attribute
    ``in_chans`` is not 3 gets what :func:`read_channels` returns. With ``fast_decode``, JPEG
    files are decoded at a half, a quarter or an eighth of their size if the transform shows no more pixels than that,
    see :func:`read_pixels`; it must take pixels and have a method ``reduction``, and for a reduced image it gets a
    third argument, ``(width, height)`` of the file.
    """

    index: Images
    transform: Transform
    seed: int = 0
    labels: bool = False  # add a key LABEL: the class of the image that is shown, 0 without classes, int64 ()
    strict: bool = False  # label what stands for an unreadable image -1, so that an evaluation can leave it out
    fast_decode: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        transform = self.transform
        if self.fast_decode and not (hasattr(transform, "reduction") and getattr(transform, "takes_pixels", False)):
            raise ValueError(f"fast_decode needs a transform with a method reduction, not {type(transform).__name__}")
        if len(self.index) and self.index.path(0).endswith(ARRAYS) and getattr(transform, "in_chans", 3) == COLOURS:
            raise InputError(
                f"{self.index.path(0)} is an array, and the model is for 8-bit RGB: train one with --in_chans"
            )

    def __len__(self) -> int:
        return len(self.index)

    def name(self, index: int) -> str:
        """Returns what to call image ``index`` in a message."""
        return self.index.path(index)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        """Returns the sample ``(epoch, index)``.

        Raises :class:`InputError` if neither the image nor any of 20 drawn in its place can be read.
        """
        epoch, index = key
        (image, full_size), shown, unreadable = self._readable(epoch, index)
        with sample_randomness(self.seed, epoch, index) as rng:
            sample: dict[str, Any] = dict(self.transform(image, rng, *(() if full_size is None else (full_size,))))
        if self.labels:
            sample[LABEL] = torch.tensor(-1 if self.strict and unreadable else self.index.class_id(shown) or 0)
        if unreadable:
            sample[UNREADABLE] = unreadable
        return sample

    def __getitems__(self, keys: Sequence[Key]) -> list[dict[str, Any]]:
        """Returns several samples, restoring the global generators after the last one."""
        with kept_randomness():
            return [self[key] for key in keys]

    def _readable(self, epoch: int, index: int) -> tuple[Read, int, tuple[tuple[int, str], ...]]:
        unreadable: list[tuple[int, str]] = []
        candidate = index
        for attempt in range(1, REPLACEMENT_TRIES + 2):
            try:
                return self._read(candidate, epoch, index), candidate, tuple(unreadable)
            except UnreadableImageError as error:
                unreadable.append((candidate, str(error)))
            if self.strict:
                channels = getattr(self.transform, "in_chans", COLOURS)
                black = Image.new("RGB", (64, 64)) if channels == COLOURS else torch.zeros(channels, 64, 64)
                return (black, None), index, tuple(unreadable)
            stream = random_stream(self.seed, epoch, index, attempt, purpose="replacement")
            candidate = int(stream.integers(len(self)))
        reason = f"{self.name(index)} ({unreadable[0][1]})"
        raise InputError(f"{len(unreadable)} images in a row cannot be read, the first: {reason}")

    def _read(self, number: int, epoch: int, index: int) -> Read:
        """Decodes image ``number`` for the sample ``(epoch, index)``."""

        def reduction(full_size: tuple[int, int]) -> int:
            # With another generator in the same state as the transform's, from which nothing must be drawn here.
            return self.transform.reduction(full_size, _sample_generator(self.seed, epoch, index))  # type: ignore[attr-defined,no-any-return]

        try:
            file = self.index.file(number)
        except OSError as error:
            raise UnreadableImageError((error.strerror or str(error)).lower()) from error
        if (channels := getattr(self.transform, "in_chans", COLOURS)) != COLOURS:
            return read_channels(file, channels), None
        if isinstance(file, Image.Image):
            return file, None
        if getattr(self.transform, "takes_pixels", False):
            return read_pixels(file, reduction if self.fast_decode else None)
        return read_image(file), None


def random_stream(seed: int, *position: int, purpose: str) -> np.random.Generator:
    """Returns a generator for one place and purpose in a run; no two share numbers.

    A position is, for example, the epoch and the sample index; purposes are ``sample``, ``order`` and ``replacement``.
    """
    return np.random.default_rng(_seed_sequence(seed, position, purpose))


def _seed_sequence(seed: int, position: Sequence[int], purpose: str, *child: int) -> np.random.SeedSequence:
    # The purpose is not part of the entropy: (seed, epoch) and (seed, epoch, 0) would otherwise be the same.
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
    """Seeds the global generators (CPU only) from ``(seed, epoch, index)``, yields one for NumPy, and restores them.

    Inside :func:`kept_randomness` they are restored at the end of that block: it takes longer than seeding them.
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


def read_image(path: ImageSource) -> Image.Image:
    """Decodes an image to 8-bit RGB.

    Greys of more than 8 bits are scaled, not clipped at 255; transparent images are put on white.

    Deviation: a photograph is turned upright if its EXIF data ask for it, as every viewer does. The official code takes
    the pixels as stored; this affects a handful of images in ImageNet, and half of a folder of phone pictures.

    Raises:
        UnreadableImageError: The file is missing, damaged or no image, or has over 179 million pixels (Pillow's limit).
    """
    with opened_image(path) as image:
        return _decoded(image)


def read_pixels(path: ImageSource, reduction: Reduction | None = None) -> tuple[Tensor, tuple[int, int] | None]:
    """Decodes an image file as :func:`read_image` does, a JPEG file at a smaller scale where that is enough.

    ``reduction`` maps an image size ``(width, height)`` to the allowed downscale factor: 1, 2, 4 or 8. The decoder then
    computes only the lower frequencies. The views differ slightly from those of the whole image: the filter is another,
    and a region starts at a whole pixel of the reduced image, up to half a pixel of a view off.

    Returns uint8 ``(3, h, w)``, channels last in memory; and ``(width, height)`` of the file if it was reduced.
    """
    with opened_image(path) as image:
        full_size = None if reduction is None or image.format != "JPEG" else _reduce(image, reduction)
        pixels = _plain_jpeg(image) if full_size is None else None
        return F.pil_to_tensor(_decoded(image)) if pixels is None else pixels, full_size


@contextlib.contextmanager
def opened_image(path: ImageSource) -> Iterator[ImageFile.ImageFile]:
    """Opens an image file; any error in the block becomes an ``UnreadableImageError``, except for lack of memory."""
    with _decoding(), Image.open(path.file() if isinstance(path, IndexedImage) else path) as image:
        yield image


@contextlib.contextmanager
def _decoding() -> Iterator[None]:
    try:
        yield
    except (MemoryError, UnreadableImageError, InputError):
        raise
    except Exception as error:  # Pillow's decoders raise anything on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror.lower()
        elif "cannot identify image file" in reason:
            reason = "not an image, or an empty file"
        elif isinstance(error, Image.DecompressionBombError):
            reason = f"over {2e-6 * (Image.MAX_IMAGE_PIXELS or 0):.0f} million pixels: save a smaller copy"
        raise UnreadableImageError(reason) from error


def read_channels(source: ImageSource | Image.Image | NDArray, in_chans: int) -> Tensor:
    """Reads an image, or an array of one, of ``in_chans`` channels, float32 ``(C, h, w)``, with all its bits.

    Integers are divided by the largest number of their type (uint8 by 255, uint16 by 65535); floating point is taken as
    it is, NaN as 0. For one channel any image is converted to greys. More are read from ``.npy`` files, arrays
    ``(h, w, C)`` or ``(C, h, w)``, from TIFF files by tifffile, and from others with so many channels, such as RGBA.

    Raises:
        UnreadableImageError: It cannot be read, or has another number of channels.
        InputError: It is a TIFF file, and tifffile is missing.
    """
    with _decoding(), contextlib.ExitStack() as stack:
        values: NDArray
        if isinstance(source, np.ndarray):
            values = source
        elif isinstance(source, Image.Image):
            values = _bands(source, in_chans)
        else:
            source = source.file() if isinstance(source, IndexedImage) else source
            file = stack.enter_context(open(source, "rb")) if isinstance(source, (str, os.PathLike)) else source
            head = file.read(len(ARRAY))
            file.seek(0)
            if head == ARRAY:
                values = np.load(file, allow_pickle=False)
            elif head[:4] in TIFF and in_chans > 1:
                values = _read_tiff(file)
            else:
                values = _bands(stack.enter_context(Image.open(file)), in_chans)
        values = values[..., None] if values.ndim == 2 else values
        if values.ndim == 3 and values.shape[2] != in_chans == values.shape[0]:
            values = np.moveaxis(values, 0, -1)
        if values.ndim != 3 or values.shape[2] != in_chans or values.dtype.kind not in "buif" or not values.size:
            raise UnreadableImageError(
                f"it is {values.dtype} of shape {values.shape}, not of {counted(in_chans, 'channel')}"
            )
        if values.dtype.kind in "ui" and values.dtype.itemsize > 4:
            raise UnreadableImageError(f"it is {values.dtype}, whose scale nobody knows: save it with 8, 16 or 32 bits")
        largest = np.iinfo(values.dtype).max if values.dtype.kind in "ui" else 1
        floats = np.nan_to_num(np.moveaxis(values, -1, 0) / np.float64(largest), posinf=0.0, neginf=0.0)
        return torch.from_numpy(floats.astype(np.float32))


def _bands(image: Image.Image, in_chans: int) -> NDArray:
    """Returns the numbers of an upright image as Pillow has them, ``(h, w[, C])``."""
    image = upright(image)
    if in_chans == 1 and image.mode not in ("1", "L", "I", "F") and not image.mode.startswith("I;16"):
        image = image.convert("L")
    deep = image.mode == "I" and image.format in ("PNG", "PPM")  # 16 bits, in 32
    return np.asarray(image).astype(np.uint16) if deep else np.asarray(image)


def _read_tiff(file: IO[bytes]) -> NDArray:
    try:
        from tifffile import imread
    except ImportError as error:
        raise InputError("TIFF files of more than one channel are read with tifffile: pip install tifffile") from error
    return np.asarray(imread(file))


def _decoded(image: ImageFile.ImageFile) -> Image.Image:
    image.load()
    if 0 in image.size:
        raise UnreadableImageError("it has no pixels")
    if image.format == "TIFF" and (pages := getattr(image, "n_frames", 1)) > 1:
        text = "%s has %d pages, and only the first is read: with --in_chans, pages are channels"
        _warn_once("pages", text, image, pages)
    return to_rgb(upright(image))


def _warn_once(kind: str, text: str, image: Image.Image, *args: object) -> None:
    """Warns of the first image of a kind in a process, by the name of its file."""
    if kind not in _warned:
        _warned.add(kind)
        logger.warning(text, getattr(image, "filename", "") or "an image", *args)  # in a shard it has no file


def _plain_jpeg(image: ImageFile.ImageFile) -> Tensor | None:
    """Decodes an upright colour JPEG with torchvision, a quarter faster than Pillow; None for files left to Pillow."""
    if image.format != "JPEG" or image.mode != "RGB" or orientation(image) != 1 or image.fp is None:
        return None
    image.fp.seek(0)
    data = torch.frombuffer(bytearray(image.fp.read()), dtype=torch.uint8)
    try:
        # The operator, as its wrapper is deprecated in favour of TorchCodec, which would be another dependency.
        pixels: Tensor = torch.ops.image.decode_jpeg(data, ImageReadMode.UNCHANGED.value, False)
    except (AttributeError, RuntimeError):
        return None
    return pixels if pixels.shape == (3, image.height, image.width) else None


def _reduce(image: ImageFile.ImageFile, reduction: Reduction) -> tuple[int, int] | None:
    """Sets the scale at which to decode a JPEG file; returns its upright ``(width, height)``, None if not reduced."""
    size = image.size
    full_size = size[::-1] if orientation(image) in range(5, 9) else size
    by = reduction(full_size)
    if by > 1:
        image.draft(None, (size[0] // by, size[1] // by))  # type: ignore[arg-type]
    return None if image.size == size else full_size


def upright(image: Image.Image) -> Image.Image:
    """Turns a photograph upright if its EXIF data ask for it; see :func:`read_image`."""
    return ImageOps.exif_transpose(image) if orientation(image) in range(2, 9) else image


def orientation(image: Image.Image) -> int:
    """Returns how a photograph lies, from 1, upright, to 8, as its EXIF data have it."""
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
    """Scales greys of 16 or 32 bits or floating point to 8 bits, by the range that the numbers seem to have.

    For 16 bits that is 65535, else the first of 1 (for floats), 255 and 65535 that is exceeded by a tenth at most, as
    resampling may; what lies outside is clipped. Where that leaves nearly nothing of an image, a warning says so.
    """
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).any():
        raise UnreadableImageError("none of its values is finite")
    values = np.nan_to_num(values, posinf=0.0, neginf=0.0)
    largest = float(values.max())
    if image.mode.startswith("I;16") or image.format in ("PNG", "PPM"):
        full = 65535.0
    else:
        ranges = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        full = next((full for full in ranges if largest <= 1.1 * full), largest)
    if 0 < largest < full / 16 or values.min() < -0.1 * full or largest > 1.1 * 65535:
        text = (
            "%s has more than 8 bits (mode %s) and is black or cut off with 8: convert all such images to 8 bits alike"
        )
        _warn_once(image.mode, text, image, image.mode)
    grey = np.clip(values / full * 255, 0, 255).round().astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
