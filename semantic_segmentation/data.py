"""Images with label maps: finding them, their classes, and samples for training and testing.

The layout is ADE20K's: a folder of images, a folder of label maps of the same names, and a ``classes.txt`` for classes
other than ADE20K's. A label map has 8 bits per pixel, greys or palette indices; 255 means no label.
"""

import colorsys
import hashlib
import logging
import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from beit.data.datasets import (
    ImageSource,
    Key,
    UnreadableImageError,
    opened_image,
    orientation,
    sample_randomness,
    upright,
)
from beit.data.hub import VALIDATION, names_hub, open_hub
from beit.data.index import IndexedImage, index_images
from beit.data.shards import names_shards
from beit.errors import InputError, counted, listed
from beit.inference import decoded
from semantic_segmentation.metrics import IGNORED

logger = logging.getLogger(f"beit.{__name__}")

CLASSES_FILE = "classes.txt"
LABEL_MAPS = (".png", ".tif", ".tiff", ".bmp")
CHECKED, MOST_CHECKED = 16, 512  # label maps; the latter while the last class is not seen
NO_CLASS = ("background", "_background_", "void", "unlabeled", "unlabelled", "ignore", "ignored", "none")
GREYS_SPREAD_BY = {"L;2": 85, "L;4": 17}  # Pillow spreads greys of 2 and 4 bits over 0 to 255
GOLDEN_RATIO = (5**0.5 - 1) / 2

CLASS_LINE = re.compile(r"(.*?\S)(?:\s+(\d+\s+\d+\s+\d+))?")
# Two or more numbers, with commas or in brackets, or an HTML colour: meant as a colour, but not accepted as one.
ALMOST_A_COLOUR = re.compile(r"((^|[\s,;(\[])-?[\d.]+[\s,;]+-?[\d.]+[)\]]?|#[0-9a-fA-F]{6})$")

Colour = tuple[int, int, int]  # red, green, blue, 0 to 255
# The image uint8 (3, h, w), the label map uint8 (h, w), the sample's generator.
Transform = Callable[[tv_tensors.Image, tv_tensors.Mask, np.random.Generator], dict[str, Tensor]]
PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class SegmentationClasses:
    """Names and colours of the classes, by label."""

    names: tuple[str, ...]
    colours: tuple[Colour, ...]

    def __len__(self) -> int:
        return len(self.names)


def read_classes(path: PathLike) -> SegmentationClasses:
    """Reads a list of classes, one per line in the order of the labels: a name and optionally a colour.

    A colour is three numbers from 0 to 255 after the name, separated by spaces or tabs; classes without one get
    distinct colours. Names may contain spaces. Empty lines and lines that begin with ``#`` are skipped.

    Raises:
        InputError: The file cannot be read, has no class or a duplicate, or a line is not valid.
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
                "from 0 to 255, separated by spaces"
            ) from error
        if name in line_of:
            raise InputError(f"{path} names the class {name!r} twice, in lines {line_of[name]} and {number}")
        line_of[name] = number
        colours.append(colour)
    if not line_of:
        raise InputError(f"the list of classes {path} is empty; it needs one name a line, in the order of the labels")
    return SegmentationClasses(tuple(line_of), _complete(colours))


def _parse_class(line: str) -> tuple[str, Colour | None]:
    """Splits a line into name and colour, or raises ``ValueError`` with the reason."""
    found = CLASS_LINE.fullmatch(line.strip())
    name, colour = found.groups() if found else (line, None)
    if colour is None:
        if ALMOST_A_COLOUR.search(name):
            raise ValueError("ends in something that is not quite a colour")
        return name, None
    red, green, blue = (int(number) for number in colour.split())
    if max(red, green, blue) > 255:
        raise ValueError("has a colour beyond 255")
    return name, (red, green, blue)


def named_classes(names: Sequence[str], colours: Sequence[Sequence[int]] = ()) -> SegmentationClasses:
    """Returns classes with the given colours, or with distinct ones unless there is one per name."""
    given = [(colour[0], colour[1], colour[2]) for colour in colours]
    return SegmentationClasses(tuple(names), _complete(given if len(given) == len(names) else [None] * len(names)))


def _complete(colours: Sequence[Colour | None]) -> tuple[Colour, ...]:
    """Returns the colours, with distinct new ones, neighbours far apart in hue, in place of those that are missing."""

    def colour(number: int) -> Colour:
        # Steps of the golden ratio cover the circle of hues evenly, however many there will be.
        hue, depth = number * GOLDEN_RATIO % 1, number % 3
        red, green, blue = colorsys.hsv_to_rgb(hue, (0.85, 0.55, 1.0)[depth], (0.95, 0.85, 0.6)[depth])
        return round(red * 255), round(green * 255), round(blue * 255)

    new = (each for each in dict.fromkeys(map(colour, range(4 * IGNORED))) if each not in colours)
    return tuple(next(new) if each is None else each for each in colours)


def ade20k_classes() -> SegmentationClasses:
    """Returns ADE20K's 150 classes in the order of its labels, in mmsegmentation's colours."""
    return read_classes(Path(__file__).with_name("ade20k.txt"))


def find_classes(
    data_root: PathLike, classes_file: PathLike = "", reduce_zero_label: bool = True
) -> SegmentationClasses:
    """Returns the classes of a data set: those of a file, else of its ``classes.txt``, else ADE20K's.

    ``reduce_zero_label`` is whether label 0 is ignored, as in ADE20K; a mismatch is logged as a warning, and so are
    ADE20K's names for a folder that is not its own. Raises as :func:`read_classes` does.
    """
    own = Path(data_root) / CLASSES_FILE
    if classes_file or own.exists():
        return read_classes(classes_file or own)
    classes, log = ade20k_classes(), logger.info if "ADE" in str(data_root) else logger.warning
    log("%s has no %s: using the %d classes of ADE20K; --classes names others", data_root, CLASSES_FILE, len(classes))
    if not reduce_zero_label:
        logger.warning("reduce_zero_label is off: label 0, ignored in ADE20K, is taken for %r", classes.names[0])
    return classes


@dataclass(frozen=True)
class ImagePairs:
    """Images and, if there are any, their label maps, from :func:`find_pairs`, which sorts files by name."""

    images: tuple[Path | IndexedImage, ...]
    labels: tuple[Path | IndexedImage, ...]
    root: Path

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """Returns the path of image ``index`` relative to the folder of images, without extension, or its number."""
        image = self.images[index]
        if isinstance(image, IndexedImage):
            return f"{image.number:08d}"
        return image.relative_to(self.root).with_suffix("").as_posix()

    def fingerprint(self) -> str:
        """Returns a hash of the images' names in their order, or that of a data set."""
        if self.images and isinstance(self.images[0], IndexedImage):
            return self.images[0].index.fingerprint()
        names = ascii([self.name(index) for index in range(len(self))])
        return hashlib.sha256(names.encode()).hexdigest()


def pairs_of(data_path: str, images: str, annotations: str | None, splits: Sequence[str] = VALIDATION) -> ImagePairs:
    """Lists images and label maps in two folders of a data set, or in two columns of one of Hugging Face."""
    if not names_hub(data_path):
        root = Path(data_path)
        return find_pairs(root / images, None if annotations is None else root / annotations)
    columns = [open_hub(data_path, splits, masks=masks) for masks in (False, *[True] * (annotations is not None))]
    rows = [tuple(IndexedImage(column, number) for number in range(len(column))) for column in columns]
    return ImagePairs(rows[0], (*rows, ())[1], Path(data_path))


def find_pairs(images_dir: PathLike, annotations_dir: PathLike | None = None) -> ImagePairs:
    """Lists the images below a folder with their label maps: that of ``a/b.jpg`` is ``a/b.png`` in ``annotations_dir``.

    Without ``annotations_dir`` only images are listed.

    Raises:
        InputError: A folder is missing or has no such files, or an image or a label map has no counterpart.
    """
    root, images = _by_stem(images_dir, "images")
    if annotations_dir is None:
        return ImagePairs(tuple(images.values()), (), root)
    labels_root, labels = _by_stem(annotations_dir, "label maps", LABEL_MAPS)
    problems = []
    for these, those, what, other in (
        (images, labels, f"images in {root}", "label map"),
        (labels, images, f"label maps in {labels_root}", "image"),
    ):
        if alone := [stem for stem in these if stem not in those]:
            problems.append(f"{len(alone)} of {len(these)} {what} have no {other}: {listed(alone)}")
    if problems:
        raise InputError(f"{'; '.join(problems)} (the label map of a.jpg is a{LABEL_MAPS[0]})")
    return ImagePairs(tuple(images.values()), tuple(labels[stem] for stem in images), root)


def _by_stem(folder: PathLike, what: str, extensions: tuple[str, ...] = ("",)) -> tuple[Path, dict[str, Path]]:
    """Returns a folder's absolute path, and the images below it by relative path without extension, sorted."""
    root = Path(os.path.abspath(os.path.expanduser(folder)))
    if names_shards(root) or root.is_file():
        raise InputError(
            f"{root} is not a folder: images with label maps are read from folders; give that of the {what}"
        )
    index = index_images(root)
    files: dict[str, Path] = {}
    for path in sorted(Path(index.path(i)) for i in range(len(index))):
        if path.name.lower().endswith(extensions):
            stem = unicodedata.normalize("NFC", path.relative_to(root).with_suffix("").as_posix())
            if stem in files:
                raise InputError(f"{files[stem]} and {path.name} would have the same label map: rename or remove one")
            files[stem] = path
    if not files:
        raise InputError(f"no label maps ({' '.join(extensions)}) in {root} or below, but images like {path.name}")
    return root, dict(sorted(files.items()))


def reduce_zero(labels: Tensor) -> Tensor:
    """Removes label 0, as ADE20K's benchmark does: 0 becomes 255, ``k`` (1 to 254) becomes ``k - 1``, 255 stays."""
    return torch.where((labels == 0) | (labels == IGNORED), IGNORED, labels - 1)


def read_labels(path: ImageSource) -> NDArray[np.uint8]:
    """Decodes a label map, uint8 ``(H, W)``: greys or palette indices as stored; greys of 16 bits if none is above 255.

    Raises:
        InputError: The file is missing, damaged or no image, or has colours, or labels above 255.
    """
    try:
        with opened_image(path) as image:
            packed = image.tile[0][3] if image.tile else ""
            image.load()
            mode, labels = image.mode, np.asarray(upright(image))
    except UnreadableImageError as error:
        raise InputError(f"cannot read the label map {path}: {error}") from error
    if mode not in ("1", "L", "P") and not mode.startswith("I"):
        what = "of floating-point numbers" if mode == "F" else f"a picture in colours ({mode})"
        needed = "that has a whole number per pixel, as greys or as a palette of 8 bits"
        raise InputError(f"{path} is {what}, not a label map: {needed}")
    if isinstance(packed, str) and packed in GREYS_SPREAD_BY:
        labels = labels // GREYS_SPREAD_BY[packed]
    if mode.startswith("I") and not 0 <= labels.min() <= labels.max() <= IGNORED:
        raise InputError(f"{path} has the label {labels.max()}; labels go from 0 to {IGNORED}, which is no class")
    return labels.astype(np.uint8)


def _upright_size(path: ImageSource) -> tuple[int, int]:
    """Returns the height and width of an image file, turned as its EXIF data ask for."""
    try:
        with opened_image(path) as image:
            # For EXIF data behind the pixels of a PNG file, Pillow would decode them.
            known = image.format != "PNG" or "exif" in image.info
            return image.size if known and orientation(image) > 4 else image.size[::-1]
    except UnreadableImageError as error:
        raise InputError(f"cannot read the image {path}: {error}") from error


def check_labels(pairs: ImagePairs, classes: SegmentationClasses, reduce_zero_label: bool) -> None:
    """Logs which labels there are and what each is called, and warns of what looks like a mistake.

    Of all files the headers are read. A random sample of the label maps, the same in every run, is read in full: 16, or
    up to 512 until the last class is seen, or all until any class is.

    Raises:
        InputError: Sizes differ, no pixel has a label, a label is no class, or a file cannot be read.
    """
    with ThreadPoolExecutor(8) as pool:  # its threads mostly wait for the disk
        sizes = zip(*(pool.map(_upright_size, paths) for paths in (pairs.images, pairs.labels)), strict=True)
        for index, (image, label) in enumerate(sizes):
            check_size(pairs, index, image, label)
    first, last = int(reduce_zero_label), len(classes) - 1 + int(reduce_zero_label)
    pixels, count = np.zeros(IGNORED + 1, dtype=np.int64), 0
    for count, index in enumerate(np.random.default_rng(0).permutation(len(pairs)), 1):
        labels = read_labels(pairs.labels[index])
        check_numbers(pairs.labels[index], labels, len(classes), reduce_zero_label)
        pixels += np.bincount(labels.ravel(), minlength=IGNORED + 1)
        if count >= CHECKED and (pixels[last] or (count >= MOST_CHECKED and pixels[first:IGNORED].any())):
            break
    where = f"{count} of {len(pairs)} label maps in {getattr(pairs.labels[0], 'parent', pairs.root)}"
    seen = np.flatnonzero(pixels).tolist()
    named = {label: f"{label} {classes.names[label - first]!r}" for label in seen if first <= label < IGNORED}
    if not named:
        none = "0 (unless you set reduce_zero_label=False) and 255 mean" if first else "255 means"
        raise InputError(
            f"no pixel has a label in {where}: there is only {' and '.join(map(str, seen))}, and {none} no label here; "
            f"write classes as {first}, {first + 1}, and so on"
        )
    shares = [f"{named.get(label, f'{label} (no class)')} {pixels[label] / pixels.sum():.1%}" for label in seen]
    logger.info("labels in %s: %s", where, listed(shares, most=30))
    doubts: dict[str, object] = {
        f"reduce_zero_label is on, so 0 ({pixels[0] / pixels.sum():.0%} of the pixels of {where}) is no class and 1 is "
        f"{classes.names[0]!r}: if 0 is a class, as the background is, name it first and set reduce_zero_label=False": (
            first and (not (pixels.argmax() or pixels[last]) or classes.names[0].casefold() in NO_CLASS)
        ),
        f"{min(named)} is the only class in {where}: write the object as 1, and set reduce_zero_label=False if 0 is a "
        "class": len(named) == 1,
        f"the last class, {last} {classes.names[-1]!r}, does not occur in {where}: see whether the names are in the "
        "order of the numbers, and whether 0 is a class": not pixels[last],
    }
    for doubt in (doubt for doubt, applies in doubts.items() if applies):
        logger.warning("%s", doubt)


def check_size(pairs: ImagePairs, index: int, image_size: tuple[int, ...], size: tuple[int, ...]) -> None:
    """Raises InputError if the upright image ``index`` and its label map differ in size, ``(H, W)`` each."""
    if size != image_size:
        hint = "; if its EXIF data rotate it, the labels must match the upright image" * (size == image_size[::-1])
        raise InputError(
            f"the label map {pairs.labels[index]} is {size[0]}x{size[1]} pixels (height x width), but its image "
            f"{pairs.images[index]} {image_size[0]}x{image_size[1]}{hint}"
        )


def check_numbers(path: ImageSource, labels: NDArray[np.uint8], num_classes: int, reduce_zero_label: bool) -> None:
    """Raises InputError if a number in a label map is none of the classes' and not 255."""
    first, largest = int(reduce_zero_label), int(labels[labels != IGNORED].max(initial=0))
    if largest < num_classes + first:
        return
    count = f"{counted(num_classes, 'class')} {'has' if num_classes == 1 else 'have'}"
    numbers = f"{first} to {num_classes - 1 + first} ({'0 and 255 are' if first else '255 is'} no class)"
    ade20k = not first and largest == num_classes
    hint = "; if 0 is no class, as in ADE20K, set reduce_zero_label" if ade20k else ""
    raise InputError(f"{path} has the label {largest}, but the {count} the labels {numbers}{hint}")


@dataclass(eq=False)
class SegmentationDataset(Dataset[dict[str, Any]]):
    """Images with their labels, addressed by ``(epoch, index)``: transformed for training, whole for testing.

    Every random choice about a sample follows from ``(seed, epoch, index)``, as in
    :class:`beit.data.datasets.ImageDataset`.

    Deviation: An unreadable image is not replaced but ends the run: hand-labelled data sets are small, and every image
    in them was looked at.

    Raises:
        InputError: There are no label maps or a single class to train on, or more classes than 8 bits can hold.
    """

    pairs: ImagePairs  # with label maps if there is a transform
    transform: Transform | None = None  # None for whole images as decoded
    seed: int = 0
    _: KW_ONLY
    num_classes: int  # labels are below it, or 255
    reduce_zero_label: bool  # whether label 0 in the files is ignored, see reduce_zero

    def __post_init__(self) -> None:
        most, training = IGNORED - int(self.reduce_zero_label), self.transform is not None
        if not 1 <= self.num_classes <= most:
            raise InputError(f"there can be 1 to {most} classes in label maps of 8 bits, got {self.num_classes}")
        if training and self.num_classes == 1:
            raise InputError("there is one class, so nothing to tell apart: name the others too, such as background")
        if training and not self.pairs.labels:
            raise InputError(f"training needs label maps; the images in {self.pairs.root} have none")

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        """Returns the path of image ``index``, for messages."""
        return str(self.pairs.images[index])

    def __getitem__(self, key: Key) -> dict[str, Any]:
        """Returns the sample ``(epoch, index)`` as transformed.

        Without a transform: ``image`` uint8 ``(3, H, W)``, ``label`` uint8 ``(H, W)``, 255 for none, and ``index``.

        Raises:
            InputError: The image or its label map cannot be read, they differ in size, or a label is no class.
        """
        epoch, index = key
        image = F.pil_to_tensor(decoded(self.pairs.images[index]))
        label = torch.full(image.shape[1:], IGNORED, dtype=torch.uint8)
        if self.pairs.labels:
            label = self._label(index, image)
        if self.transform is None:
            return {"image": image, "label": label, "index": index}
        with sample_randomness(self.seed, epoch, index) as rng:
            return dict(self.transform(tv_tensors.Image(image), tv_tensors.Mask(label), rng))

    def _label(self, index: int, image: Tensor) -> Tensor:
        path = self.pairs.labels[index]
        numbers = read_labels(path)
        check_size(self.pairs, index, tuple(image.shape[-2:]), numbers.shape)
        check_numbers(path, numbers, self.num_classes, self.reduce_zero_label)
        labels = torch.from_numpy(numbers)
        return reduce_zero(labels) if self.reduce_zero_label else labels
