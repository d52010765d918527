"""``beit report``: runs on one page that stands alone, to read, to print and to send."""

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

from beit.commands import report_results, report_runs
from beit.commands.run_record import Kind, RunRecord, read_run
from beit.commands.settings import ReportConfig
from beit.errors import InputError
from beit.storage import atomic_write
from beit.visualization.curves import BOOKKEEPING, Curve, diagrams
from beit.visualization.diagram import diagram, thinned
from beit.visualization.markup import Content, Markup, element
from beit.visualization.page import fold, page, picture, section

logger = logging.getLogger(__name__)

MOST_BYTES = 5_000_000  # of a page, so that it can be sent
PICTURE_BYTES = 3_200_000  # of these at most for pictures
MOST_POINTS = 40_000  # of all curves; each takes some 25 bytes
METRICS = {
    "loss": "loss",
    "mlm_acc": "masked tokens found",
    "class_acc": "right in training (share)",
    "acc1": "accuracy (%)",
    "acc5": "right among the first five (%)",
    "mIoU": "mean IoU",
    "pixel_acc": "pixels right in training",
    "perplexity": "codebook perplexity",
    "reconstruction_loss": "reconstruction loss",
}
OTHER_METRICS = {
    "grad_norm": "norm of the gradient",
    "lr": "learning rate, the highest",
    "used_codes": "tokens in use",
    "dead_codes": "tokens never used",
    "kl": "KL divergence of an image",
    "kl_per_token": "KL divergence of a token",
    "kl_weight": "weight of the KL divergence",
    "temperature": "temperature",
    "mAcc": "mean accuracy of the classes",
    "aAcc": "pixels right",
    "decode_loss": "loss of the head",
    "aux_loss": "loss of the auxiliary head",
}
BASELINE, BASELINE_OF = "most_frequent_acc", "mlm_acc"  # a curve that belongs into another's diagram


def main(config: ReportConfig) -> None:
    """Writes the page.

    Raises:
        InputError: A folder or file is missing or is not what it should be, or ``--output`` is missing.
    """
    if not config.output:
        raise InputError("-o is missing: the page to write, such as -o report.html")
    if Path(config.output).is_dir():
        raise InputError(f"-o {config.output} is a folder: give a file, such as {Path(config.output) / 'report.html'}")
    runs = read_runs(config.runs, config.recipe)
    for run in runs:
        if run.skipped_lines:
            logger.warning("%s: %d lines that cannot be read were skipped", run.path / "log.txt", run.skipped_lines)
    text = compose(runs, config.title, config.pictures, config.results).encode()
    if len(text) > MOST_BYTES:
        logger.warning("the page has %.1f MB: give fewer runs at once", len(text) / 1e6)
    _write(Path(config.output), text)
    logger.info("%s written: %d runs, %.1f MB", config.output, len(runs), len(text) / 1e6)


def _write(path: Path, text: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {path.parent}: {error.strerror}") from error
    with atomic_write(path) as file:
        file.write(text)


def read_runs(paths: Sequence[str], recipes: Sequence[str] = ()) -> list[RunRecord]:
    """Reads run folders, each named by its path below the folder that they share.

    Raises:
        InputError: A folder is given twice or is none of a run, or there are not as many recipes as folders.
    """
    folders = [Path(os.path.abspath(path)) for path in paths]
    for folder in folders:
        if folders.count(folder) > 1:
            raise InputError(f"{folder} is given twice")
    if len(recipes) not in (0, 1, len(folders)):
        raise InputError(f"--recipe: {len(recipes)} names for {len(folders)} runs: give one for all, or one each")
    shared = os.path.commonpath([folder.parent for folder in folders])
    names = [str(folder.relative_to(shared)) for folder in folders]
    compared = list(recipes) * len(folders) if len(recipes) == 1 else list(recipes) or [""] * len(folders)
    return [
        read_run(Path(path), name, "" if recipe == "-" else recipe)
        for path, name, recipe in zip(paths, names, compared, strict=True)
    ]


def compose(runs: Sequence[RunRecord], title: str, pictures: Sequence[str] = (), results: Sequence[str] = ()) -> str:
    """Returns the page.

    Args:
        runs: What it is about.
        title: What stands above.
        pictures: Further PNG files.
        results: Further JSON files of results.

    Raises:
        InputError: One of these files is missing, or is not what it should be.
    """
    further = report_results.read_files(results)
    shown = _pictures(runs, pictures)
    parts = [
        section("summary", "Summary", report_results.summary(runs)),
        section("results", "Results", report_results.tables(runs, further)),
        section("curves", "Curves", _curves(runs)),
        section("pictures", "Pictures", *shown) if shown else None,
        section("runs", "Runs", *(report_runs.article(run, number) for number, run in enumerate(runs))),
    ]
    names = {"summary": "Summary", "results": "Results", "curves": "Curves", "pictures": "Pictures", "runs": "Runs"}
    links = [
        element("li", element("a", name, href=f"#{key}")) for key, name in names.items() if key != "pictures" or shown
    ]
    header = [
        element("h1", title),
        element("p", _lead(runs), class_="lead"),
        element("nav", element("ul", *links), aria_label="Contents"),
    ]
    return page(title, header, parts, _footer())


def _lead(runs: Sequence[RunRecord]) -> str:
    kinds = list(dict.fromkeys(run.kind.name for run in runs))
    listed = kinds[0] if len(kinds) == 1 else f"{', '.join(kinds[:-1])} and {kinds[-1]}"
    count = "One run" if len(runs) == 1 else f"{len(runs)} runs"
    return f"{count} of BEiT: {listed}. Settings, results, curves and commands, as the run folders tell them."


def _footer() -> Content:
    now = datetime.now(timezone.utc)
    return [
        element(
            "p",
            report_results.QUOTED, " is a number that a recipe's source states; it was not measured here. ",
            report_results.MEASURED, " is a number from the log of a run on this page.",
        ),
        element("p", f"Written by beit report on {now:%Y-%m-%d} at {now:%H:%M} UTC. It loads nothing from elsewhere."),
    ]  # fmt: skip


# Curves


def _curves(runs: Sequence[RunRecord]) -> Content:
    kinds = list(dict.fromkeys(run.kind for run in runs))
    groups = [(kind, *_diagrams([run for run in runs if run.kind is kind])) for kind in kinds]
    count = sum(len(curves) for _, main, rest in groups for curves in (*main.values(), *rest.values()))
    most, number, parts = MOST_POINTS // max(count, 1), 0, []
    for kind, first, rest in groups:
        drawn: list[list[Markup]] = []
        unit = next(run.unit for run in runs if run.kind is kind)
        for part in (first, rest):
            drawn.append([])
            for metric, curves in part.items():
                kept = [thinned(curve, most) for curve in curves]
                drawn[-1].append(diagram(_title(metric), kept, x_label=unit, number=number))
                number += 1
        parts.append(_group(kind, drawn[0], drawn[1]))
    hint = (
        "Drag across a diagram to zoom in, double-click to see all. "
        "The pointer, a finger or the arrow keys read values off."
    )
    return [element("p", hint, class_="note tip") if number else None, *parts]


def _group(kind: Kind, first: list[Markup], rest: list[Markup]) -> list[Content]:
    title = element("h3", kind.name[0].upper() + kind.name[1:])
    if not first and not rest:
        return [title, element("p", "One entry in the log: there is no curve to draw, see its results.", class_="note")]
    more = fold("More curves", element("div", *rest, class_="diagrams"), remark=f"{len(rest)}", class_="more")
    return [title, element("div", *first, class_="diagrams"), more if rest else None]


def _title(metric: str) -> str:
    name = METRICS.get(metric) or OTHER_METRICS.get(metric)
    return name if name else metric


def _diagrams(runs: Sequence[RunRecord]) -> tuple[dict[str, list[Curve]], dict[str, list[Curve]]]:
    """Returns the curves of runs of one kind by metric: those that tell most, and the rest."""
    found = diagrams({run.name: run.entries for run in runs}, [])
    if BASELINE in found and BASELINE_OF in found:
        found[BASELINE_OF] += [_baseline(curve, len(runs) > 1) for curve in found.pop(BASELINE)]
    for curves in found.values():
        curves[:] = [_in_steps(curve, runs[curve.run]) for curve in curves]
    drawn = {metric: curves for metric, curves in found.items() if any(len(curve.epochs) > 1 for curve in curves)}
    drawn = {metric: curves for metric, curves in drawn.items() if metric not in BOOKKEEPING}
    first = {metric: drawn.pop(metric) for metric in METRICS if metric in drawn}
    return first, drawn


def _baseline(curve: Curve, several: bool) -> Curve:
    name = curve.label.rpartition(" ")[0] if several else ""
    return replace(curve, label=f"{name} most frequent token".strip())


def _in_steps(curve: Curve, run: RunRecord) -> Curve:
    """Returns a curve over optimizer steps, where the run counts those."""
    if not run.counts_steps:
        return curve
    steps = {entry["epoch"] + 1: run.position(entry) for entry in run.entries}
    return replace(curve, epochs=[steps[epoch] for epoch in curve.epochs])


# Pictures


def _pictures(runs: Sequence[RunRecord], more: Sequence[str]) -> list[Content]:
    """Returns the pictures that fit onto the page, and which do not."""
    for path in map(Path, more):
        if not path.is_file():
            raise InputError(f"--pictures {path}: there is no such file")
    chosen = [(Path(path), "") for path in more] + [(path, run.name) for run in runs for path in run.pictures]
    shown, left_out, free = [], [], PICTURE_BYTES
    for path, run in chosen:
        words = path.stem.replace("_", " ").replace("-", " ")
        origin = f"of {run}" if run else ""
        caption = [
            element("b", words[0].upper() + words[1:]),
            f" {origin}, " if origin else ", ",
            element("code", path.name),
        ]
        made = picture(path, caption, f"Picture {words} {origin}".strip())
        if made is None or len(made) > free:
            left_out.append(f"{run}/{path.name}" if run else path.name)
            continue
        free -= len(made)
        shown.append(made)
    if not chosen:
        return []
    missing = f"Left out, since they are no pictures or the page would become too large: {', '.join(left_out)}."
    return [element("div", *shown, class_="pictures"), element("p", missing, class_="note") if left_out else None]
