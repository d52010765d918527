"""Cells kept in files, the table made of those that are there, and what it says of the paper's orderings."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beit.storage import atomic_write

from .settings import BEIT, COLUMNS, ROWS

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Cells:
    """Scores in files, one a cell and seed, named after what they depend on.

    Args:
        folder: Where the files are.
    """

    folder: Path

    def path(self, column: str, row: str, seed: int, key: str) -> Path:
        """Returns where a score is kept; ``key`` stands for all settings that it depends on."""
        return self.folder / f"{column}-{row}-{seed}-{key}.json"

    def read(self, column: str, row: str, seed: int, key: str) -> dict[str, Any] | None:
        """Returns a kept cell, or None if there is none."""
        path = self.path(column, row, seed, key)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def write(self, column: str, row: str, seed: int, key: str, cell: Mapping[str, Any]) -> None:
        """Keeps a cell; a stop in between leaves none."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.path(column, row, seed, key)) as file:
            file.write(json.dumps({"column": column, "row": row, "seed": seed, **cell}, indent=1).encode() + b"\n")


Scores = Mapping[tuple[str, str], Sequence[float]]  # (row, column) -> one score a seed


def mean_std(scores: Sequence[float]) -> tuple[float, float]:
    """Returns the mean and the standard deviation between seeds (of the sample); NaN for that of one score."""
    return statistics.fmean(scores), statistics.stdev(scores) if len(scores) > 1 else math.nan


def table_cell(scores: Sequence[float], seeds: int) -> str:
    """Returns a cell's text: ``mean ± std``, with how many seeds it is of where some are missing."""
    if not scores:
        return NOT_MEASURED
    mean, std = mean_std(scores)
    text = f"{mean:.1f}" if math.isnan(std) else f"{mean:.1f} ± {std:.1f}"
    return text if len(scores) == seeds else f"{text} ({len(scores)} of {seeds} seeds)"


def markdown(scores: Scores, seeds: int, rows: Sequence[str] = tuple(ROWS)) -> str:
    """Returns the table; cells that are missing say so."""
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---|" + "---:|" * len(COLUMNS)]
    for row in rows:
        cells = [table_cell(scores.get((row, column), ()), seeds) for column in COLUMNS]
        lines.append(f"| {ROWS[row].title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Comparison:
    """BEiT against another row in one column.

    Args:
        difference: Mean of BEiT less that of the other, in points.
        pooled: Root of the mean of both variances between seeds; NaN with fewer than two seeds.
        wins: Seeds in which BEiT is ahead; images and labels of a seed are the same for all rows.
        seeds: Seeds that both have.
    """

    difference: float
    pooled: float
    wins: int
    seeds: int

    @property
    def deviations(self) -> float:
        """The difference in pooled standard deviations; infinite where these are 0."""
        if self.pooled == 0:
            return math.copysign(math.inf, self.difference) if self.difference else 0.0
        return self.difference / self.pooled

    def verdict(self) -> str:
        """Says whether BEiT is ahead by more than one standard deviation, behind, or neither."""
        if math.isnan(self.pooled):
            return "cannot be told from one seed"
        if abs(self.deviations) <= 1:
            return "no difference beyond one standard deviation"
        return "BEiT ahead" if self.difference > 0 else "BEiT behind"


def compare(beit: Sequence[float], other: Sequence[float]) -> Comparison:
    """Compares two cells, whose scores are in the order of the seeds."""
    (ours, our_std), (theirs, their_std) = mean_std(beit), mean_std(other)
    pooled = math.sqrt((our_std**2 + their_std**2) / 2)
    pairs = list(zip(beit, other, strict=False))
    return Comparison(ours - theirs, pooled, sum(a > b for a, b in pairs), len(pairs))


def findings(scores: Scores, rows: Sequence[str] = tuple(ROWS)) -> str:
    """Returns a table of BEiT against each other row, column by column."""
    lines = [
        "| BEiT against | column | difference | in pooled std | seeds won | finding |",
        "|---|---|---:|---:|---:|---|",
    ]
    for row in rows:
        for column, title in COLUMNS.items():
            beit, other = scores.get((BEIT, column), ()), scores.get((row, column), ())
            if row == BEIT:
                continue
            if not beit or not other:
                lines.append(f"| {ROWS[row].title} | {title} | | | | {NOT_MEASURED} |")
                continue
            both = min(len(beit), len(other))  # the first seeds: others would compare other images and labels
            found = compare(beit[:both], other[:both])
            deviations = "" if math.isnan(found.pooled) else f"{found.deviations:+.1f}"
            won = f"{found.wins} of {found.seeds}"
            cells = (ROWS[row].title, title, f"{found.difference:+.1f}", deviations, won, found.verdict())
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
