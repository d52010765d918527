"""Training curves from ``log.txt`` files: numbers, ready to be drawn."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from beit.errors import InputError, did_you_mean

BOOKKEEPING = {
    "epoch", "n_parameters", "images_per_second", "data_wait", "skipped_steps", "min_lr", "loss_scale", "weight_decay",
    "tokens", "step",
}  # fmt: skip
PREFIXES = ("train_", "test_")
PARTS = ("train", "test", "baseline")  # what a curve of a metric may be
FRACTIONS = ("mlm_acc", "most_frequent_acc", "class_acc", "pixel_acc", "mIoU", "mAcc", "aAcc")
PERCENTAGES = ("acc1", "acc5")
BASELINES = {"mlm_acc": "most_frequent_acc"}  # metric → what it has to clear, to be drawn beside it
BASELINE_NAME = "most frequent token"
Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Curve:
    """One line of a diagram.

    Attributes:
        label: What the legend calls it.
        epochs: Numbers of the epochs, from 1, or of optimizer steps.
        values: A number for each.
        run: Number of the run, from 0: curves of one run look alike where several are drawn.
        unit: What ``epochs`` counts, ``epoch`` or ``step``.
    """

    label: str
    epochs: list[int]
    values: list[float]
    run: int = 0
    unit: str = "epoch"

    @property
    def part(self) -> str:
        """One of :data:`PARTS`, as the label's end says; empty where it is none of them."""
        if self.label.endswith(BASELINE_NAME):
            return "baseline"
        last = self.label.rpartition(" ")[2]
        return last if last in PARTS else ""


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
        if isinstance(entry, dict) and isinstance(entry.get("epoch"), int):
            return entry
    except ValueError:
        if last or not line.strip():
            return None
    raise InputError(f"{file} is no run's log: each line must be a JSON object whose 'epoch' is a number")


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


def overlaid(runs: Mapping[str, Sequence[Entry]], only: Sequence[str] = ()) -> dict[str, list[Curve]]:
    """Sorts numbers as :func:`diagrams` does, for readers: with units, baselines, and steps where the logs have them.

    Args:
        runs: Name of a run → its entries.
        only: The metrics wanted.

    Returns:
        Title of a diagram → its curves. A metric's baseline is in its diagram, and has none of its own then; numbers
        are over optimizer steps where all runs of a diagram log those.

    Raises:
        InputError: None of the runs has a metric that was asked for, or there is nothing to draw.
    """
    found = diagrams(runs, only)
    for metric, baseline in BASELINES.items():
        if metric in found:
            found.pop(baseline, None)
            found[metric] = found[metric] + [_as_baseline(curve, len(runs) > 1) for curve in _curves(baseline, runs)]
    if not found:
        raise InputError(
            f"there is nothing to draw: {' and '.join(runs)} logged no metric that is a number, "
            "only bookkeeping such as the number of parameters"
        )
    entries = list(runs.values())
    return {titled(metric): _over_steps(curves, entries) for metric, curves in found.items()}


def titled(metric: str) -> str:
    """Returns a metric's name with its unit."""
    unit = "fraction" if metric in FRACTIONS else "%" if metric in PERCENTAGES else ""
    return f"{metric} ({unit})" if unit else metric


def _as_baseline(curve: Curve, several: bool) -> Curve:
    run = curve.label.rpartition(" ")[0] if several else ""
    return replace(curve, label=f"{run} {BASELINE_NAME}".strip())


def _over_steps(curves: list[Curve], entries: Sequence[Sequence[Entry]]) -> list[Curve]:
    """Returns the curves of a diagram over optimizer steps, or as they are where a run does not log those."""
    steps = [{entry["epoch"] + 1: entry["step"] for entry in run if _is_number(entry.get("step"))} for run in entries]
    if any(epoch not in steps[curve.run] for curve in curves for epoch in curve.epochs):
        return curves
    return [replace(curve, epochs=[steps[curve.run][epoch] for epoch in curve.epochs], unit="step") for curve in curves]


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
