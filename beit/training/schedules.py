"""Values that change with the optimizer step: learning rate, weight decay, temperatures."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class WarmupCosine:
    """Linear warm-up from ``start`` to ``base``, then a half cosine from ``base`` to ``final``.

    The warm-up includes both its ends, and the cosine starts again at ``base``, as in the official BEiT schedule. A
    warm-up as long as the run, or longer, is allowed: the cosine is then never reached.

    Args:
        base: The peak value.
        final: The value that the cosine approaches; reached one step after the last.
        total_steps: Length of the run, in optimizer steps.
        warmup_steps: Length of the warm-up, in optimizer steps.
        start: The value at step 0 of the warm-up.
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

    At step ``t`` of ``T``, with ``W`` steps of warm-up from the share ``r``: the polynomial
    ``(base - final) * (1 - t / T) ** power + final``, times ``1 - (1 - t / W) * (1 - r)`` for ``t < W``.

    Args:
        base: The value without warm-up at step 0.
        final: The value after the last step.
        total_steps: Length of the run, in optimizer steps.
        warmup_steps: Length of the warm-up, in optimizer steps.
        warmup_ratio: The share of the value that the warm-up begins with.
        power: Exponent of the decay.

    Source: mmcv 1.x, ``PolyLrUpdaterHook`` with ``warmup="linear"``, which BEiT's segmentation recipes use.

    Deviation: a layer's scale multiplies this whole value, ``final`` too, where mmcv ends every parameter group at the
    same ``min_lr``. The recipes end at 0, where there is no difference.
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


def duration_in_steps(*, epochs: float, steps: int, steps_per_epoch: int) -> int:
    """Resolves a duration that can be given in optimizer steps (which win when positive) or in epochs."""
    return steps if steps > 0 else round(epochs * steps_per_epoch)
