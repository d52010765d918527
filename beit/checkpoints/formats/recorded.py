"""What may be recorded beside the weights of a checkpoint, and how each value is read: None for what does not fit.

Other programs use the same names for other things, so what is not of the kind expected is passed over.
"""

from collections.abc import Callable, Mapping
from typing import Any

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _positive(value: Any) -> Any:
    return value if _is_number(value) and value > 0 else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and _positive(value) else None


def _channels(value: Any) -> tuple[float, ...] | None:
    return tuple(value) if isinstance(value, (list, tuple)) and value and all(map(_is_number, value)) else None


def _size(value: Any) -> tuple[int, int] | None:
    pair = value if isinstance(value, (list, tuple)) else (value, value)
    return (pair[0], pair[1]) if len(pair) == 2 and all(map(_whole, pair)) else None


def _interpolation(value: Any) -> str | None:
    return value if isinstance(value, str) and value in INTERPOLATIONS else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _labels(value: Any) -> tuple[Any, ...] | None:
    """Reads names in a row, or by number in a dict, as ``id2label`` has them."""
    if isinstance(value, (list, tuple)):
        return tuple(value)
    if isinstance(value, Mapping) and all(str(number).isdecimal() for number in value):
        return tuple(value[number] for number in sorted(value, key=int))
    return None


def _indices(value: Any) -> tuple[int, ...] | None:
    whole = isinstance(value, (list, tuple)) and value and all(isinstance(v, int) and v >= 0 for v in value)
    return tuple(value) if whole else None


def _index(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _flag(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _palette(value: Any) -> tuple[tuple[int, ...], ...] | None:
    """Reads colours, three numbers from 0 to 255 each."""
    colours = [_indices(colour) for colour in value] if isinstance(value, (list, tuple)) else []
    fits = colours and all(colour and len(colour) == 3 and max(colour) <= 255 for colour in colours)
    return tuple(colour for colour in colours if colour) if fits else None


# Keys at the top level of a checkpoint.
RECORDED: dict[str, Callable[[Any], Any]] = {
    "labels": _labels,
    "mean": _channels,
    "std": _channels,
    "crop_pct": _positive,
    "interpolation": _interpolation,
    "image_size": _size,
    "num_heads": _whole,
    "layer_norm_eps": _positive,
    "target": _text,
    "out_indices": _indices,
    "pool_scales": _indices,
    "auxiliary_index": _index,
    "palette": _palette,
    "reduce_zero_label": _flag,
}
