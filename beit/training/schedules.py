"""Values that change with the optimizer step: learning rate, weight decay, temperatures."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

from beit.errors import InputError, counted

logger = logging.getLogger(__name__)

MIN_LR_SHARE = 0.05  # of the peak, at the end: 1e-6 of 2e-5


@dataclass(frozen=True)
class WarmupCosine:
    """Linear warm-up from ``start`` to ``base``, then a half cosine from ``base`` to ``final``.

    The warm-up includes both its ends, and the cosine starts again at ``base``, as in the official schedule.

    ``final`` is reached one step after the last of ``total_steps`` optimizer steps; ``warmup_steps`` may be as many or
    more.
    """

    base: float
    final: float
    total_steps: int
    warmup_steps: int = 0
    start: float = 0.0

    def __call__(self, step: int) -> float:
        """Returns the value at a step, counted from 0."""
        if step < self.warmup_steps:
            return self.start + (self.base - self.start) * step / max(1, self.warmup_steps - 1)
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.final + 0.5 * (self.base - self.final) * (1.0 + math.cos(math.pi * min(1.0, progress)))


@dataclass(frozen=True)
class WarmupPoly:
    """A polynomial from ``base`` down to ``final``, multiplied by a linear warm-up while that lasts.

    At optimizer step ``t`` of ``T``, with ``W`` of warm-up from the share ``r`` (``warmup_ratio``): the polynomial
    ``(base - final) * (1 - t / T) ** power + final``, times ``1 - (1 - t / W) * (1 - r)`` for ``t < W``.

    Source: mmcv 1.x, ``PolyLrUpdaterHook`` with ``warmup="linear"``, which BEiT's segmentation recipes use.
    Deviation: a layer's scale multiplies ``final`` too; mmcv ends every group at the same ``min_lr``, 0 in the recipes.
    """

    base: float
    final: float
    total_steps: int
    warmup_steps: int = 0
    warmup_ratio: float = 1e-6
    power: float = 1.0

    def __call__(self, step: int) -> float:
        """Returns the value at a step, counted from 0."""
        left = max(0.0, 1.0 - step / self.total_steps)
        value = (self.base - self.final) * left**self.power + self.final
        if step >= self.warmup_steps:
            return value
        return value * (1.0 - (1.0 - step / self.warmup_steps) * (1.0 - self.warmup_ratio))


def warn_of_rate(rate: Callable[[int], float]) -> None:
    """Warns of a learning rate that ends above its peak, or does not get beyond its warm-up."""
    if not isinstance(rate, WarmupCosine | WarmupPoly):
        return
    if rate.final > rate.base:
        text = "the learning rate rises from %g to --min_lr %g: lower that, to %g as in published fine-tuning"
        logger.warning(text, rate.base, rate.final, MIN_LR_SHARE * rate.base)
    if 0 < rate.total_steps <= rate.warmup_steps:
        text = "the warm-up, %d steps, is as long as the run, %d, or longer: lower --warmup_epochs or --warmup_steps"
        logger.warning(text, rate.warmup_steps, rate.total_steps)


def duration_in_steps(*, epochs: float, steps: int, steps_per_epoch: int) -> int:
    """Resolves a duration that can be given in optimizer steps (which win when positive) or in epochs."""
    return steps if steps > 0 else round(epochs * steps_per_epoch)


def split_batch(total: int, world_size: int, most: int, multiple: int = 1) -> tuple[int, int]:
    """Splits the images of a step into as few batches as possible; returns images per process and batch, and batches.

    A batch has at most ``most`` images, a multiple of ``multiple``, such as 2 where they are mixed in pairs.

    Raises:
        InputError: The images cannot be split evenly over the processes.
    """
    unit = world_size * multiple
    if total % unit:
        near = [count for count in (total // unit * unit, (total // unit + 1) * unit) if count]
        pairs = f" in multiples of {multiple}" if multiple > 1 else ""
        raise InputError(
            f"--total_batch_size {total} cannot be split evenly over {counted(world_size, 'process')}{pairs}; "
            f"{' or '.join(map(str, near))} can"
        )
    share = total // world_size
    images = max(size for size in range(multiple, min(share, most) + 1, multiple) if share % size == 0)
    if 2 * images < min(share, most):
        logger.warning(
            "--total_batch_size %d over %s: %s per batch, as %d has no larger divisor up to --batch_size %d",
            *(total, counted(world_size, "process"), counted(images, "image"), share, most),
        )
    return images, share // images
