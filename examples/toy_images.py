"""Images made on the spot: scenes of textured shapes, with masks if wanted; crops of photographs; handwritten digits.

They are for demonstrations and tests: small, free, the same on every machine for the same seed, and with enough
structure that a model which sees half of an image can tell what the other half holds.
"""

import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from beit.data.transforms import size_pair
from beit.errors import InputError, did_you_mean

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels
Field = NDArray[np.floating]  # (h, w), 0 to 1: how much of a texture's second colour a pixel has

SUPERSAMPLING = 4  # shapes are drawn this many times larger, then reduced, for smooth edges
JPEG_QUALITY = 92
MOST_DRAWS = 20
DIGIT_SIDE = 8

# Sixteen clearly different colours; every use varies them a little.
PALETTE = np.array(
    [
        (214, 57, 51), (240, 138, 40), (247, 205, 70), (120, 178, 62), (38, 124, 82), (52, 168, 176), (55, 110, 190),
        (44, 52, 122), (120, 72, 160), (205, 92, 150), (128, 84, 52), (214, 176, 132), (242, 238, 226), (160, 162, 168),
        (84, 90, 100), (28, 28, 34),
    ],
    dtype=np.float32,
)  # fmt: skip

# In scikit-image's wheel, each with the side at which a third of it is held out.
PHOTOGRAPHS = {
    "astronaut.png": "left",
    "chelsea.png": "left",
    "coffee.png": "left",
    "ihc.png": "bottom",
    "motorcycle_left.png": "right",
    "retina.jpg": "left",
    "rocket.jpg": "left",
}
HELD_OUT_SHARE = 1 / 3
CROP_SHARES = (0.25, 0.8)  # side of a crop, of the photograph's shorter side
DULL_DEVIATION = 14.0  # of a crop's grey levels, below which another is drawn
BLACK, BLACK_SHARE = 12, 0.25  # a crop of which so much is darker than this is dull as well: the border of retina.jpg


# Shapes: the outline as polygons, for a shape of radius 1 around (0, 0). A second polygon is a hole.


def _regular(corners: int, radius: float = 1.0, turn: float = -math.pi / 2) -> NDArray[np.float64]:
    angles = turn + 2 * math.pi * np.arange(corners) / corners
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _star(points: int, inner: float) -> NDArray[np.float64]:
    outline = _regular(2 * points)
    outline[1::2] *= inner
    return outline


def _cross(arm: float) -> NDArray[np.float64]:
    quarter = np.array([(arm, -1), (arm, -arm), (1, -arm)])
    turn = np.array([(0, 1), (-1, 0)])
    return np.concatenate([quarter @ np.linalg.matrix_power(turn, k) for k in range(4)])


def _crescent() -> NDArray[np.float64]:
    outer = np.linspace(0.3 * math.pi, 1.7 * math.pi, 40)
    x, y = math.cos(outer[0]), math.sin(outer[0])
    centre, radius = x + 0.1, math.hypot(0.1, y)
    inner = np.linspace(math.atan2(-y, x - centre), math.atan2(y, x - centre) - 2 * math.pi, 40)
    arcs = (np.cos(outer), np.sin(outer)), (centre + radius * np.cos(inner), radius * np.sin(inner))
    return np.concatenate([np.stack(arc, axis=1) for arc in arcs])


OUTLINES: dict[str, tuple[NDArray[np.float64], ...]] = {
    "crescent": (_crescent(),),
    "cross": (_cross(0.36),),
    "disc": (_regular(48, 0.92),),
    "hexagon": (_regular(6),),
    "ring": (_regular(48), _regular(48, 0.5)),
    "square": (_regular(4, 1.1, math.pi / 4),),
    "star": (_star(5, 0.42),),
    "triangle": (_regular(3, 1.1),),
}
SHAPES = tuple(OUTLINES)


# Textures: fields over coordinates x, y in units of the scene's shorter side.


def _plain(x: Field, _y: Field, _rng: np.random.Generator) -> Field:
    return np.zeros_like(x)


def _stripes(x: Field, _y: Field, rng: np.random.Generator) -> Field:
    return _square_wave(x / rng.uniform(0.13, 0.26) + rng.random())


def _checks(x: Field, y: Field, rng: np.random.Generator) -> Field:
    period = rng.uniform(0.2, 0.34)
    phase = rng.random(2)
    first, second = _square_wave(x / period + phase[0]), _square_wave(y / period + phase[1])
    return first + second - 2 * first * second


def _dots(x: Field, y: Field, rng: np.random.Generator) -> Field:
    period = rng.uniform(0.14, 0.24)
    phase = rng.random(2)
    u, v = (x / period + phase[0]) % 1 - 0.5, (y / period + phase[1]) % 1 - 0.5
    return np.clip((rng.uniform(0.26, 0.36) - np.hypot(u, v)) * 64 * period / 1.5 + 0.5, 0, 1)


def _gradient(x: Field, _y: Field, rng: np.random.Generator) -> Field:
    return np.clip(x / rng.uniform(0.5, 1.0) + 0.5, 0, 1)


def _noise(x: Field, _y: Field, rng: np.random.Generator) -> Field:
    coarse = Image.fromarray(rng.random((6, 6), dtype=np.float32))
    smooth = coarse.resize((x.shape[1], x.shape[0]), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(smooth) * 1.6 - 0.3, 0, 1)


def _ripples(x: Field, y: Field, rng: np.random.Generator) -> Field:
    return _square_wave(np.hypot(x, y) / rng.uniform(0.13, 0.22) + rng.random())


def _square_wave(phase: Field) -> Field:
    # A clipped triangle wave: stripes whose edges are as soft as a photograph's.
    return np.clip((np.abs((phase % 1) - 0.5) - 0.25) * 9 + 0.5, 0, 1)


TEXTURES: dict[str, Callable[[Field, Field, np.random.Generator], Field]] = {
    "plain": _plain,
    "stripes": _stripes,
    "checks": _checks,
    "dots": _dots,
    "gradient": _gradient,
    "noise": _noise,
    "ripples": _ripples,
}
BACKGROUNDS = ("plain", "stripes", "checks", "gradient", "gradient", "noise", "noise")


def draw_scene(
    size: int | tuple[int, int],
    rng: np.random.Generator,
    dominant: str,
    shapes: Sequence[str] = SHAPES,
    coloured: bool = False,
) -> tuple[Image.Image, NDArray[np.uint8]]:
    """Draws one large textured shape and up to three smaller ones, which may hide parts of each other.

    Args:
        size: Pixels, ``(H, W)`` or one number.
        rng: Decides everything else.
        dominant: The shape that covers more pixels than any other.
        shapes: What the smaller ones are chosen from.
        coloured: Whether each kind of shape has two colours of its own, as things have in photographs; else all have
            any colours. The background has any.

    Returns:
        The RGB image, and the labels of its pixels, uint8 ``(H, W)``: 0 is background, ``k + 1`` is ``shapes[k]``.
    """
    height, width = size_pair(size)
    label = shapes.index(dominant) + 1
    for _ in range(MOST_DRAWS):
        labels = np.zeros((height, width), dtype=np.uint8)
        canvas = _texture(BACKGROUNDS, (0, 0, width, height), min(height, width), (width / 2, height / 2), rng)
        below, above = (int(rng.integers(0, 2)), int(rng.integers(0, 3)))
        for shape, large in [("", False)] * below + [(dominant, True)] + [("", False)] * above:
            _draw_shape(canvas, labels, shape or str(rng.choice(shapes)), shapes, large, coloured, rng)
        covered = np.bincount(labels.ravel(), minlength=len(shapes) + 1)[1:]
        if covered.argmax() == label - 1:
            break
    light = np.linspace(-1, 1, width)[None] * rng.uniform(-12, 12) + np.linspace(-1, 1, height)[:, None] * 10
    grain = rng.standard_normal((height, width), dtype=np.float32) * 2
    return Image.fromarray(np.clip(canvas + (light + grain)[..., None], 0, 255).astype(np.uint8)), labels


def _draw_shape(
    canvas: NDArray[np.float32],
    labels: NDArray[np.uint8],
    shape: str,
    shapes: Sequence[str],
    large: bool,
    coloured: bool,
    rng: np.random.Generator,
) -> None:
    height, width = labels.shape
    unit = min(height, width)
    radius = unit * (rng.uniform(0.3, 0.44) if large else rng.uniform(0.13, 0.22))
    spread = 0.18 if large else 0.42
    centre = (width * (0.5 + rng.uniform(-spread, spread)), height * (0.5 + rng.uniform(-spread, spread)))
    reach = math.ceil(1.15 * radius) + 1
    left, top = max(0, int(centre[0]) - reach), max(0, int(centre[1]) - reach)
    right, bottom = min(width, int(centre[0]) + reach + 1), min(height, int(centre[1]) + reach + 1)
    box = (left, top, right, bottom)
    cover = _coverage(OUTLINES[shape], box, centre, radius, rng.uniform(0, 2 * math.pi))
    region = canvas[top:bottom, left:right]
    colours = PALETTE.reshape(len(SHAPES), 2, 3)[SHAPES.index(shape)] if coloured else None
    region += cover[..., None] * (_texture(tuple(TEXTURES), box, unit, centre, rng, colours) - region)
    labels[top:bottom, left:right][cover > 0.5] = shapes.index(shape) + 1


def _coverage(
    outline: tuple[NDArray[np.float64], ...],
    box: Box,
    centre: tuple[float, float],
    radius: float,
    turn: float,
) -> Field:
    """Returns which share of each pixel of ``box`` the shape covers, float32 ``(h, w)`` in [0, 1]."""
    left, top, right, bottom = box
    mask = Image.new("L", ((right - left) * SUPERSAMPLING, (bottom - top) * SUPERSAMPLING))
    draw = ImageDraw.Draw(mask)
    rotation = np.array([(math.cos(turn), math.sin(turn)), (-math.sin(turn), math.cos(turn))])
    for polygon, fill in zip(outline, (255, 0), strict=False):
        points = (polygon @ rotation * radius + centre - (left, top)) * SUPERSAMPLING
        draw.polygon([tuple(point) for point in points.tolist()], fill=fill)
    return np.asarray(mask.reduce(SUPERSAMPLING), dtype=np.float32) / 255


def _texture(
    names: Sequence[str],
    box: Box,
    unit: int,
    centre: tuple[float, float],
    rng: np.random.Generator,
    colours: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Returns the colours of a region in a texture drawn at random, float32 ``(h, w, 3)`` in 0 to 255."""
    left, top, right, bottom = box
    turn = rng.uniform(0, math.pi)
    across = (np.arange(left, right, dtype=np.float32) + 0.5 - centre[0])[None] / unit
    down = (np.arange(top, bottom, dtype=np.float32) + 0.5 - centre[1])[:, None] / unit
    x = across * math.cos(turn) + down * math.sin(turn)
    y = down * math.cos(turn) - across * math.sin(turn)
    field = TEXTURES[names[int(rng.integers(len(names)))]](x, y, rng)[..., None]
    drawn = PALETTE[rng.choice(len(PALETTE), 2, replace=False)]
    first, second = (drawn if colours is None else colours) + rng.normal(0, 7, (2, 3)).astype(np.float32)
    return first + field * (second - first)


def write_scenes(
    folder: str | os.PathLike[str],
    count: int,
    size: int | tuple[int, int] = 64,
    seed: int = 0,
    classes: Sequence[str] = SHAPES,
) -> None:
    """Writes scenes of textured shapes as JPEG files in class folders: ``folder/<shape>/<number>.jpg``.

    The class of a scene is its dominant shape; classes take turns. A scene depends on ``seed`` and its number, not on
    how many are written.

    Args:
        folder: Made if it is missing.
        count: How many scenes.
        size: Pixels, ``(H, W)`` or one number, at least 16.
        seed: Other seeds give other scenes.
        classes: Some of ``SHAPES``.

    Raises:
        InputError: An argument cannot work, or the folder cannot be written.
    """
    _check(count, size, classes)
    for name in classes[:count]:
        _make_folder(Path(folder) / name)
    for number in range(count):
        image, _ = _scene(number, size, seed, classes)
        image.save(Path(folder) / classes[number % len(classes)] / f"{number:06d}.jpg", quality=JPEG_QUALITY)


def write_segmentation_scenes(
    folder: str | os.PathLike[str],
    count: int,
    size: int | tuple[int, int] = 64,
    seed: int = 0,
    classes: Sequence[str] = SHAPES,
    validation_count: int | None = None,
    coloured: bool = False,
) -> None:
    """Writes scenes with a label for every pixel, in ADE20K's folders.

    ``images/training/ADE_train_00000001.jpg`` has its labels in ``annotations/training/ADE_train_00000001.png``, and
    ``validation`` likewise (``ADE_val_…``). Labels are 8-bit greys as in ADE20K: ``k`` from 1 on is ``classes[k - 1]``,
    and 0 is everything else, here the background, which training and metrics leave out. ``classes.txt`` has one name
    a line. The training scenes are those of :func:`write_scenes` with the same arguments, if they are not coloured.

    Args:
        folder: Made if it is missing.
        count: How many scenes for training.
        size: Pixels, ``(H, W)`` or one number, at least 16.
        seed: Other seeds give other scenes.
        classes: Some of ``SHAPES``.
        validation_count: How many scenes for validation; ``None`` is a fifth of ``count``, at least one.
        coloured: As for :func:`draw_scene`: far easier to segment than shapes of any colours.

    Raises:
        InputError: An argument cannot work, or the folder cannot be written.
    """
    _check(count, size, classes)
    validation = max(1, count // 5) if validation_count is None else validation_count
    for split, short, first, scenes in (("training", "train", 0, count), ("validation", "val", count, validation)):
        images, annotations = (Path(folder) / kind / split for kind in ("images", "annotations"))
        _make_folder(images)
        _make_folder(annotations)
        for number in range(scenes):
            image, labels = _scene(first + number, size, seed, classes, coloured)
            name = f"ADE_{short}_{number + 1:08d}"
            image.save(images / f"{name}.jpg", quality=JPEG_QUALITY)
            Image.fromarray(labels).save(annotations / f"{name}.png")
    (Path(folder) / "classes.txt").write_text("\n".join(classes) + "\n", encoding="utf-8")


def _scene(
    number: int, size: int | tuple[int, int], seed: int, classes: Sequence[str], coloured: bool = False
) -> tuple[Image.Image, NDArray[np.uint8]]:
    rng = np.random.default_rng((seed % 2**64, number))
    return draw_scene(size, rng, classes[number % len(classes)], classes, coloured)


def write_photograph_crops(
    folder: str | os.PathLike[str], count: int, size: int | tuple[int, int] = 64, seed: int = 0, held_out: bool = False
) -> None:
    """Writes crops of the photographs inside scikit-image's wheel as JPEG files ``folder/<photograph>_<number>.jpg``.

    Crops have the shape of ``size``, are cut at many scales, and are rarely dull. One side of every photograph, a
    third of it, is kept for held-out crops, which therefore share no pixel with those for training. Nothing is
    downloaded.

    Args:
        folder: Made if it is missing.
        count: How many crops; the photographs take turns.
        size: Pixels, ``(H, W)`` or one number, at least 16.
        seed: Other seeds give other crops.
        held_out: Crops of the parts that are held out instead of the rest.

    Raises:
        InputError: scikit-image is not installed, an argument cannot work, or the folder cannot be written.
    """
    _check(count, size, SHAPES)
    photographs = _photographs(held_out)
    _make_folder(Path(folder))
    for number in range(count):
        rng = np.random.default_rng((seed % 2**64, number, int(held_out)))
        name, photograph, region = photographs[number % len(photographs)]
        crop = _crop(photograph, region, size_pair(size), rng)
        crop.save(Path(folder) / f"{name}_{number:06d}.jpg", quality=JPEG_QUALITY)


def _photographs(held_out: bool) -> list[tuple[str, Image.Image, Box]]:
    """Returns name, picture, and the region that is held out (or that is not) of the photographs that are there."""
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        raise InputError("the photographs come with scikit-image, which is not installed: pip install 'beit[demo]'")
    found = []
    for file, side in PHOTOGRAPHS.items():
        path = Path(package.origin).parent / "data" / file
        if path.exists():  # which ones the wheel holds varies with its release
            with Image.open(path) as photograph:
                found.append((path.stem, photograph.convert("RGB"), photograph_region(photograph.size, side, held_out)))
    if not found:
        raise InputError(f"the installed scikit-image ({package.origin}) has none of {', '.join(PHOTOGRAPHS)}")
    return found


def photograph_region(size: tuple[int, int], side: str, held_out: bool) -> Box:
    """Returns (left, top, right, bottom) of the third of a photograph at ``side``, or of the rest of it.

    Args:
        size: ``(width, height)`` in pixels.
        side: Where the held-out part is: left, right or bottom.
        held_out: That part, instead of the rest.
    """
    width, height = size
    if side == "bottom":
        border = round(height * (1 - HELD_OUT_SHARE))
        return (0, border, width, height) if held_out else (0, 0, width, border)
    border = round(width * (HELD_OUT_SHARE if side == "left" else 1 - HELD_OUT_SHARE))
    return (0, 0, border, height) if held_out == (side == "left") else (border, 0, width, height)


def _crop(photograph: Image.Image, region: Box, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    height, width = size
    left, top, right, bottom = region
    # Cut first: resizing a part of the whole photograph would look at pixels beyond the region's border.
    part = photograph.crop(region)
    fits = min((right - left) / width, (bottom - top) / height)
    whole = min(photograph.width / width, photograph.height / height)
    for _ in range(MOST_DRAWS):
        zoom = rng.uniform(CROP_SHARES[0] * whole, min(CROP_SHARES[1] * whole, fits))
        w, h = round(width * zoom), round(height * zoom)
        x, y = int(rng.integers(part.width - w + 1)), int(rng.integers(part.height - h + 1))
        crop = part.resize((width, height), Image.Resampling.LANCZOS, (x, y, x + w, y + h))
        grey = np.asarray(crop.convert("L"))
        if grey.std() > DULL_DEVIATION and (grey < BLACK).mean() < BLACK_SHARE:
            break
    return crop


def write_digits(
    folder: str | os.PathLike[str],
    size: int | tuple[int, int] = 32,
    seed: int = 0,
    held_out_share: float = 0.25,
) -> None:
    """Writes the 1797 handwritten digits inside scikit-learn's wheel as ``folder/<split>/<digit>/<number>.png``.

    The splits are ``train`` and ``val``; a digit is in one of them. They are drawn for each class on its own, so both
    have the classes in the same shares. The originals are 8 x 8 pixels with 17 levels of grey. Nothing is downloaded.

    Args:
        folder: Made if it is missing.
        size: Pixels, ``(H, W)`` or one number, at least 8.
        seed: Other seeds hold other digits out.
        held_out_share: Share of every class that goes into ``val``, above 0 and below 1.

    Raises:
        InputError: scikit-learn is not installed, an argument cannot work, or the folder cannot be written.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI repository, 1998.
    """
    height, width = size_pair(size)
    if min(height, width) < DIGIT_SIDE:
        raise InputError(f"digits of at least {DIGIT_SIDE} pixels can be made, got {size}")
    if not 0 < held_out_share < 1:
        raise InputError(f"the share of digits held out must be above 0 and below 1, got {held_out_share}")
    greys, digits = _digits()
    for digit in range(10):
        numbers = np.flatnonzero(digits == digit)
        np.random.default_rng((seed % 2**64, digit)).shuffle(numbers)
        held_out = round(held_out_share * len(numbers))
        for split, members in (("val", numbers[:held_out]), ("train", numbers[held_out:])):
            target = Path(folder) / split / str(digit)
            _make_folder(target)
            for number in members.tolist():
                image = Image.fromarray(greys[number]).resize((width, height), Image.Resampling.BICUBIC)
                image.save(target / f"{number:04d}.png")


def _digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Returns the pictures, uint8 ``(1797, 8, 8)``, and the digits that they show."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError(
            "the digits come with scikit-learn, which is not installed: pip install 'beit[demo]'"
        ) from error
    found = load_digits()
    return np.round(found.images * (255 / 16)).astype(np.uint8), found.target


def _check(count: int, size: int | tuple[int, int], classes: Sequence[str]) -> None:
    if count < 1:
        raise InputError(f"the number of images must be at least 1, got {count}")
    if min(size_pair(size)) < 16:
        raise InputError(f"images of at least 16 pixels can be made, got {size}")
    for name in classes:
        if name not in SHAPES:
            raise InputError(f"unknown shape {name!r}{did_you_mean(name, SHAPES)}: there are {', '.join(SHAPES)}")
    if not classes or len(set(classes)) < len(classes):
        raise InputError(f"give one shape or more, each once, got {', '.join(classes) or 'none'}")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}") from error
