"""Training curves from ``log.txt`` files, as numbers ready to be drawn."""

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
PREFIXES = ("train_", "test_", "")
PARTS = ("train", "test", "baseline")
# metric -> the one it should beat, drawn beside it; numbered where a model predicts tokens twice
BASELINES = {f"mlm_acc{number}": f"most_frequent_acc{number}" for number in ("", "_1", "_2")}
FRACTIONS = (*BASELINES, *BASELINES.values(), "class_acc", "pixel_acc", "mIoU", "mAcc", "aAcc")  # drawn in percent
UNITS = dict.fromkeys((*FRACTIONS, "acc1", "acc5"), " (%)")
BASELINE_NAME = "most frequent token"
Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Curve:
    """One line of a diagram."""

    label: str  # in the legend
    epochs: list[int]  # from 1, or optimizer steps
    values: list[float]
    run: int = 0  # from 0; with several runs, the curves of a run share a colour
    unit: str = "epoch"  # what epochs counts, or "step"

    @property
    def part(self) -> str:
        """One of :data:`PARTS`, by the end of the label; empty if it is none of them."""
        if self.label.endswith(BASELINE_NAME):
            return "baseline"
        last = self.label.rpartition(" ")[2]
        return last if last in PARTS else ""


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """Reads a run's ``log.txt``, given the file or its folder, but for an incomplete last line left by a killed run.

    Raises:
        InputError: There is no such file, or it is not a log.
    """
    file = Path(path) / "log.txt" if Path(path).is_dir() else Path(path)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the log {file}: {getattr(error, 'strerror', None) or 'not a text'}") from error
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
    raise InputError(f"{file} is not a run's log: each line must be a JSON object whose 'epoch' is a number")


def overlaid(runs: Mapping[str, Sequence[Entry]], only: Sequence[str] = ()) -> dict[str, list[Curve]]:
    """Groups the numbers of runs into diagrams: a metric with its unit -> training and test curves of every run.

    A baseline is drawn in its metric's diagram. The x axis counts optimizer steps if all runs of a diagram log them.
    With several runs their names are part of the labels. ``only`` are the metrics to draw, without ``train_`` or
    ``test_``; all but bookkeeping by default.

    Raises:
        InputError: A requested metric is in none of the logs, or there is nothing to draw.
    """
    names = [name for entries in runs.values() for entry in entries for name in entry if _is_number(entry[name])]
    metrics = list(dict.fromkeys(name.removeprefix("train_").removeprefix("test_") for name in names))
    for wanted in only:
        if wanted not in metrics:
            raise InputError(f"no log has {wanted!r}{did_you_mean(wanted, metrics)}; they have {', '.join(metrics)}")
    shown = only or [metric for metric in metrics if metric not in BOOKKEEPING]
    if not shown:
        raise InputError(
            f"there is nothing to draw: {' and '.join(runs)} logged no metric that is a number, "
            "only bookkeeping such as the number of parameters"
        )
    beside = {BASELINES[metric]: metric for metric in shown if metric in BASELINES}
    steps = [{e["epoch"] + 1: e["step"] for e in entries if _is_number(e.get("step"))} for entries in runs.values()]
    found = {metric: _curves(metric, runs) for metric in shown if metric not in beside}
    for baseline, metric in beside.items():
        found[metric] += _curves(baseline, runs, BASELINE_NAME)
    return {metric + UNITS.get(metric, ""): _over_steps(curves, steps) for metric, curves in found.items()}


def _curves(metric: str, runs: Mapping[str, Sequence[Entry]], name: str = "") -> list[Curve]:
    """Returns a metric's curves, labelled with run and part, or with a name in place of the part."""
    curves, scale = [], 100 if metric in FRACTIONS else 1
    for number, (run, entries) in enumerate(runs.items()):
        for prefix in PREFIXES:
            points = {e["epoch"] + 1: scale * e[prefix + metric] for e in entries if _is_number(e.get(prefix + metric))}
            if points:
                label = f"{run if len(runs) > 1 else ''} {name or prefix.rstrip('_')}".strip()
                curves.append(Curve(label or run, list(points), list(points.values()), number))
    return curves


def _over_steps(curves: list[Curve], steps: Sequence[Mapping[int, int]]) -> list[Curve]:
    """Returns the curves of a diagram over optimizer steps, given each run's steps by epoch, if all are known."""
    if any(epoch not in steps[curve.run] for curve in curves for epoch in curve.epochs):
        return curves
    return [replace(curve, epochs=[steps[curve.run][epoch] for epoch in curve.epochs], unit="step") for curve in curves]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
