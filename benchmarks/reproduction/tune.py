"""Chooses the recipes of the evaluations, for "from scratch" and for pre-trained backbones each, on another seed.

    cd benchmarks && python -m reproduction.tune --output_dir tuning --results results/tune_small.json

Nothing is tuned on a reported seed, and both starts get the same number of epochs or iterations. The pre-trained
recipe is chosen with BEiT's backbone and serves all pre-trained rows. What is best goes into settings.py by hand.
"""

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beit.config import option
from beit.launch import launch
from beit.tasks.settings import AMP_CHOICES

from .comparison import computed_in, machine, write_json
from .jobs import Jobs, digest
from .settings import BEIT, PRESETS, SCRATCH
from .table import NOT_MEASURED, Cells

logger = logging.getLogger("beit.reproduction")

# What is tried, by column and row.
TRIALS: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]] = {
    ("finetune", SCRATCH): [{"lr": lr, "layer_decay": 1.0} for lr in (5e-4, 1e-3, 2e-3, 4e-3)],
    ("segment", SCRATCH): [{"lr": lr, "layer_decay": 1.0} for lr in (4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)],
    ("linear", SCRATCH): [{"lr": lr} for lr in (1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)],
    ("finetune", BEIT): [
        {"lr": lr, "layer_decay": decay} for lr, decay in ((5e-4, 1.0), (1e-3, 1.0), (2e-3, 1.0), (1e-3, 0.8))
    ],
    ("segment", BEIT): [{"lr": lr, "layer_decay": decay} for lr, decay in ((4e-3, 1.0), (8e-3, 1.0), (8e-3, 0.75))],
    ("linear", BEIT): [{"lr": lr} for lr in (1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)],
}


@dataclass(frozen=True)
class TuningConfig:
    """The flags of the tuning script."""

    preset: str = option("cpu", "size of the comparison", choices=tuple(PRESETS))
    output_dir: str = option("tuning", "folder for images, runs and scores; a run goes on there")
    amp_dtype: str = option("auto", "number format of all runs", choices=AMP_CHOICES)
    only: tuple[str, ...] = option((), "a column, a row such as scratch, or one of each; all by default")
    table: bool = option(False, "run nothing, give the scores that are there")
    results: str = option("", "JSON file for the scores")


def main(config: TuningConfig) -> None:
    """Scores every trial that has no score yet, and says which is best."""
    preset = computed_in(PRESETS[config.preset], config.amp_dtype)
    jobs, cells = Jobs(Path(config.output_dir), preset, preset.tuning_seed), Cells(Path(config.output_dir) / "cells")
    found: list[dict[str, Any]] = []
    for (column, row), trials in TRIALS.items():
        if config.only and not {column, row} >= set(config.only):
            continue
        scores = [_score(jobs, cells, column, row, trial, run=not config.table) for trial in trials]
        best = max((score for score in scores if score is not None), default=None)
        for score, trial in zip(scores, trials, strict=True):
            told = NOT_MEASURED if score is None else f"{score:.2f}{'  <- best' if score == best else ''}"
            found.append({"column": column, "row": row, **trial, "score": score})
            sys.stdout.write(f"{column} {row} {trial}: {told}\n")
        sys.stdout.flush()
    if config.results:
        write_json(Path(config.results), {"machine": machine(), "seed": preset.tuning_seed, "trials": found})


def _score(
    jobs: Jobs, cells: Cells, column: str, row: str, trial: Mapping[str, Any], *, run: bool = True
) -> float | None:
    settings = {**jobs.evaluation(column, row), **trial}
    key = digest([jobs.recipe(row), settings])
    kept = cells.read(column, row, jobs.seed, key)
    if kept is None and run:
        jobs.backbone(row)
        began = time.monotonic()
        kept = {"score": jobs.score(column, row, settings), "settings": settings}
        cells.write(column, row, jobs.seed, key, {**kept, "seconds": round(time.monotonic() - began, 1)})
        logger.info("trial: %s of %s with %s: %.2f", column, row, trial, kept["score"])
    return None if kept is None else kept["score"]


if __name__ == "__main__":
    sys.exit(launch(TuningConfig, main, __doc__))
