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


def duration_in_steps(*, epochs: float, steps: int, steps_per_epoch: int) -> int:
    """Resolves a duration that can be given in optimizer steps (which win when positive) or in epochs."""
    return steps if steps > 0 else round(epochs * steps_per_epoch)
