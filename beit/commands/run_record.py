"""What a run folder tells about its run, whichever job wrote it: kind, settings, numbers, environment, recipe."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from beit.commands.published import SEGMENTATION, Recipe, read_recipe
from beit.config import from_plain, read_run_settings, recipe_names, to_plain
from beit.errors import InputError
from beit.tasks.settings import DvaeConfig, FinetuningConfig, LinearProbeConfig, PretrainingConfig
from beit.training.environment import ENVIRONMENT

Entry = Mapping[str, Any]
NOT_RESULTS = (ENVIRONMENT, "config.json", "made_with.json")
MOST_SHOWN = 6  # names in an error
# One batch may be shared out in many ways.
SHARED_OUT = ("batch_size", "batch_size_per_gpu", "update_freq", "total_batch_size")


@dataclass(frozen=True)
class Measure:
    """A number of ``log.txt`` that says what a run is worth.

    Args:
        key: Its name there.
        label: What it is called on the page.
        quoted: Its name among a recipe's quoted results.
        higher: Whether more is better.
        scale: What it is multiplied by to be read as sources quote it.
        unit: What stands behind it.
    """

    key: str
    label: str
    quoted: str = ""
    higher: bool = True
    scale: float = 1.0
    unit: str = ""


@dataclass(frozen=True)
class Kind:
    """A kind of run.

    Args:
        name: As the page says it.
        script: Its launcher.
        config: Its settings, if ``beit`` knows them.
        setting: A setting that only this kind has.
        logged: A number that only its log has.
        measures: What counts, the most telling one first.
    """

    name: str
    script: str
    config: type | None
    setting: str
    logged: str
    measures: tuple[Measure, ...]


_PERCENT: dict[str, Any] = {"unit": "\N{NO-BREAK SPACE}%"}
_ACCURACY = (
    Measure("test_acc1", "accuracy on test images", "acc1", **_PERCENT),
    Measure("test_acc5", "right among the first five", "acc5", **_PERCENT),
    Measure("test_loss", "loss on test images", "loss", higher=False),
)
KINDS = (
    Kind(
        "pre-training",
        "run_beit_pretraining.py",
        PretrainingConfig,
        "num_mask_patches",
        "train_mlm_acc",
        (
            Measure("test_mlm_acc", "masked tokens found, held-out images"),
            Measure("train_mlm_acc", "masked tokens found, in training", "train_mlm_acc"),
            Measure("test_loss", "loss on held-out images", higher=False),
            Measure("train_loss", "loss in training", "train_loss", higher=False),
        ),
    ),
    Kind(
        "tokenizer (discrete VAE)",
        "run_dvae_training.py",
        DvaeConfig,
        "num_tokens",
        "train_kl",
        (
            Measure("test_loss", "reconstruction loss, held-out images", higher=False),
            Measure("test_perplexity", "codebook perplexity"),
            Measure("test_used_codes", "tokens in use"),
            Measure("train_loss", "loss in training", higher=False),
        ),
    ),
    Kind(
        "linear probe",
        "run_linear_eval.py",
        LinearProbeConfig,
        "avgpool_patchtokens",
        "test_best_layer",
        _ACCURACY,
    ),
    Kind("fine-tuning", "run_class_finetuning.py", FinetuningConfig, "layer_decay", "train_class_acc", _ACCURACY),
    Kind(
        "segmentation",
        "semantic_segmentation/tools/train.py",
        None,
        "decode_head",
        "train_pixel_acc",
        (
            Measure("test_mIoU", "mean IoU", "mIoU", scale=100, **_PERCENT),
            Measure("test_mAcc", "mean accuracy of the classes", "mAcc", scale=100, **_PERCENT),
            Measure("test_aAcc", "pixels that are right", "aAcc", scale=100, **_PERCENT),
        ),
    ),
)
UNKNOWN = Kind("training", "", None, "", "", (Measure("train_loss", "loss in training", higher=False),))
_ORDER = (KINDS[4], *KINDS[:4])  # segmentation too has a layer_decay


@dataclass(frozen=True)
class RunRecord:
    """A run, as its folder tells it.

    Args:
        name: On the page.
        path: The folder.
        kind: What was trained.
        entries: The log, an entry an epoch.
        skipped_lines: Lines of the log that cannot be read.
        settings: All settings; empty without a ``config.yaml``.
        changed: Settings that differ from their defaults; None where that is not known.
        environment: What was stored of it; empty if nothing was.
        pictures: PNG files.
        results: Numbers of other jobs, by the file they are in.
        recipe: The published run that it was started as.
        notes: What could not be read.
    """

    name: str
    path: Path
    kind: Kind
    entries: Sequence[Entry]
    skipped_lines: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    changed: frozenset[str] | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)
    pictures: Sequence[Path] = ()
    results: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    recipe: Recipe | None = None
    notes: Sequence[str] = ()

    def last(self, key: str) -> float | None:
        """Returns the newest value of a number of the log."""
        return next((entry[key] for entry in reversed(self.entries) if is_number(entry.get(key))), None)

    def best(self, measure: Measure) -> tuple[float, int] | None:
        """Returns the best value, and the number of its epoch (or optimizer step)."""
        found = [(entry[measure.key], self.position(entry)) for entry in self.entries if _finite(entry, measure.key)]
        return (max if measure.higher else min)(found, key=lambda pair: pair[0]) if found else None

    def position(self, entry: Entry) -> int:
        """Returns where in the run an entry is: epochs done, or optimizer steps where the run counts those."""
        return entry["step"] if self.counts_steps and is_number(entry.get("step")) else entry["epoch"] + 1

    @property
    def counts_steps(self) -> bool:
        """Whether the run is counted in optimizer steps."""
        return "max_iters" in self.settings or any("step" in entry for entry in self.entries)

    @property
    def unit(self) -> str:
        """What the run is counted in."""
        return "step" if self.counts_steps else "epoch"

    @property
    def done(self) -> int:
        """How far it has got."""
        return self.position(self.entries[-1])

    @property
    def planned(self) -> int | None:
        """How far it is to go, where that is known."""
        if "max_iters" in self.settings:
            iterations, together = self.settings["max_iters"], self.settings.get("update_freq", 1)
            return iterations // together if is_number(iterations) and is_number(together) and together else None
        planned = self.settings.get("epochs")
        return planned if is_number(planned) else None

    def measures(self) -> list[Measure]:
        """Returns what counts and was measured."""
        return [measure for measure in self.kind.measures if self.last(measure.key) is not None]

    def departures(self) -> dict[str, tuple[Any, Any]]:
        """Returns the recipe's own settings that the run has not: recipe's value and run's, by name."""
        if self.recipe is None:
            return {}
        own = {key: value for key, value in self.recipe.own.items() if key not in SHARED_OUT}
        pairs = {key: (_plain(value), self.settings.get(key)) for key, value in own.items() if key in self.settings}
        departures = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
        if (batch := self.batch) and self.recipe.trains and batch != self.recipe.batch:
            departures["images an update"] = (self.recipe.batch, batch)
        return departures

    @property
    def batch(self) -> int | None:
        """Images of an optimizer step over all processes, where that is known."""
        if total := self.settings.get("total_batch_size"):
            return total if isinstance(total, int) else None
        images = next(
            (self.settings[key] for key in (*SHARED_OUT[:2], "samples_per_gpu") if key in self.settings), None
        )
        factors = (images, self.settings.get("update_freq", 1), self.environment.get("processes"))
        return math.prod(factors) if all(isinstance(factor, int) for factor in factors) else None  # type: ignore[type-var]

    def configuration(self) -> Any | None:
        """Returns the settings as their job's configuration, None where that cannot be had."""
        if self.kind.config is None or not self.settings:
            return None
        try:
            return from_plain(self.kind.config, self.settings)
        except (InputError, TypeError, ValueError):
            return None

    def defaults(self) -> dict[str, Any]:
        """Returns the defaults of its settings, as far as they are known."""
        return to_plain(self.kind.config()) if self.kind.config is not None else {}


def read_run(path: Path, name: str, recipe_name: str = "") -> RunRecord:
    """Reads a run folder.

    Args:
        path: The folder.
        name: What the run is to be called.
        recipe_name: The published run that it is to be compared with; what it was started as by default.

    Raises:
        InputError: There is no such folder, it holds no log with a finished epoch, or there is no such recipe.
    """
    _check_folder(path)
    entries, skipped = _read_log(path / "log.txt")
    notes: list[str] = []
    settings, changed = _read_settings(path / "config.yaml", notes)
    environment = _read_object(path / ENVIRONMENT, notes) if (path / ENVIRONMENT).is_file() else {}
    kind = kind_of(settings, entries)
    if changed is None and settings and kind.config is not None:
        defaults = to_plain(kind.config())
        changed = {key for key, value in settings.items() if key in defaults and value != defaults[key]}
    others = sorted(file for file in path.glob("*.json") if file.name not in NOT_RESULTS)
    return RunRecord(
        name=name,
        path=path,
        kind=kind,
        entries=entries,
        skipped_lines=skipped,
        settings=settings,
        changed=None if changed is None else frozenset(changed),
        environment=environment,
        pictures=sorted(path.glob("*.png")),
        results={file.name: found for file in others if (found := _read_object(file, notes))},
        recipe=read_recipe(recipe_name) if recipe_name else _recipe_of(settings, environment),
        notes=notes,
    )


def kind_of(settings: Mapping[str, Any], entries: Sequence[Entry]) -> Kind:
    """Tells what a run has trained from its settings, else from the numbers it has logged."""
    by_settings = next((kind for kind in _ORDER if kind.setting in settings), None)
    by_log = next((kind for kind in _ORDER if any(kind.logged in entry for entry in entries)), UNKNOWN)
    return by_settings or by_log


def is_number(value: Any) -> bool:
    """Whether a value of a log is a number, which may be infinite or none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _finite(entry: Entry, key: str) -> bool:
    return is_number(entry.get(key)) and math.isfinite(entry[key])


def _check_folder(path: Path) -> None:
    if not path.exists():
        raise InputError(f"there is no folder {path}")
    if not path.is_dir():
        raise InputError(f"{path} is a file: give the run's folder, {path.parent}")
    if (path / "log.txt").is_file():
        return
    runs = sorted(str(file.parent) for file in path.glob("*/log.txt"))
    if runs:
        raise InputError(f"{path} is no run folder, but holds some: {_some(runs)}")
    names = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    raise InputError(f"{path} has no log.txt, so no run has finished an epoch there; it holds {_some(names)}")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_SHOWN} more" if len(names) > MOST_SHOWN else ""
    return (", ".join(names[:MOST_SHOWN]) or "nothing") + more


def _read_log(path: Path) -> tuple[list[Entry], int]:
    """Returns the entries of a log, and how many of its lines cannot be read: a kill may cut one off."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    entries = [entry for line in lines if (entry := _entry(line)) is not None]
    if not entries:
        raise InputError(
            f"{path} has no finished epoch" + (f": none of its {len(lines)} lines is one" if lines else "")
        )
    return entries, len(lines) - len(entries)


def _entry(line: str) -> Entry | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("epoch"), int) else None


def _read_settings(path: Path, notes: list[str]) -> tuple[dict[str, Any], set[str] | None]:
    if not path.is_file():
        notes.append("There is no config.yaml in the folder, so its settings are not known.")
        return {}, None
    try:
        return read_run_settings(path)
    except InputError as error:
        notes.append(f"The settings cannot be read: {error}.")
        return {}, None


def _read_object(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if isinstance(content, dict):
        return content
    notes.append(f"{path.name} cannot be read as a JSON object.")
    return {}


def _recipe_of(settings: Mapping[str, Any], environment: Mapping[str, Any]) -> Recipe | None:
    """Returns the published run that a run was started as: what its command, or segmentation's config, names."""
    names = _configs_of(environment.get("command"))
    if settings.get("config"):
        names.append(str(settings["config"]))
    for name in names:
        if name in recipe_names() or name.endswith((".yaml", ".yml")):
            try:
                return read_recipe(name)
            except InputError:
                pass  # settings of the user's own
    stems = {Path(name).stem for name in names}
    recipes = map(read_recipe, recipe_names()) if stems else ()
    return next((r for r in recipes if r.task == SEGMENTATION and r.facts["config"] in stems), None)


def _configs_of(command: Any) -> list[str]:
    words = [str(word) for word in command] if isinstance(command, list) else []
    together = [word.partition("=")[2] for word in words if word.startswith("--config=")]
    return together + [after for word, after in pairwise(words) if word == "--config"]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
