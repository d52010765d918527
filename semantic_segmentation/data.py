"""Images with a label for every pixel: which there are, what the labels mean, and one of them, decoded and transformed.

The layout is ADE20K's: a folder of images, a folder of label maps with the same names as PNG files, and, for other
classes than ADE20K's, a ``classes.txt``. A label map has 8 bits a pixel, as greys or as a palette, of which the index
counts and not the colour. 255 means: no label.
"""

import colorsys
import itertools
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from beit.data.datasets import EXIF_ORIENTATION, Key, UnreadableImageError, read_image, sample_randomness, upright
from beit.data.index import index_images
from beit.data.shards import names_shards
from beit.errors import InputError, did_you_mean
from semantic_segmentation.metrics import IGNORED

logger = logging.getLogger(f"beit.{__name__}")

CLASSES_FILE = "classes.txt"
LABEL_MAPS = ".png"
NAMED = 3  # how many files a message names
LOOKED_AT = 16  # label maps, before the work begins
GREYS_SPREAD_BY = {"L;2": 85, "L;4": 17}  # Pillow spreads greys of 2 and 4 bits over 0 to 255
GOLDEN_RATIO = (5**0.5 - 1) / 2

CLASS_LINE = re.compile(r"(.*?\S)(?:\s+(\d+\s+\d+\s+\d+))?")
# Two numbers or more, with commas or in brackets, or as in HTML: meant as a colour, but not one that is read.
ALMOST_A_COLOUR = re.compile(r"((^|[\s,;(\[])-?[\d.]+[\s,;]+-?[\d.]+[)\]]?|#[0-9a-fA-F]{6})$")

Colour = tuple[int, int, int]  # red, green, blue, 0 to 255
Transform = Callable[[tv_tensors.Image, tv_tensors.Mask, np.random.Generator], dict[str, Tensor]]
Labels = TypeVar("Labels", Tensor, NDArray[Any])


@dataclass(frozen=True)
class SegmentationClasses:
    """What the labels mean: label ``k`` is ``names[k]``, drawn in ``colours[k]``."""

    names: tuple[str, ...]
    colours: tuple[Colour, ...]

    def __len__(self) -> int:
        return len(self.names)


def read_classes(path: str | os.PathLike[str]) -> SegmentationClasses:
    """Reads a list of classes, one a line in the order of the labels: its name, and its colour if wanted.

    A colour is three numbers from 0 to 255 after the name, separated by spaces or tabs; a class without one gets a
    colour that no other has. Names may contain spaces. Empty lines and lines that begin with ``#`` do not count.

    Raises:
        InputError: The file cannot be read, has no class, has one twice or more than 255, or a line is neither a name
            nor a name and a colour.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise InputError(f"cannot read the list of classes {path}: {(error.strerror or str(error)).lower()}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"the list of classes {path} is not a text file in UTF-8") from error
    line_of: dict[str, int] = {}
    colours: list[Colour | None] = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            name, colour = _parse_class(line)
        except ValueError as error:
            raise InputError(
                f"line {number} of {path}, {line.strip()!r}, {error}: write a name, or a name and red, green and blue "
                "from 0 to 255 with spaces between"
            ) from error
        if name in line_of:
            raise InputError(f"{path} names the class {name!r} twice, in lines {line_of[name]} and {number}")
        line_of[name] = number
        colours.append(colour)
    if not line_of:
        raise InputError(f"the list of classes {path} is empty; it needs one name a line, in the order of the labels")
    if len(line_of) > IGNORED:
        raise InputError(f"{path} has {len(line_of)} classes; labels of 8 bits have room for {IGNORED}")
    return SegmentationClasses(tuple(line_of), _complete(colours))


def _parse_class(line: str) -> tuple[str, Colour | None]:
    """Returns name and colour of a line.

    Raises:
        ValueError: It is neither a name nor a name and a colour; the text says what is wrong.
    """
    found = CLASS_LINE.fullmatch(line.strip())
    name, colour = found.groups() if found else (line, None)
    if colour is None:
        if ALMOST_A_COLOUR.search(name):
            raise ValueError("ends in what is not quite a colour")
        return name, None
    red, green, blue = (int(number) for number in colour.split())
    if max(red, green, blue) > 255:
        raise ValueError("has a colour beyond 255")
    return name, (red, green, blue)


def named_classes(names: Sequence[str], colours: Sequence[Sequence[int]] = ()) -> SegmentationClasses:
    """Returns classes with the colours given, or with different ones where they are not one for each name."""
    given = [(colour[0], colour[1], colour[2]) for colour in colours]
    return SegmentationClasses(
        tuple(names), tuple(given) if len(given) == len(names) else _complete([None] * len(names))
    )


def _complete(colours: Sequence[Colour | None]) -> tuple[Colour, ...]:
    """Returns the colours, with new ones, all different, in the place of those that are missing."""
    taken = {colour for colour in colours if colour is not None}
    new = (colour for colour in _distinct_colours() if colour not in taken)
    return tuple(next(new) if colour is None else colour for colour in colours)


def _distinct_colours() -> Iterator[Colour]:
    """Yields colours without end, each once, neighbours in the list far apart in hue."""
    seen: set[Colour] = set()
    for number in itertools.count():
        # Steps of the golden ratio fill the circle of hues evenly, however many there will be.
        hue, depth = number * GOLDEN_RATIO % 1, number % 3
        red, green, blue = colorsys.hsv_to_rgb(hue, (0.85, 0.55, 1.0)[depth], (0.95, 0.85, 0.6)[depth])
        colour = (round(red * 255), round(green * 255), round(blue * 255))
        if colour not in seen:
            seen.add(colour)
            yield colour


def ade20k_classes() -> SegmentationClasses:
    """Returns ADE20K's 150 classes in the order of its labels, with the colours in which mmsegmentation draws them."""
    return read_classes(Path(__file__).with_name("ade20k.txt"))


def find_classes(
    data_root: str | os.PathLike[str], classes_file: str | os.PathLike[str] = "", reduce_zero_label: bool = True
) -> SegmentationClasses:
    """Returns the classes of a data set: a file that is named, or its own ``classes.txt``, or else ADE20K's.

    Args:
        data_root: The folder of the data set.
        classes_file: What to read instead; empty looks into ``data_root``.
        reduce_zero_label: Whether label 0 is left out, as in ADE20K; only for a warning where the two do not agree.

    Raises:
        InputError: The list of classes cannot work; see :func:`read_classes`.
    """
    own = Path(data_root) / CLASSES_FILE
    if classes_file or own.exists():
        return read_classes(classes_file or own)
    classes = ade20k_classes()
    logger.info("%s has no %s: the classes are the %d of ADE20K", data_root, CLASSES_FILE, len(classes))
    if not reduce_zero_label:
        logger.warning("reduce_zero_label is off: label 0, which ADE20K leaves out, is taken for %r", classes.names[0])
    return classes


@dataclass(frozen=True)
class ImagePairs:
    """Images and their label maps, in the order of the images' names; made by :func:`find_pairs`.

    Attributes:
        images: Paths of the images.
        labels: Paths of the label maps, one for each image; empty where there are none.
        root: The folder of the images.
    """

    images: tuple[Path, ...]
    labels: tuple[Path, ...]
    root: Path

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """Returns the path of image ``index`` below the folder of images, without its extension."""
        return self.images[index].relative_to(self.root).with_suffix("").as_posix()


def find_pairs(images_dir: str | os.PathLike[str], annotations_dir: str | os.PathLike[str] | None = None) -> ImagePairs:
    """Lists the images of a folder, and of the folders below it, with their label maps.

    The label map of ``a/b.jpg`` is ``a/b.png`` in ``annotations_dir``.

    Args:
        images_dir: The folder of the images.
        annotations_dir: The folder of the label maps; ``None`` where there are none.

    Raises:
        InputError: A folder is missing or has no files of its kind, or an image and a label map are without the other.
    """
    root = _existing_folder(images_dir, "images")
    images = _by_stem(root)
    if annotations_dir is None:
        return ImagePairs(tuple(images.values()), (), root)
    labels_root = _existing_folder(annotations_dir, "label maps")
    labels = _by_stem(labels_root, LABEL_MAPS)
    alone = [stem for stem in images if stem not in labels]
    unused = [stem for stem in labels if stem not in images]
    problems = []
    if alone:
        problems.append(f"{len(alone)} of {len(images)} images in {root} have no label map: {_some(alone)}")
    if unused:
        problems.append(f"{len(unused)} of {len(labels)} label maps in {labels_root} have no image: {_some(unused)}")
    if problems:
        raise InputError(f"{'; '.join(problems)} (the label map of a.jpg is a{LABEL_MAPS})")
    return ImagePairs(tuple(images.values()), tuple(labels[stem] for stem in images), root)


def _existing_folder(folder: str | os.PathLike[str], what: str) -> Path:
    path = Path(os.path.abspath(os.path.expanduser(folder)))
    if names_shards(path):
        raise InputError(f"{path}: images with label maps are not read from tar shards; unpack the {what} to a folder")
    if not path.exists():
        try:
            siblings = os.listdir(path.parent)
        except OSError:  # not there either, or not ours to look into
            siblings = []
        missing = "" if siblings else f" ({path.parent} is missing or empty too)"
        raise InputError(f"no such folder of {what}: {path}{did_you_mean(path.name, siblings) or missing}")
    if not path.is_dir():
        raise InputError(f"{path} is not a folder; give the folder of the {what}")
    return path


def _by_stem(root: Path, extension: str = "") -> dict[str, Path]:
    """Returns the images below a folder by their path in it without extension, in the order of those.

    Raises:
        InputError: There are none, or two that differ in the extension alone.
    """
    index = index_images(root)
    files: dict[str, Path] = {}
    for path in sorted(Path(index.path(i)) for i in range(len(index))):
        if path.name.lower().endswith(extension):
            stem = path.relative_to(root).with_suffix("").as_posix()
            if stem in files:
                raise InputError(f"{files[stem]} and {path.name} would have the same label map: rename or remove one")
            files[stem] = path
    if not files:
        raise InputError(f"no label maps (*{extension}) in {root} or the folders below, but images like {path.name}")
    return dict(sorted(files.items()))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else "")


def reduce_zero(labels: Labels) -> Labels:
    """Leaves label 0 out, as ADE20K's benchmark does: 0 becomes 255, ``k`` becomes ``k - 1``, and 255 stays.

    Args:
        labels: A tensor or an array of whole numbers from 0 to 255, of any shape, which is not changed.
    """
    ignored = (labels == 0) | (labels == IGNORED)
    if isinstance(labels, Tensor):
        return torch.where(ignored, IGNORED, labels - 1)
    return np.where(ignored, IGNORED, labels - 1).astype(labels.dtype)


def read_labels(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """Decodes a label map: the greys, or the places in the palette, as they are in the file.

    Greys of 16 bits will do if none is above 255.

    Returns:
        uint8 ``(H, W)``.

    Raises:
        InputError: The file is missing, damaged or no image, or shows colours, or has labels above 255.
    """
    try:
        with Image.open(path) as image:
            packed = image.tile[0][3] if image.tile else ""
            image.load()
            mode, labels = image.mode, np.asarray(upright(image))
    except MemoryError:
        raise
    except Exception as error:  # as a decoder fails; read_image knows how to say why
        raise InputError(f"cannot read the label map {path}: {_reason(path, error)}") from error
    if mode not in ("1", "L", "P") and not mode.startswith("I"):
        raise InputError(
            f"{path} is a picture in colours ({mode}), not a label map: that has one number for each pixel, as greys "
            "or as a palette of 8 bits"
        )
    spread = GREYS_SPREAD_BY.get(packed) if isinstance(packed, str) else None
    if spread:
        labels = labels // spread
    if mode.startswith("I") and not 0 <= labels.min() <= labels.max() <= IGNORED:
        raise InputError(f"{path} has the label {labels.max()}; labels go from 0 to {IGNORED}, which is no class")
    return labels.astype(np.uint8)


def check_labels(pairs: ImagePairs, reduce_zero_label: bool) -> None:
    """Looks at a few label maps, spread over all: whether there is anything to learn from, or to test on.

    Args:
        pairs: Images with label maps.
        reduce_zero_label: Whether label 0 of the files is no class.

    Raises:
        InputError: No pixel has a label, or a label map cannot be read.
    """
    count = min(LOOKED_AT, len(pairs.labels))
    seen = np.zeros(IGNORED + 1, dtype=bool)
    for number in range(count):
        seen[read_labels(pairs.labels[number * len(pairs.labels) // count])] = True
    is_class = seen.copy()
    is_class[[0, IGNORED] if reduce_zero_label else [IGNORED]] = False
    such_as = f"{pairs.labels[0]} and {count - 1} more that were looked at" if count > 1 else str(pairs.labels[0])
    if not is_class.any():
        held = " and ".join(map(str, np.flatnonzero(seen)))
        first, none = (1, "0 (with reduce_zero_label) and 255 mean") if reduce_zero_label else (0, "255 means")
        hint = "; if 0 is a class, set reduce_zero_label=False" if reduce_zero_label else ""
        raise InputError(
            f"no pixel has a label in {such_as}: there is only {held}, and {none} no label here; write classes as "
            f"{first}, {first + 1}, and so on{hint}"
        )
    if is_class.sum() < 2 and seen[IGNORED]:
        logger.warning(
            "%d is the only class in %s, beside %d: %d means no label here; write the object as 1, and set "
            "reduce_zero_label=False where 0 is a class",
            np.flatnonzero(is_class)[0],
            such_as,
            IGNORED,
            IGNORED,
        )


def _reason(path: str | os.PathLike[str], error: Exception) -> str:
    try:
        read_image(path)
    except UnreadableImageError as unreadable:
        return str(unreadable)
    return " ".join(str(error).split()) or type(error).__name__


@dataclass(frozen=True)
class _Reader:
    """Reads images and label maps, and looks whether they can be what they are said to be."""

    pairs: ImagePairs
    num_classes: int
    reduce_zero_label: bool

    def __post_init__(self) -> None:
        most = IGNORED - int(self.reduce_zero_label)
        if not 1 <= self.num_classes <= most:
            raise InputError(f"there can be 1 to {most} classes in label maps of 8 bits, got {self.num_classes}")

    def image(self, index: int) -> Tensor:
        """Returns image ``index``, uint8 ``(3, H, W)``."""
        path = self.pairs.images[index]
        try:
            return F.pil_to_tensor(read_image(path))
        except UnreadableImageError as error:
            raise InputError(f"cannot read the image {path}: {error}") from error

    def label(self, index: int, image: Tensor) -> Tensor:
        """Returns the label map of image ``index``, uint8 ``(H, W)``, 255 where there is no label."""
        path = self.pairs.labels[index]
        labels = read_labels(path)
        if labels.shape != tuple(image.shape[-2:]):
            raise InputError(self._another_size(index, labels.shape, tuple(image.shape[-2:])))
        if self.reduce_zero_label:
            labels = reduce_zero(labels)
        if (strange := labels[(labels >= self.num_classes) & (labels != IGNORED)]).size:
            raise InputError(self._strange_label(path, int(strange.max())))
        return torch.from_numpy(labels)

    def _another_size(self, index: int, size: tuple[int, ...], image_size: tuple[int, ...]) -> str:
        path = self.pairs.images[index]
        with Image.open(path) as image:
            turned = image.getexif().get(EXIF_ORIENTATION, 1) > 4
        hint = "; its EXIF data say that it lies on its side, and the labels must be of the upright image"
        return (
            f"the label map {self.pairs.labels[index]} is {size[0]}x{size[1]} pixels (height x width), but its image "
            f"{path} {image_size[0]}x{image_size[1]}{hint if turned and size == image_size[::-1] else ''}"
        )

    def _strange_label(self, path: Path, label: int) -> str:
        first = int(self.reduce_zero_label)
        count = "1 class has" if self.num_classes == 1 else f"{self.num_classes} classes have"
        without = "0 and 255 are" if first else "255 is"
        hint = ""
        if not first and label == self.num_classes:
            hint = "; if 0 is no class, as in ADE20K, set reduce_zero_label"
        return (
            f"{path} has the label {label + first}, but the {count} the labels {first} to "
            f"{self.num_classes - 1 + first} ({without} no class){hint}"
        )


class SegmentationDataset(Dataset[dict[str, Any]]):
    """Transformed images and labels, addressed by ``(epoch, index)``, each the same whoever asks.

    Every random choice about a sample follows from ``(seed, epoch, index)``, as in
    :class:`beit.data.datasets.ImageDataset`.

    Deviation: an image that cannot be read is not replaced by another one but ends the run: a data set with labels
    drawn by hand has few images, and each was looked at.

    Args:
        pairs: Images with label maps.
        transform: Called with the image uint8 ``(3, h, w)``, the label map uint8 ``(h, w)`` and the sample's NumPy
            generator; returns a dict of tensors.
        seed: Of the run.
        num_classes: Labels are below it, or 255.
        reduce_zero_label: Whether label 0 of the files is no class; see :func:`reduce_zero`.

    Raises:
        InputError: There are no label maps, or more classes than a label map can tell apart.
    """

    def __init__(
        self,
        pairs: ImagePairs,
        transform: Transform,
        seed: int = 0,
        *,
        num_classes: int,
        reduce_zero_label: bool,
    ) -> None:
        if not pairs.labels:
            raise InputError(f"training needs label maps; the images in {pairs.root} come without")
        self.pairs, self.transform, self.seed = pairs, transform, seed
        self._reader = _Reader(pairs, num_classes, reduce_zero_label)

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        """Returns the path of image ``index``, for messages."""
        return str(self.pairs.images[index])

    def __getitem__(self, key: Key) -> dict[str, Any]:
        """Returns the sample ``(epoch, index)``.

        Raises:
            InputError: The image or its label map cannot be read, they differ in size, or a label is of no class.
        """
        epoch, index = key
        image = self._reader.image(index)
        label = self._reader.label(index, image)
        with sample_randomness(self.seed, epoch, index) as rng:
            return dict(self.transform(tv_tensors.Image(image), tv_tensors.Mask(label), rng))


class TestImages(Dataset[tuple[str, Tensor, Tensor | None]]):
    """Whole images as decoded, with their names and, where there are any, their labels: for testing.

    Args:
        pairs: Images, with label maps or without.
        num_classes: Labels are below it, or 255.
        reduce_zero_label: Whether label 0 of the files is no class; see :func:`reduce_zero`.
    """

    __test__ = False  # to pytest a class of this name is a test

    def __init__(self, pairs: ImagePairs, *, num_classes: int, reduce_zero_label: bool) -> None:
        self.pairs = pairs
        self._reader = _Reader(pairs, num_classes, reduce_zero_label)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[str, Tensor, Tensor | None]:
        """Returns name, image uint8 ``(3, H, W)`` and label map uint8 ``(H, W)`` (or None) of image ``index``.

        Raises:
            InputError: As for training.
        """
        image = self._reader.image(index)
        return self.pairs.name(index), image, self._reader.label(index, image) if self.pairs.labels else None
