"""``beit report``: an HTML page about training runs, in one file that loads nothing from elsewhere."""

import base64
import contextlib
import logging
import math
import os
import re
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import TypeGuard

import jinja2

from beit.commands.recipes import Recipe, flat, read_recipe
from beit.commands.settings import ReportConfig
from beit.config import read_run_settings, recipe_names
from beit.errors import InputError, counted
from beit.outputs import check_outputs
from beit.storage import atomic_write, read_json
from beit.training.environment import ENVIRONMENT
from beit.visualization.curves import FRACTIONS, overlaid, read_log
from beit.visualization.plots import draw_curves

logger = logging.getLogger(__name__)

MAX_PICTURE_BYTES = 4_000_000  # of all pictures, so that the page can be sent by mail
NOT_RESULTS = (ENVIRONMENT, "config.json", "made_with.json")
# A setting that only one kind of run has -> that kind; the first match counts.
KINDS = {"decode_head": "segmentation", "num_mask_patches": "pre-training", "codebook_size": "tokenizer"}
KINDS |= {"num_tokens": "tokenizer", "avgpool_patchtokens": "linear probe", "layer_decay": "fine-tuning"}
# Metrics in the table of results, the most important first; what recipes quote of them has the name without "test_".
METRICS = {
    "test_acc1": "top-1 accuracy",
    "test_acc5": "top-5 accuracy",
    "test_mIoU": "mean IoU",
    "test_mAcc": "mean class accuracy",
    "test_aAcc": "pixel accuracy",
    "test_mlm_acc": "masked-token accuracy, validation",
    "test_mlm_acc_1": "masked-token accuracy, validation",
    "test_mlm_acc_2": "masked-token accuracy through the class token, validation",
    "test_most_frequent_acc": "share of the most frequent token",
    "train_mlm_acc": "masked-token accuracy, training",
    "train_mlm_acc_1": "masked-token accuracy, training",
    "train_mlm_acc_2": "masked-token accuracy through the class token, training",
    "test_unigram_entropy": "loss of a guess by the tokens' frequencies",
    "test_psnr": "PSNR of reconstructions (dB)",
    "test_ssim": "SSIM of reconstructions",
    "test_perplexity": "codebook perplexity",
    "test_used_codes": "tokens in use",
    "test_rec_loss": "distance from the teacher",
    "test_loss": "validation loss",
    "train_loss": "training loss",
    "train_grad_norm": "gradient norm",
    "n_parameters": "parameters",
}
PERCENTAGES, SHARES = {"acc1", "acc5"}, {"acc", "mIoU", "mAcc", "aAcc", "accuracy", "share"}  # words of their names
WITHOUT_BEST = ("test_most_frequent_acc", "test_unigram_entropy", "train_grad_norm", "n_parameters")
MAIN_CURVES = ("loss", "mlm_acc", "mlm_acc_1", "mlm_acc_2", "class_acc", "acc1", "mIoU", "pixel_acc", "perplexity")


@dataclass(frozen=True)
class Run:
    """A training run, as read from its folder."""

    name: str  # on the page
    path: Path
    entries: Sequence[Mapping[str, object]]  # of the log, one per epoch or evaluation
    settings: Mapping[str, object] = field(default_factory=dict)  # empty without a config.yaml
    changed: set[str] | None = None  # settings that differ from their defaults; None if that is unknown
    environment: Mapping[str, object] = field(default_factory=dict)  # recorded versions, device and command
    recipe: Recipe | None = None  # that it reproduces

    @property
    def kind(self) -> str:
        """What was trained, one of ``KINDS``, or ``training``."""
        return next((kind for setting, kind in KINDS.items() if setting in self.settings), "training")

    @property
    def unit(self) -> str:
        """What the run is counted in: epochs, or optimizer steps."""
        return "step" if "step" in self.entries[-1] and "epochs" not in self.settings else "epoch"

    @property
    def state(self) -> str:
        """How far the run got, such as ``3 of 10 epochs``."""
        done = self.position(self.entries[-1])
        planned = self.settings.get("max_steps" if self.unit == "step" else "epochs")
        text = counted(done, self.unit)
        if isinstance(planned, int) and planned > done:
            text = f"{done:,} of {counted(planned, self.unit)}"
        diverged = any(not math.isfinite(loss) for loss, _ in self.values("train_loss")[-1:])
        return f"{text}{', diverged' * diverged}"

    def position(self, entry: Mapping[str, object]) -> int:
        """Returns the epochs, or optimizer steps, done at an entry of the log."""
        return int(str(entry["step"])) if self.unit == "step" else int(str(entry["epoch"])) + 1

    def values(self, key: str) -> list[tuple[float, int]]:
        """Returns the values of a metric, each with its epoch or optimizer step."""
        return [(value, self.position(it)) for it in self.entries if _is_number(value := it.get(key))]

    def departures(self) -> dict[str, tuple[object, object]]:
        """Returns the settings that differ from the recipe's: the recipe's value and the run's, by name."""
        own = dict(self.recipe.own) if self.recipe else {}
        own.pop("batch_size", None)  # one batch can be split in many ways
        if not self.settings.get("total_batch_size"):
            own.pop("total_batch_size", None)
        found = {key: (value, self.settings.get(key)) for key, value in own.items()}
        return {key: pair for key, pair in found.items() if as_text(pair[0]) != as_text(pair[1])}

    @property
    def command(self) -> list[str]:
        """The command that started the run, word by word; empty if it is not recorded."""
        words = self.environment.get("command")
        return [str(word) for word in words] if isinstance(words, list) else []


def main(config: ReportConfig) -> None:
    """Writes the page; raises InputError for a missing ``--output``, or what :func:`read_runs` and others refuse."""
    if not config.output:
        raise InputError("-o is missing: give the file to write, such as report.html")
    (output,) = check_outputs("-o", [config.output], config.overwrite)
    text = render(read_runs(config.runs, config.recipe), config.title, config.pictures, config.results)
    page = text.encode(errors="backslashreplace")  # a title or name from the command line may be no UTF-8
    with atomic_write(output) as file:
        file.write(page)
    logger.info("wrote %s: %s, %.1f MB", output, counted(len(config.runs), "run"), len(page) / 1e6)


def render(runs: Sequence[Run], title: str, pictures: Sequence[str] = (), results: Sequence[str] = ()) -> str:
    """Returns the page about some runs, with further pictures and JSON files of results."""
    files = {path: read_json(Path(path)) for path in results}
    for run in runs:
        for file in sorted(run.path.glob("*.json")):
            with contextlib.suppress(InputError):  # not every JSON file holds results
                files |= {} if file.name in NOT_RESULTS else {f"{run.name}/{file.name}": read_json(file)}
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"value": as_text, "shell": shlex.join}
    template = environment.from_string((resources.files("beit.commands") / "report.html").read_text(encoding="utf-8"))
    kinds = {run.kind: [other for other in runs if other.kind == run.kind] for run in runs}
    return template.render(
        title=title,
        now=f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        runs=[(run, results_of(run)) for run in runs],
        curves={kind: drawn for kind, same in kinds.items() if any(drawn := _curves(same))},
        pictures=list(_pictures(runs, pictures)),
        results={
            name: {key: _shown(value, key) if _is_number(value) else value for key, value in flat(content).items()}
            for name, content in files.items()
        },
    )


def results_of(run: Run) -> list[tuple[str, str, str, str]]:
    """Returns the rows of a run: metric, quoted value, last value, best value and when it was reached."""
    quoted, rows = dict(run.recipe.quoted) if run.recipe else {}, []
    for key, label in METRICS.items():
        values = run.values(key)
        names = (key, key.removeprefix("test_"), key.removeprefix("n_"))
        stated = _quoted(next((quoted.pop(name) for name in names if name in quoted), ""), key)
        if not (values or stated):
            continue
        finite = [pair for pair in values if math.isfinite(pair[0])]
        value, when = (min if key.endswith("loss") else max)(finite, key=lambda pair: pair[0], default=(0, 0))
        best = f"{_shown(value, key)} ({run.unit} {when:,})" if len(finite) > 1 and key not in WITHOUT_BEST else ""
        rows.append((label, stated, _shown(values[-1][0], key) if values else "", best))
    return rows + [(key, _quoted(value, key.rpartition(" ")[2]), "", "") for key, value in flat(quoted).items()]


def _quoted(value: object, key: str) -> str:
    if not _is_number(value):
        return str(value)
    return _shown(value / 100 if key.removeprefix("test_") in FRACTIONS and value > 1 else value, key)


def read_runs(paths: Sequence[str], recipe: str = "") -> list[Run]:
    """Reads run folders, each named by its path below their common parent; see :func:`read_run` for ``recipe``."""
    folders = [Path(os.path.abspath(path)) for path in paths]
    if twice := next((folder for folder in folders if folders.count(folder) > 1), None):
        raise InputError(f"{twice} is given twice")
    common = os.path.commonpath([folder.parent for folder in folders])
    return [read_run(folder, str(folder.relative_to(common)), recipe) for folder in folders]


def read_run(path: Path, name: str, recipe: str = "") -> Run:
    """Reads a run folder under a ``name``; raises InputError if it has no log with a finished epoch.

    ``recipe`` is the one to compare with: ``-`` for none, by default the one the run was started with.
    """
    if not (path / "log.txt").is_file():
        inside = sorted(str(file.parent) for file in path.glob("*/log.txt"))[:6]
        raise InputError(f"{path} has no log.txt" + (f"; runs inside it: {', '.join(inside)}" if inside else ""))
    config, recorded = path / "config.yaml", path / ENVIRONMENT
    settings, changed = read_run_settings(config) if config.is_file() else ({}, None)
    environment = read_json(recorded) if recorded.is_file() else {}
    run = Run(name, path, read_log(path), settings, changed, environment)
    return replace(run, recipe=None if recipe == "-" else read_recipe(recipe) if recipe else _recipe_of(run))


def _recipe_of(run: Run) -> Recipe | None:
    """Returns the recipe that a run's command, or segmentation's setting ``config``, names."""
    words = shlex.join(run.command).replace("--config=", "--config ").split()
    named = [after for word, after in pairwise(words) if word == "--config"]
    if name := next((name for name in named if name in recipe_names()), None):
        return read_recipe(name)
    configs = {Path(name).stem for name in [*named, str(run.settings.get("config") or "none")]}
    recipes = (read_recipe(name) for name in recipe_names() if name.startswith("segment"))
    return next((recipe for recipe in recipes if recipe.trains and recipe.fact("config") in configs), None)


def _curves(runs: Sequence[Run]) -> tuple[list[str], list[str]]:
    found = overlaid({run.name: run.entries for run in runs})
    drawn: tuple[list[str], list[str]] = ([], [])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "curves.svg"
        for title, curves in found.items():
            if any(len(curve.epochs) > 1 for curve in curves):
                draw_curves(path, {title: curves})
                drawn[title.split()[0] not in MAIN_CURVES].append(_data_uri("svg+xml", path.read_bytes()))
    return drawn


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _pictures(runs: Sequence[Run], further: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields names and data URIs of pictures, as long as they fit onto the page."""
    paths = {path: Path(path) for path in further}
    paths |= {f"{run.name}/{path.name}": path for run in runs for path in sorted(run.path.glob("*.png"))}
    left = MAX_PICTURE_BYTES
    for name, path in paths.items():
        content = path.read_bytes()
        if not content.startswith(b"\x89PNG") or len(content) > left:
            logger.warning("%s left out: no PNG, or too large for the page", path)
            continue
        left -= len(content)
        yield name, _data_uri("png", content)


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: float, key: str = "") -> str:
    """Returns a number for readers: accuracies in percent, whole numbers in groups of three, others with 4 digits."""
    words = set(re.split(r"[\W_]+", key))
    if words & (PERCENTAGES | SHARES):
        return f"{value * (100 if words & SHARES else 1):.2f}\N{NO-BREAK SPACE}%"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def as_text(value: object) -> str:
    """Returns a setting or another plain value in words."""
    if isinstance(value, Mapping):
        value = [f"{key}={item}" for key, item in value.items()]
    if isinstance(value, float):
        return f"{value:.6g}"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else "none" if value is None else str(value)
