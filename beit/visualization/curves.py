"""Training curves from ``log.txt`` files: numbers, ready to be drawn."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beit.errors import InputError, did_you_mean

BOOKKEEPING = {
    "epoch", "n_parameters", "images_per_second", "data_wait", "skipped_steps", "min_lr", "loss_scale", "weight_decay",
    "tokens",
}  # fmt: skip
PREFIXES = ("train_", "test_")
Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Curve:
    """One line of a diagram.

    Attributes:
        label: What the legend calls it.
        epochs: Numbers of the epochs, from 1.
        values: A number for each.
        run: Number of the run, from 0: curves of one run look alike where several are drawn.
    """

    label: str
    epochs: list[int]
    values: list[float]
    run: int = 0


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """Reads a run's ``log.txt``, one JSON object an epoch; a folder stands for the ``log.txt`` in it.

    A line cut off by a kill at the end of the file is left out.

    Raises:
        InputError: There is no such file, or it is no log.
    """
    file = Path(path) / "log.txt" if Path(path).is_dir() else Path(path)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read the log {file}: {getattr(error, 'strerror', None) or 'it is no text'}"
        ) from error
    entries = [entry for number, line in enumerate(lines) if (entry := _entry(line, number == len(lines) - 1, file))]
    if not entries:
        raise InputError(f"{file} has no finished epoch yet")
    return entries


def _entry(line: str, last: bool, file: Path) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
        if isinstance(entry, dict) and "epoch" in entry:
            return entry
    except ValueError:
        if last or not line.strip():
            return None
    raise InputError(f"{file} is no run's log: each line must be a JSON object with an 'epoch'")


def diagrams(runs: Mapping[str, Sequence[Entry]], only: Sequence[str] = ()) -> dict[str, list[Curve]]:
    """Sorts the numbers of some runs into diagrams, one a metric: training and test, every run.

    Args:
        runs: Name of a run → its entries; with several runs the name stands in the legend.
        only: The metrics wanted, without ``train_`` or ``test_``; all but bookkeeping by default.

    Returns:
        Metric → its curves, in the order of the logs.

    Raises:
        InputError: None of the runs has a metric that was asked for.
    """
    names = [name for entries in runs.values() for entry in entries for name in entry if _is_number(entry[name])]
    metrics = list(dict.fromkeys(_metric(name) for name in names))
    for wanted in only:
        if wanted not in metrics:
            raise InputError(f"no log has {wanted!r}{did_you_mean(wanted, metrics)}; they have {', '.join(metrics)}")
    shown = only or [metric for metric in metrics if metric not in BOOKKEEPING]
    return {metric: _curves(metric, runs) for metric in shown}


def _curves(metric: str, runs: Mapping[str, Sequence[Entry]]) -> list[Curve]:
    curves = []
    for number, (run, entries) in enumerate(runs.items()):
        for prefix in (*PREFIXES, ""):
            points = [(e["epoch"] + 1, e[prefix + metric]) for e in entries if _is_number(e.get(prefix + metric))]
            if points:
                label = " ".join(part for part in (run if len(runs) > 1 else "", prefix.rstrip("_")) if part)
                epochs, values = [epoch for epoch, _ in points], [value for _, value in points]
                curves.append(Curve(label or run, epochs, values, number))
    return curves


def _metric(name: str) -> str:
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
    return name.removeprefix(prefix)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
