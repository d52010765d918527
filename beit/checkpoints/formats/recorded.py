"""What may be recorded beside the weights of a checkpoint, and a reader for each value.

Other programs use the same names for other things, so a reader returns None for a value of another kind.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from beit.errors import listed

logger = logging.getLogger(__name__)

VISUAL_TOKENS = "visual tokens"  # the target of a checkpoint that records none; as in beit.targets
CROP_MODES = ("center", "squash")  # the shorter side resized, and the centre; each side resized by itself
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")

LARGEST = 1_000_000  # of any number: pixels, heads, means

Reader = Callable[[object], Any]


def _value(kind: type | tuple[type, ...], fits: Callable[[Any], bool] = lambda _value: True) -> Reader:
    """Accepts values of a kind that fit; a bool is no number."""

    def read(value: object) -> object:
        accepted = isinstance(value, kind) and (kind is bool or not isinstance(value, bool)) and fits(value)
        return value if accepted else None

    return read


def _sequence(item: Reader, length: int | None = None) -> Reader:
    """Accepts lists and tuples, not empty, of items that a reader accepts; returns a tuple."""

    def read(value: object) -> tuple | None:
        if not isinstance(value, (list, tuple)) or not value or length not in (None, len(value)):
            return None
        items = tuple(item(entry) for entry in value)
        return None if None in items else items

    return read


_number = _value((int, float), lambda value: abs(value) < LARGEST)
positive = _value((int, float), lambda value: 0 < value < LARGEST)
whole = _value(int, lambda value: 0 < value < LARGEST)
_index = _value(int, lambda value: value >= 0)
_pair = _sequence(whole, 2)
_label = _value((str, int))


def _size(value: object) -> tuple[int, int] | None:
    return _pair(value if isinstance(value, (list, tuple)) else (value, value))


def _labels(value: object) -> tuple | None:
    """Accepts names in order, or by number in a dict such as ``id2label``."""
    if isinstance(value, Mapping):
        by_number = {str(number): name for number, name in value.items()}
        value = [by_number.get(str(number)) for number in range(len(by_number))]  # None where there is a gap
    return _sequence(_label)(value)


# Keys at the top level of a checkpoint.
RECORDED: dict[str, Reader] = {
    "labels": _labels,
    "mean": _sequence(_number),
    "std": _sequence(positive),
    "crop_pct": _value((int, float), lambda value: 0.1 <= value <= 1),  # a smaller one fills the memory
    "crop_mode": _value(str, lambda value: value in CROP_MODES),
    "interpolation": _value(str, lambda value: value in INTERPOLATIONS),
    "image_size": _size,
    "num_heads": whole,
    "layer_norm_eps": positive,
    "target": _value(str, bool),
    "tokenizer": _value(str, bool),
    "out_indices": _sequence(_index),
    "pool_scales": _sequence(_index),
    "auxiliary_index": _index,
    "palette": _sequence(_sequence(_value(int, lambda value: 0 <= value <= 255), 3)),
    "reduce_zero_label": _value(bool),
}


def readable(found: Mapping[str, object], where: str, **theirs: str) -> dict[str, Any]:
    """Returns the values that their readers accept; a warning names the others, None aside, as passed over.

    ``theirs`` are the names that keys have in the file, where they are others.
    """
    read = {key: RECORDED[key](value) for key, value in found.items() if value is not None}
    if odd := [f"{theirs.get(key, key)} ({found[key]!r:.40})" for key, value in read.items() if value is None]:
        logger.warning("%s: passed over, since not understood: %s", where, listed(odd))
    return {key: value for key, value in read.items() if value is not None}
