"""Predictions as files: label maps, and figures with the classes painted over the image."""

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from beit.errors import InputError
from beit.outputs import png_mark
from beit.storage import atomic_write
from beit.visualization import figures
from semantic_segmentation.data import Colour, SegmentationClasses
from semantic_segmentation.metrics import IGNORED

if TYPE_CHECKING:
    from beit.visualization.figures import Figure

OPACITY = 0.5
MOST_WAITING = 16  # queued results, whose images stay in memory
SMALLEST_SHARE = 0.0005  # of an image: classes with fewer pixels cannot be seen and are left out of the legend


@contextlib.contextmanager
def writing_thread() -> Iterator[Callable[..., None]]:
    """Yields what runs calls in order in a background thread, such as those that write predictions.

    It blocks while too many calls are queued. An error in one is raised by a later call or at the end of the block,
    which waits for all calls; where the block fails, earlier ones are still made, but not after an interrupt::

        with writing_thread() as write:
            write(save_label_map, path, prediction)
    """
    waiting = deque[Future[None]]()
    with ThreadPoolExecutor(max_workers=1) as pool:

        def write(function: Callable[..., None], *args: object, **kwargs: object) -> None:
            waiting.append(pool.submit(function, *args, **kwargs))
            while waiting and (waiting[0].done() or len(waiting) > MOST_WAITING):
                waiting.popleft().result()

        try:
            yield write
            while waiting:
                waiting.popleft().result()
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise


def save_label_map(path: str | Path, prediction: Tensor, add_one: bool = False, colours: Sequence[Colour] = ()) -> None:
    """Writes the class of each pixel, integers ``(H, W)``, to an 8-bit PNG file, grey or with a palette of ``colours``.

    ``add_one`` writes class 0 as 1 and so on, and 255 (ignored) as 0, as in ADE20K's annotations and on its server.

    Raises:
        InputError: A class does not fit in 8 bits, or the file cannot be written.
    """
    numbers = prediction.cpu().to(torch.int64)
    if (largest := int(numbers.max())) > IGNORED:
        raise InputError(f"cannot write {path}: class {largest} does not fit in a PNG file of 8 bits (0 to 255)")
    numbers = (numbers + 1) % 256 if add_one else numbers
    picture = Image.fromarray(numbers.to(torch.uint8).numpy())
    if colours:
        palette = ([(0, 0, 0)] if add_one else []) + [*colours, *itertools.repeat((0, 0, 0), 256)]
        picture.putpalette(list(itertools.chain.from_iterable(palette[:256])))
    save_png(path, picture)


def save_png(path: str | Path, picture: Image.Image) -> None:
    """Writes a picture to a PNG file that is marked as the library's; missing folders are created."""
    with atomic_write(path) as file:
        picture.save(file, format="PNG", pnginfo=png_mark())


def overlay(image: Tensor, prediction: Tensor, colours: Sequence[Colour], opacity: float = OPACITY) -> Tensor:
    """Returns an image, uint8 ``(3, H, W)``, with the colours of classes or labels ``(H, W)`` over it, in host memory.

    Opacity goes from 0, only the image, to 1, only the colours; pixels of 255 are left as they are.

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


def result_figure(
    image: Tensor,
    prediction: Tensor,
    classes: SegmentationClasses,
    label: Tensor | None = None,
    *,
    opacity: float = OPACITY,
    title: str = "",
) -> "Figure":
    """Draws an image, uint8 ``(3, H, W)``, its segmentation, ``(H, W)``, the labels if there are any, and a legend.

    Raises as :func:`overlay` does.
    """
    maps = {"prediction": prediction} if label is None else {"prediction": prediction, "label": label}
    painted = {name: overlay(image, map_, classes.colours, opacity) for name, map_ in maps.items()}
    seen = occurring(list(maps.values()), len(classes))
    legend = [(classes.names[number], classes.colours[number]) for number in seen]
    return figures.segmentation_figure({"image": image.cpu(), **painted}, legend, title)


def occurring(maps: Sequence[Tensor], num_classes: int) -> list[int]:
    """Returns the classes that are visible in label maps, integers ``(H, W)`` each, sorted by size."""
    counts = [torch.bincount(map_[map_ != IGNORED].cpu().long(), minlength=num_classes) for map_ in maps]
    pixels = torch.stack(counts)
    seen = pixels.amax(dim=0) > SMALLEST_SHARE * maps[0].numel()
    return [number for number in pixels.sum(dim=0).argsort(descending=True, stable=True).tolist() if seen[number]]
