"""The comparison: every cell once, kept in a file, in an order that keeps a table made in between fair."""

import json
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from beit.config import option
from beit.errors import InputError
from beit.storage import atomic_write
from beit.tasks.settings import AMP_CHOICES

from .jobs import Jobs, digest
from .settings import COLUMNS, PRESETS, ROWS, Preset
from .table import Cells, Scores, findings, markdown

logger = logging.getLogger("beit.reproduction")

BEGIN, END = "<!-- measured -->", "<!-- end -->"  # of the part of a page that is written here
VERSION = 1  # of the code below the cells; a change that alters results makes all cells anew


@dataclass(frozen=True)
class ReproductionConfig:
    """The flags of ``benchmarks/reproduce_small.py``."""

    preset: str = option("cpu", "size of the comparison", choices=tuple(PRESETS))
    quick: bool = option(False, "the same as --preset quick: minutes, to see it work")
    output_dir: str = option("reproduction", "folder for images, runs and the cells of the table; a run goes on there")
    table: bool = option(False, "run nothing, print the table of the cells that are there")
    amp_dtype: str = option(
        "auto", "number format of all runs; bf16 is twice as fast on CPUs that know it", choices=AMP_CHOICES
    )
    minutes: float = option(0.0, "start no other cell after this long; the next run goes on. 0 for no limit")
    results: str = option("", "JSON file for the scores, settings and machine")
    page: str = option("", "page whose part between the markers `measured` and `end` becomes the table")


def main(config: ReproductionConfig) -> None:
    """Runs the cells that are missing, and prints the table.

    Raises:
        InputError: The settings are not possible.
    """
    if config.minutes < 0:
        raise InputError(f"--minutes {config.minutes:g}: must be 0 or more")
    name = "quick" if config.quick else config.preset
    preset, folder = computed_in(PRESETS[name], config.amp_dtype), Path(config.output_dir) / name
    if not config.table:
        run(preset, folder, config.minutes)
    results = collect(name, preset, folder)
    if config.results:
        write_json(Path(config.results), results)
    if config.page:
        write_page(Path(config.page), report(results))
    sys.stdout.write(report(results))


def computed_in(preset: Preset, amp_dtype: str) -> Preset:
    """Returns a preset whose runs compute in a number format."""
    return replace(preset, machine={**preset.machine, "amp_dtype": amp_dtype})


def run(preset: Preset, folder: Path, minutes: float = 0.0) -> None:
    """Runs the cells that are missing.

    Args:
        preset: What to run.
        folder: Where everything is kept.
        minutes: After so long no other cell begins; 0 for no limit.
    """
    began, cells = time.monotonic(), Cells(folder / "cells")
    for jobs, row, column in in_order(preset, folder):
        key = cell_key(jobs, row, column)
        if cells.read(column, row, jobs.seed, key) is not None:
            continue
        if minutes and time.monotonic() - began > 60 * minutes:
            logger.info("%g minutes are over: the same command goes on from here", minutes)
            return
        jobs.backbone(row)  # outside the clock below: the four columns share it
        started = time.monotonic()
        score = jobs.score(column, row)
        seconds = time.monotonic() - started
        cells.write(column, row, jobs.seed, key, {"score": score, "seconds": round(seconds, 1)})
        logger.info("cell: %s, %s, seed %d: %.2f", ROWS[row].title, COLUMNS[column], jobs.seed, score)


def in_order(preset: Preset, folder: Path) -> Iterator[tuple[Jobs, str, str]]:
    """Yields jobs, row and column of every cell, seed by seed: at any time all rows have as many seeds, or one less."""
    for seed in preset.seeds:
        jobs = Jobs(folder, preset, seed)
        for row in preset.rows:
            for column in COLUMNS:
                yield jobs, row, column


def cell_key(jobs: Jobs, row: str, column: str) -> str:
    """Returns what stands for all that a cell depends on."""
    return digest([VERSION, jobs.recipe(row), dict(jobs.evaluation(column, row))])


# ------------------------------------------------------------------------------------------------------- the results
def collect(name: str, preset: Preset, folder: Path) -> dict[str, Any]:
    """Returns the cells that are there, and what they were made with and on."""
    cells = Cells(folder / "cells")
    found = [
        cell
        for jobs, row, column in in_order(preset, folder)
        if (cell := cells.read(column, row, jobs.seed, cell_key(jobs, row, column))) is not None
    ]
    trainings = sum(float(path.read_text(encoding="utf-8") or 0) for path in folder.glob("*/done"))
    return {
        "measured": "with this library, on the machine below",
        "preset": name,
        "seeds": list(preset.seeds),
        "machine": machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "minutes": {
            "tokenizers and pre-training": round(trainings / 60, 1),
            "evaluation": round(sum(cell["seconds"] for cell in found) / 60, 1),
        },
        "settings": asdict(preset),
        "cells": found,
    }


def scores_of(results: dict[str, Any]) -> Scores:
    """Returns the scores by row and column, in the order of the seeds."""
    scores: dict[tuple[str, str], list[float]] = {}
    for cell in sorted(results["cells"], key=lambda cell: results["seeds"].index(cell["seed"])):
        scores.setdefault((cell["row"], cell["column"]), []).append(cell["score"])
    return scores


def report(results: dict[str, Any]) -> str:
    """Returns the table, the findings and what they were measured on, in Markdown."""
    scores, seeds, minutes, versions = (scores_of(results), *(results[key] for key in ("seeds", "minutes", "versions")))
    number_format, rows = results["settings"]["machine"].get("amp_dtype", "auto"), results["settings"]["rows"]
    about = (
        f"**Measured**: preset {results['preset']}, mean ± standard deviation of {len(seeds)} seeds, in percent. "
        f"{results['machine']}, {results['threads']} thread(s), number format {number_format}; "
        f"Python {versions['python']}, PyTorch {versions['torch']}. "
        f"{minutes['tokenizers and pre-training']} minutes of tokenizers and pre-training, {minutes['evaluation']} of "
        "evaluation, on the wall clock."
    )
    return f"{about}\n\n{markdown(scores, len(seeds), rows)}\n{findings(scores, rows)}"


def write_page(path: Path, text: str) -> None:
    """Puts text between the markers of a page.

    Raises:
        InputError: The page has no such markers.
    """
    page = path.read_text(encoding="utf-8") if path.exists() else ""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise InputError(f"{path} has no place for the table: it needs the lines {BEGIN} and {END}")
    with atomic_write(path) as file:
        file.write(f"{before}{BEGIN}\n{text}{END}{after}".encode())


def machine() -> str:
    """Returns what computes: the GPU where there is one, and the processor."""
    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text(encoding="utf-8").splitlines()
        processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), processor)
    text = f"{os.cpu_count()} CPU cores, {processor}"
    return f"{torch.cuda.get_device_name()}, {text}" if torch.cuda.is_available() else text


def write_json(path: Path, values: Any) -> None:
    """Writes a JSON file; a stop in between leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(json.dumps(values, indent=1).encode() + b"\n")
