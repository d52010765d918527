"""Colour jitter of an image's views, as if the whole image had been jittered before they were cropped."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CONTRAST_PIXELS = 1 << 12  # enough to know an image's mean grey to half a level

_STEPS = ("brightness", "contrast", "saturation", "hue")  # in the numbering of torchvision's ColorJitter
_GREY = (0.299, 0.587, 0.114)  # of red, green and blue, as Pillow converts to "L"
# Pillow truncates values after each step, by half a level on average. The conversion of the result does it once;
# contrast and saturation subtract it for the two other times.
_CUT_OFF = 0.5

Step = tuple[str, float]


class ViewJitter:
    """Changes brightness, contrast and saturation of an image's views, as if those of the whole image were changed.

    Random factors in a random order, drawn from PyTorch's global generator as in torchvision's ``ColorJitter``. All
    three act on single pixels, so views are jittered after they are resized, all their pixels at once. But contrast
    pulls towards the mean grey of the image as the steps before left it; that is computed from the whole image, or
    from a regular grid of its pixels if it is large. The official order jitters and clips before resizing; the views
    are the same within a level on average. Each factor is in ``1 ± strength``, and 0 or more.
    """

    def __init__(self, strength: float) -> None:
        self.range = (max(0.0, 1 - strength), 1 + strength)

    def __call__(self, views: Mapping[str, Tensor], whole: Tensor) -> dict[str, Tensor]:
        """Returns views, uint8 ``(3, H, W)`` each, jittered; ``whole`` is the image they show, uint8 ``(3, h, w)``."""
        steps = self._draw()
        before = steps[: [name for name, _ in steps].index("contrast")]
        grey = _mean_grey(_adjusted(_thinned(whole), before))
        pixels = torch.cat([view.flatten(1) for view in views.values()], dim=1)
        # Through 16 bits: PyTorch converts float32 directly to 8 bits several times slower.
        jittered = _adjusted(pixels, steps, grey).to(torch.int16).to(torch.uint8)
        parts = jittered.split([view[0].numel() for view in views.values()], dim=1)
        return {name: part.reshape(view.shape) for (name, view), part in zip(views.items(), parts, strict=True)}

    def _draw(self) -> list[Step]:
        order = torch.randperm(len(_STEPS)).tolist()
        factors = torch.empty(3).uniform_(*self.range).tolist()
        return [(_STEPS[i], factors[i]) for i in order if i < len(factors)]  # no hue


class _Curve(NamedTuple):
    """Brightness and contrast as a function of a value: ``scale * value + shift``, clipped to ``low`` and ``high``."""

    scale: float = 1.0
    shift: float = 0.0
    low: float = 0.0
    high: float = 255.0

    def then(self, factor: float, towards: float) -> "_Curve":
        """Returns this curve followed by ``factor * value + towards``, clipped to [0, 255]: again such a curve."""
        low, high = (min(max(factor * end + towards, 0.0), 255.0) for end in (self.low, self.high))
        return _Curve(factor * self.scale, factor * self.shift + towards, low, high)


def _adjusted(pixels: Tensor, steps: Sequence[Step], grey: float = 0.0) -> Tensor:
    """Returns uint8 pixels ``(3, n)`` after the steps as float32 in [0, 255]; contrast pulls towards ``grey``."""
    values = pixels.to(torch.float32)
    curve = _Curve()
    for name, factor in steps:
        if name == "saturation":
            if curve != _Curve():
                values.mul_(curve.scale).add_(curve.shift).clamp_(curve.low, curve.high)
            # Sums and not a matrix product, whose rounding may change with settings and threads.
            red, green, blue = ((1 - factor) * share for share in _GREY)
            grey_part = torch.mul(values[0], red).add_(values[1], alpha=green).add_(values[2], alpha=blue)
            values.mul_(factor).add_(grey_part)
            curve = _Curve().then(1, -_CUT_OFF)
        else:
            curve = curve.then(factor, 0.0 if name == "brightness" else (1 - factor) * grey - _CUT_OFF)
    return values.mul_(curve.scale).add_(curve.shift).clamp_(curve.low, curve.high)


def _thinned(image: Tensor) -> Tensor:
    """Returns pixels on a regular grid over an image, uint8 ``(3, n)``."""
    every = max(1, math.isqrt(image[0].numel() // CONTRAST_PIXELS))
    return image[:, ::every, ::every].flatten(1)


def _mean_grey(values: Tensor) -> int:
    red, green, blue = values.mean(dim=1).tolist()
    return round(_GREY[0] * red + _GREY[1] * green + _GREY[2] * blue)  # Pillow's is an integer, too
