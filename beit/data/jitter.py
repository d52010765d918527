"""Colour jitter of the part of an image that is used, as if the whole image had been jittered."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageStat
from torchvision.transforms import v2

CONTRAST_PIXELS = 1 << 13  # enough of an image to know its mean grey to a small part of a level

_JITTER = ("brightness", "contrast", "saturation")  # in the numbering of torchvision's ColorJitter
_VALUES = np.arange(256, dtype=np.float32)


class RegionJitter:
    """Brightness, contrast and saturation of a region, changed as if those of the whole image were.

    Random factors in a random order, drawn as by torchvision's ``ColorJitter``. All three act on single pixels, but
    contrast pulls towards the mean grey of the image that the operations before it have left: that is taken of the
    whole image, from a regular part of it where it is large. So the region gets the pixels that a crop of the jittered
    image has, to the bit wherever the mean rounds alike.

    Args:
        strength: Each factor is in ``1 ± strength``, and 0 or more.
    """

    def __init__(self, strength: float) -> None:
        self._draw = v2.ColorJitter(strength, strength, strength)

    def __call__(self, region: Image.Image, whole: Image.Image) -> Image.Image:
        """Returns the jittered region, RGB, of the image ``whole``, RGB."""
        drawn = self._draw.make_params([]) if hasattr(self._draw, "make_params") else self._draw._get_params([])
        names = [_JITTER[i] for i in drawn["fn_idx"].tolist() if i < len(_JITTER)]
        steps = [(name, drawn[f"{name}_factor"]) for name in names]
        before = steps[: names.index("contrast")]
        grey = _mean_grey(_adjusted(_thinned(whole), before, 0))
        return _adjusted(region, steps, grey)


def _adjusted(image: Image.Image, steps: Sequence[tuple[str, float]], grey: int) -> Image.Image:
    # Brightness and contrast map values to values: what follows each other is one table, and one pass over the image.
    table: NDArray[np.uint8] | None = None
    for name, factor in steps:
        if name == "saturation":
            image = ImageEnhance.Color(_mapped(image, table)).enhance(factor)
            table = None
        else:
            step = _blended(0 if name == "brightness" else grey, factor)
            table = step if table is None else step[table]
    return _mapped(image, table)


def _blended(towards: int, factor: float) -> NDArray[np.uint8]:
    """Returns what Pillow's ``blend`` makes of each of the 256 values and one other, in its float32 steps."""
    values = np.float32(towards) + np.float32(factor) * (_VALUES - np.float32(towards))
    return np.clip(values, 0, 255).astype(np.uint8)  # cut off, not rounded


def _mapped(image: Image.Image, table: NDArray[np.uint8] | None) -> Image.Image:
    return image if table is None else image.point(table.tolist() * 3)


def _thinned(image: Image.Image) -> Image.Image:
    every = math.isqrt(image.width * image.height // CONTRAST_PIXELS)
    if every < 2:
        return image
    size = max(1, image.width // every), max(1, image.height // every)
    return image.resize(size, Image.Resampling.NEAREST)


def _mean_grey(image: Image.Image) -> int:
    return int(ImageStat.Stat(image.convert("L")).mean[0] + 0.5)  # as ImageEnhance.Contrast
