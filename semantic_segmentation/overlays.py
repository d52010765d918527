"""Segmentations as files: label maps to score or to go on with, and pictures to look at."""

import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from beit.errors import InputError
from beit.storage import atomic_write
from beit.visualization.figures import draw_segmentation
from semantic_segmentation.metrics import IGNORED

if TYPE_CHECKING:
    from semantic_segmentation.data import SegmentationClasses

Colour = tuple[int, int, int]

OPACITY = 0.5
MOST_WAITING = 16  # results to write: their images stay in memory until then
SMALLEST_SHARE = 0.0005  # of an image: a class with fewer pixels cannot be seen, and is left out of the legend


class WritingThread:
    """Makes calls one after the other beside the work, such as those that write what was predicted.

    An error of a call is raised by a later one, or where the block ends, which waits for all calls::

        with WritingThread() as write:
            write(save_label_map, path, prediction)
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._waiting: deque[Future[None]] = deque()

    def __call__(self, function: Callable[..., None], *arguments: Any) -> None:
        """Has a function called soon; waits where too many calls are ahead of it."""
        self._waiting.append(self._pool.submit(function, *arguments))
        while self._waiting and (self._waiting[0].done() or len(self._waiting) > MOST_WAITING):
            self._waiting.popleft().result()

    def __enter__(self) -> "WritingThread":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        try:
            while self._waiting and kind is None:
                self._waiting.popleft().result()
        finally:  # what was predicted before a failure is still written; who interrupts the work does not wait for it
            failed = kind is not None and issubclass(kind, Exception)
            self._pool.shutdown(cancel_futures=not failed)


def check_writable(flag: str, folder: Path) -> None:
    """Looks whether files can be written into a folder, or into one that is to be made, and leaves nothing there.

    Args:
        flag: What to call it.
        folder: The folder.

    Raises:
        InputError: They cannot.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise InputError(f"{flag} {folder}: cannot write into {place}: {error.strerror}") from error


def save_label_map(path: str | Path, prediction: Tensor, add_one: bool = False) -> None:
    """Writes the class of each pixel into a grey PNG file of 8 bits.

    Args:
        path: The file; a folder that is missing is made.
        prediction: Classes, ``(H, W)``, integers from 0 on.
        add_one: Write class 0 as 1 and so on, and 255 (ignored) as 0: as ADE20K's annotations are, and as its server
            wants them.

    Raises:
        InputError: A class does not fit in 8 bits, or the file cannot be written.
    """
    numbers = prediction.cpu().to(torch.int64)
    largest = int(numbers.max())
    if largest > IGNORED:
        raise InputError(f"cannot write {path}: class {largest} does not fit in a PNG file of 8 bits (0 to 255)")
    numbers = (numbers + 1) % 256 if add_one else numbers
    with atomic_write(path) as file:
        Image.fromarray(numbers.to(torch.uint8).numpy()).save(file, format="PNG")


def overlay(image: Tensor, prediction: Tensor, colours: Sequence[Colour], opacity: float = OPACITY) -> Tensor:
    """Paints the classes over an image.

    Args:
        image: uint8 ``(3, H, W)``.
        prediction: Classes or a label map, ``(H, W)``; where it is 255 the image stays as it is.
        colours: Red, green and blue of each class, 0 to 255.
        opacity: From 0, the image alone, to 1, the colours alone.

    Returns:
        uint8 ``(3, H, W)`` in host memory.

    Raises:
        InputError: The two differ in size, or a class has no colour.
    """
    image, classes = image.cpu(), prediction.cpu().long()
    if image.shape[-2:] != classes.shape:
        sizes = ["x".join(map(str, shape)) for shape in (image.shape[-2:], classes.shape)]
        raise InputError(f"the image is {sizes[0]} pixels and its segmentation {sizes[1]}")
    painted = classes != IGNORED
    wrong = classes[painted & (classes >= len(colours))]
    if len(wrong):
        raise InputError(f"class {int(wrong[0])} has no colour: there are {len(colours)} classes")
    palette = torch.tensor(colours, dtype=torch.float32)
    paint = palette[classes.where(painted, 0)].permute(2, 0, 1)  # (3, H, W)
    mixed = torch.lerp(image.float(), paint, opacity).round().to(torch.uint8)
    return torch.where(painted, mixed, image)


def save_figure(
    path: str | Path,
    image: Tensor,
    prediction: Tensor,
    classes: "SegmentationClasses",
    label: Tensor | None = None,
    *,
    opacity: float = OPACITY,
) -> None:
    """Writes a PNG file with an image, its segmentation, the right one if there is one, and a legend.

    Args:
        path: The file; a folder that is missing is made.
        image: uint8 ``(3, H, W)``.
        prediction: Classes, ``(H, W)``.
        classes: Names and colours.
        label: The right classes, ``(H, W)``, 255 where there is none.
        opacity: As for :func:`overlay`.

    Raises:
        InputError: As for :func:`overlay`, or the file cannot be written.
    """
    panels = {"image": image.cpu(), "prediction": overlay(image, prediction, classes.colours, opacity)}
    shown = [prediction]
    if label is not None:
        panels["label"] = overlay(image, label, classes.colours, opacity)
        shown.append(label)
    numbers = occurring(shown, len(classes.names))
    legend = [(classes.names[number], classes.colours[number]) for number in numbers]
    draw_segmentation(path, panels, legend)


def occurring(maps: Sequence[Tensor], num_classes: int) -> list[int]:
    """Returns the classes that can be seen in some label maps, those with most pixels first.

    Args:
        maps: Integers, ``(H, W)`` each; 255 is no class.
        num_classes: Number of classes, ``K``.
    """
    host_maps = [map_.cpu().long() for map_ in maps]
    pixels = torch.stack([torch.bincount(map_[map_ != IGNORED], minlength=num_classes) for map_ in host_maps])
    enough = SMALLEST_SHARE * maps[0].numel()
    seen = [number for number in range(num_classes) if pixels[:, number].max() > enough]
    return sorted(seen, key=lambda number: -int(pixels[:, number].sum()))
