"""Toy images, generated locally: scenes of textured shapes, crops of photographs and handwritten digits.

They are small, free and identical on every machine for the same seed, and structured enough that a model which sees
half of an image can infer the rest. The demo, the tests and the benchmarks use them. Sizes are in pixels, ``(H, W)`` or
one number for a square. Folders are created if missing, and nothing is downloaded.
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
from beit.errors import InputError

Field = NDArray[np.floating]  # (h, w) in [0, 1]: the weight of a texture's second colour at each pixel
Region = tuple[int, int, int, int]  # left, top, right, bottom in pixels
Size = int | tuple[int, int]
Folder = str | os.PathLike[str]

SUPERSAMPLING = 4  # shapes are drawn this many times larger, then reduced, to antialias their edges
JPEG_QUALITY = 92
MAX_DRAWS = 20
VALIDATION_SHARE = 0.25  # of the digits of each class

# Sixteen distinct colours; each use varies them slightly.
PALETTE = np.array(
    [
        (214, 57, 51), (240, 138, 40), (247, 205, 70), (120, 178, 62), (38, 124, 82), (52, 168, 176), (55, 110, 190),
        (44, 52, 122), (120, 72, 160), (205, 92, 150), (128, 84, 52), (214, 176, 132), (242, 238, 226), (160, 162, 168),
        (84, 90, 100), (28, 28, 34),
    ],
    dtype=np.float32,
)  # fmt: skip

# Photographs in scikit-image's wheel, each with the side whose outer third is held out.
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
CROP_SHARES = (0.25, 0.8)  # side of a crop relative to the photograph's shorter side
# A crop with less contrast or more black than this is drawn again: sky, or the border of retina.jpg.
MIN_DEVIATION = 14.0  # standard deviation in grey levels
BLACK, MAX_BLACK_SHARE = 12, 0.25


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


# Outlines as polygons, for a shape of radius 1 around (0, 0). A second polygon is a hole.
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
BACKGROUND = "background 200 200 200"  # name and colour in classes.txt, where the background is a class


# Textures are fields over coordinates x, y in units of the scene's shorter side.


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
    # A clipped triangle wave: its edges are as soft as a photograph's.
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
BACKGROUND_TEXTURES = ("plain", "stripes", "checks", "gradient", "gradient", "noise", "noise")


def draw_scene(
    size: Size, rng: np.random.Generator, dominant: str, coloured: bool = False
) -> tuple[Image.Image, NDArray[np.uint8]]:
    """Draws one large textured shape, the ``dominant`` one, and up to three smaller ones, which may overlap.

    If ``coloured``, each kind of shape has its own pair of colours, as objects have in photographs; otherwise, as for
    the background, colours are random. Returns the RGB image, and its label map, uint8 ``(H, W)``: 0 is background,
    ``k + 1`` is ``SHAPES[k]``.
    """
    height, width = size_pair(size)
    for _ in range(MAX_DRAWS):
        labels = np.zeros((height, width), dtype=np.uint8)
        region = (0, 0, width, height)
        canvas = _texture(BACKGROUND_TEXTURES, region, min(height, width), (width / 2, height / 2), rng)
        below, above = int(rng.integers(0, 2)), int(rng.integers(0, 3))
        for shape in [None] * below + [dominant] + [None] * above:
            _draw_shape(canvas, labels, shape, coloured, rng)
        if np.bincount(labels.ravel(), minlength=len(SHAPES) + 1)[1:].argmax() == SHAPES.index(dominant):
            break
    light = np.linspace(-1, 1, width)[None] * rng.uniform(-12, 12) + np.linspace(-1, 1, height)[:, None] * 10
    grain = rng.standard_normal((height, width), dtype=np.float32) * 2
    return Image.fromarray(np.clip(canvas + (light + grain)[..., None], 0, 255).astype(np.uint8)), labels


def _draw_shape(
    canvas: NDArray[np.float32],
    labels: NDArray[np.uint8],
    dominant: str | None,
    coloured: bool,
    rng: np.random.Generator,
) -> None:
    """Draws the dominant shape or, without one, a small shape chosen at random."""
    shape = dominant or str(rng.choice(SHAPES))
    height, width = labels.shape
    unit = min(height, width)
    radius = unit * (rng.uniform(0.3, 0.44) if dominant else rng.uniform(0.13, 0.22))
    spread = 0.18 if dominant else 0.42
    centre = (width * (0.5 + rng.uniform(-spread, spread)), height * (0.5 + rng.uniform(-spread, spread)))
    reach = math.ceil(1.15 * radius) + 1
    left, top = max(0, int(centre[0]) - reach), max(0, int(centre[1]) - reach)
    right, bottom = min(width, int(centre[0]) + reach + 1), min(height, int(centre[1]) + reach + 1)
    region = (left, top, right, bottom)
    cover = _coverage(OUTLINES[shape], region, centre, radius, rng.uniform(0, 2 * math.pi))
    colours = PALETTE.reshape(len(SHAPES), 2, 3)[SHAPES.index(shape)] if coloured else None
    pixels = canvas[top:bottom, left:right]
    pixels += cover[..., None] * (_texture(tuple(TEXTURES), region, unit, centre, rng, colours) - pixels)
    labels[top:bottom, left:right][cover > 0.5] = SHAPES.index(shape) + 1


def _coverage(
    outline: tuple[NDArray[np.float64], ...],
    region: Region,
    centre: tuple[float, float],
    radius: float,
    turn: float,
) -> Field:
    """Returns the share of each pixel of a region that a shape covers, float32 ``(h, w)`` in [0, 1]."""
    left, top, right, bottom = region
    mask = Image.new("L", ((right - left) * SUPERSAMPLING, (bottom - top) * SUPERSAMPLING))
    draw = ImageDraw.Draw(mask)
    rotation = np.array([(math.cos(turn), math.sin(turn)), (-math.sin(turn), math.cos(turn))])
    for polygon, fill in zip(outline, (255, 0), strict=False):
        points = (polygon @ rotation * radius + centre - (left, top)) * SUPERSAMPLING
        draw.polygon([tuple(point) for point in points.tolist()], fill=fill)
    return np.asarray(mask.reduce(SUPERSAMPLING), dtype=np.float32) / 255


def _texture(
    names: Sequence[str],
    region: Region,
    unit: int,
    centre: tuple[float, float],
    rng: np.random.Generator,
    colours: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Fills a region with a random texture: float32 ``(h, w, 3)``, 0 to 255."""
    left, top, right, bottom = region
    turn = rng.uniform(0, math.pi)
    across = (np.arange(left, right, dtype=np.float32) + 0.5 - centre[0])[None] / unit
    down = (np.arange(top, bottom, dtype=np.float32) + 0.5 - centre[1])[:, None] / unit
    x = across * math.cos(turn) + down * math.sin(turn)
    y = down * math.cos(turn) - across * math.sin(turn)
    field = TEXTURES[names[int(rng.integers(len(names)))]](x, y, rng)[..., None]
    drawn = PALETTE[rng.choice(len(PALETTE), 2, replace=False)]  # drawn in any case: the numbers that follow stay
    first, second = (drawn if colours is None else colours) + rng.normal(0, 7, (2, 3)).astype(np.float32)
    return first + field * (second - first)


def write_scenes(folder: Folder, count: int, size: Size = 64, seed: int = 0) -> None:
    """Writes scenes as JPEG files in class folders, ``folder/<shape>/<number>.jpg``.

    The class of a scene is its dominant shape; classes take turns. A scene depends only on the seed and its number.
    """
    for number in range(count):
        image, _ = _scene(number, size, seed)
        _save(image, Path(folder) / SHAPES[number % len(SHAPES)] / f"{number:06d}.jpg")


def write_segmentation_scenes(
    folder: Folder,
    count: int,
    size: Size = 64,
    seed: int = 0,
    validation_count: int = 1,
    coloured: bool = False,
) -> None:
    """Writes scenes with a label for every pixel, laid out as ADE20K.

    The labels of ``images/training/ADE_train_00000001.jpg`` are in ``annotations/training/ADE_train_00000001.png``;
    ``validation`` (``ADE_val_…``) is laid out likewise. Labels are 8-bit grey levels as in ADE20K: ``k`` from 1 on is
    ``SHAPES[k - 1]``, and 0, the background, is ignored by training and metrics. ``classes.txt`` lists the names, one
    per line. Unless coloured, the training scenes are those of :func:`write_scenes`; coloured shapes are far easier to
    segment.
    """
    for split, short, first, scenes in (
        ("training", "train", 0, count),
        ("validation", "val", count, validation_count),
    ):
        for number in range(scenes):
            image, labels = _scene(first + number, size, seed, coloured)
            name = f"ADE_{short}_{number + 1:08d}"
            _save(image, Path(folder) / "images" / split / f"{name}.jpg")
            _save(Image.fromarray(labels), Path(folder) / "annotations" / split / f"{name}.png")
    (Path(folder) / "classes.txt").write_text("\n".join(SHAPES) + "\n", encoding="utf-8")


def _scene(number: int, size: Size, seed: int, coloured: bool = False) -> tuple[Image.Image, NDArray[np.uint8]]:
    rng = np.random.default_rng((seed % 2**64, number))
    return draw_scene(size, rng, SHAPES[number % len(SHAPES)], coloured)


def write_photograph_crops(folder: Folder, count: int, size: Size = 64, seed: int = 0, held_out: bool = False) -> None:
    """Writes crops of the photographs in scikit-image's wheel as JPEG files, ``folder/<photograph>_<number>.jpg``.

    Crops come at many scales and are rarely dull. The outer third of each photograph is reserved for held-out crops,
    which therefore share no pixel with training crops. The photographs take turns.

    Raises :class:`InputError` if scikit-image is not installed, or has none of the photographs.
    """
    photographs = _photographs(held_out)
    for number in range(count):
        rng = np.random.default_rng((seed % 2**64, number, int(held_out)))
        name, photograph, region = photographs[number % len(photographs)]
        _save(_crop(photograph, region, size_pair(size), rng), Path(folder) / f"{name}_{number:06d}.jpg")


def _photographs(held_out: bool) -> list[tuple[str, Image.Image, Region]]:
    """Returns name, picture and permitted region of the available photographs."""
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        raise InputError("the photographs come with scikit-image, which is not installed: pip install scikit-image")
    found = []
    for file, side in PHOTOGRAPHS.items():
        path = Path(package.origin).parent / "data" / file
        if path.exists():  # releases of scikit-image ship different ones
            with Image.open(path) as photograph:
                found.append((path.stem, photograph.convert("RGB"), photograph_region(photograph.size, side, held_out)))
    if not found:
        raise InputError(f"the installed scikit-image ({package.origin}) has none of {', '.join(PHOTOGRAPHS)}")
    return found


def photograph_region(size: tuple[int, int], side: str, held_out: bool) -> Region:
    """Returns the third at the ``side`` (left, right or bottom) of a photograph ``(width, height)``, or the rest."""
    width, height = size
    if side == "bottom":
        border = round(height * (1 - HELD_OUT_SHARE))
        return (0, border, width, height) if held_out else (0, 0, width, border)
    border = round(width * (HELD_OUT_SHARE if side == "left" else 1 - HELD_OUT_SHARE))
    return (0, 0, border, height) if held_out == (side == "left") else (border, 0, width, height)


def _crop(photograph: Image.Image, region: Region, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    height, width = size
    part = photograph.crop(region)  # first: resizing a box of the whole would read pixels beyond the region's border
    fits = min(part.width / width, part.height / height)
    whole = min(photograph.width / width, photograph.height / height)
    for _ in range(MAX_DRAWS):
        zoom = rng.uniform(CROP_SHARES[0] * whole, min(CROP_SHARES[1] * whole, fits))
        w, h = round(width * zoom), round(height * zoom)
        x, y = int(rng.integers(part.width - w + 1)), int(rng.integers(part.height - h + 1))
        crop = part.resize((width, height), Image.Resampling.LANCZOS, (x, y, x + w, y + h))
        grey = np.asarray(crop.convert("L"))
        if grey.std() > MIN_DEVIATION and (grey < BLACK).mean() < MAX_BLACK_SHARE:
            break
    return crop


def write_digits(folder: Folder, size: Size = 32, seed: int = 0, per_class: int | None = None) -> None:
    """Writes the 1797 handwritten digits in scikit-learn's wheel as ``folder/<split>/<digit>/<number>.png``.

    A quarter of each class goes to ``val``, the rest to ``train``; the seed decides which. The originals have 8 x 8
    pixels and 17 grey levels. ``per_class`` is the number of digits of each class, all by default.

    Raises :class:`InputError` if scikit-learn is not installed.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI repository, 1998.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError(
            "the digits come with scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    height, width = size_pair(size)
    digits = load_digits()
    greys = np.round(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
    for digit in range(10):
        numbers = np.flatnonzero(digits.target == digit)
        np.random.default_rng((seed % 2**64, digit)).shuffle(numbers)
        numbers = numbers[:per_class]
        held_out = round(VALIDATION_SHARE * len(numbers))
        for split, members in (("val", numbers[:held_out]), ("train", numbers[held_out:])):
            for number in members.tolist():
                image = Image.fromarray(greys[number]).resize((width, height), Image.Resampling.BICUBIC)
                _save(image, Path(folder) / split / str(digit) / f"{number:04d}.png")


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=JPEG_QUALITY)  # PNG has no such setting and ignores it
