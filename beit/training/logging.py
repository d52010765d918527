"""What a run tells: the console and ``log.txt``."""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from beit.storage import atomic_write
from beit.training.console import console, shows_bars
from beit.training.distributed import is_main

logger = logging.getLogger(__name__)


class Averages:
    """Running means of named numbers over an epoch, saved in checkpoints; values that are not finite are left out."""

    def __init__(self, state: Mapping[str, list[float]] | None = None) -> None:
        self._totals: dict[str, list[float]] = {name: list(pair) for name, pair in (state or {}).items()}

    def add(self, name: str, value: float) -> None:
        """Takes one more value in."""
        total = self._totals.setdefault(name, [0.0, 0])
        if math.isfinite(value):
            total[0] += value
            total[1] += 1

    def means(self) -> dict[str, float]:
        """Returns the mean of every name that has had a finite value."""
        return {name: total / count for name, (total, count) in self._totals.items() if count}

    def state_dict(self) -> dict[str, list[float]]:
        """Returns sums and counts."""
        return {name: list(pair) for name, pair in self._totals.items()}


class EpochLog:
    """``log.txt``: one JSON object per period, each period once, also after a resume.

    Lines are numbered by ``unit``: ``epoch``, from 0, or the ``step`` that ends them. Those after the ``done`` periods
    are removed, and set aside if the run is ``fresh``: it starts over instead of resuming. ``entries`` are the
    lines; without a ``path`` only those written since.
    """

    def __init__(self, path: Path | None, unit: str, done: int, fresh: bool) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []
        if path is None or not path.is_file():
            return
        kept: list[str] = []
        dropped: list[str] = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            (kept if _end_of(line, unit) <= done else dropped).append(line)
        self.entries = [json.loads(line) for line in kept]
        if not dropped:
            return
        if fresh:
            path.rename(path.with_name(f"log-until-{datetime.now():%Y%m%d-%H%M%S}.txt"))
        with atomic_write(path) as file:
            file.write("".join(f"{line}\n" for line in kept).encode())

    def write(self, entry: Mapping[str, float]) -> None:
        """Appends one epoch's entry, and sees it onto the disk; a number that is not finite becomes null."""
        finite = {key: value if math.isfinite(value) else None for key, value in entry.items()}
        self.entries.append(finite)
        if self.path is None:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _end_of(line: str, unit: str) -> float:
    """Returns the periods done after a line of ``log.txt``; a line cut off by a kill belongs to none that is kept."""
    try:
        return json.loads(line)[unit] + (unit == "epoch")
    except (ValueError, KeyError, TypeError):
        return math.inf


class Throughput:
    """Measures images per second, the share of time spent waiting for data, and what is left to do."""

    def __init__(self, images_per_step: int) -> None:
        self._images_per_step = images_per_step
        self._seconds = self._waited = 0.0
        self._steps = 0
        self.restart_window()

    def waited(self, seconds: float) -> None:
        """Counts time spent waiting for the data loader."""
        self._window_waited += seconds

    def window_seconds(self) -> float:
        """Returns how long the window has lasted."""
        return time.perf_counter() - self._window_start

    def restart_window(self) -> None:
        """Forgets the time since the last window: it was spent on something else than training."""
        self._window_start, self._window_waited = time.perf_counter(), 0.0

    def close_window(self, steps: int) -> dict[str, float]:
        """Ends a window of finished optimizer steps; returns its images per second and data-wait share."""
        seconds, waited = max(self.window_seconds(), 1e-9), self._window_waited
        self._seconds += seconds
        self._waited += waited
        self._steps += steps
        self.restart_window()
        return {"images_per_second": steps * self._images_per_step / seconds, "data_wait": waited / seconds}

    def totals(self) -> dict[str, float]:
        """Returns images per second and data-wait share since the start."""
        seconds = max(self._seconds, 1e-9)
        images = self._steps * self._images_per_step
        return {"images_per_second": images / seconds, "data_wait": self._waited / seconds}

    def remaining(self, steps: int) -> str:
        """Returns how long a number of steps will take, as ``1:02:03``."""
        seconds = self._seconds / self._steps * steps if self._steps else 0.0
        return str(timedelta(seconds=round(seconds)))


def memory_in_use(device: torch.device) -> str:
    """Returns the peak memory of the device, or of the process on a CPU, as ``10.2 GB``."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        try:
            import resource
        except ImportError:  # Windows
            return "?"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"{peak / 1e9:.1f} GB"


class Progress:
    """The console's view of an epoch: a bar on a terminal or in a notebook, a line every window elsewhere.

    It counts ``steps`` from ``before + first_step``; ``before`` are those of earlier epochs where ``steps`` covers all.
    """

    def __init__(self, head: str, steps: int, first_step: int, before: int = 0) -> None:
        self._head, self._steps, self._before = head, steps, before
        self._shows_bar = is_main() and shows_bars()
        self._bar = tqdm(
            total=steps,
            initial=before + first_step,
            desc=head,
            disable=not self._shows_bar,
            file=console(),
            dynamic_ncols=True,
            leave=False,
            unit="step",
        )

    def update(self, step: int, text: str) -> None:
        """Shows that ``step`` steps of the epoch are done, with a line of numbers."""
        done = self._bar.n = self._before + step
        self._bar.set_postfix_str(text)
        if not self._shows_bar:
            logger.info("%s step %*d/%d  %s", self._head, len(str(self._steps)), done, self._steps, text)

    def close(self) -> None:
        """Removes the bar."""
        self._bar.close()
