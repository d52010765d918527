"""The published runs at the console: which there are, what each is, and the command for the GPUs one has."""

import logging
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beit.commands import memory
from beit.commands.published import LAUNCHERS, SEGMENTATION, TASKS, Plan, Recipe, command, plan, read_recipe, workload
from beit.commands.reproducing import document
from beit.commands.settings import ListConfig, ShowConfig
from beit.config import option, recipe_names
from beit.errors import InputError, did_you_mean
from beit.storage import atomic_write

logger = logging.getLogger(__name__)

UNMEASURED = "quoted: by the source, not measured with this library"


@dataclass(frozen=True)
class CommandConfig:
    """The arguments of ``beit recipes command``."""

    name: str = option("", "a recipe's name, or the path of one of your own (.yaml)", positional=True)
    gpus: int | None = option(None, "GPUs in all; as many as the published run by default")
    nnodes: int = option(1, "machines that share the GPUs")
    gpu_memory: float = option(0.0, "memory of a GPU in GB (V100: 16 or 32, A100: 80, H200: 141); 0 where not known")
    precision: str = option(memory.AMP, "number format: amp (16 bits where it can be) or fp32", choices=("amp", "fp32"))


@dataclass(frozen=True)
class DocumentConfig:
    """The arguments of ``beit recipes document``."""

    output: str = option("docs/reproducing.md", "file to write", short="-o")


def print_list(config: ListConfig) -> None:
    """Writes a table of the recipes to standard output.

    Raises:
        InputError: There is no such task.
    """
    if config.task and config.task not in TASKS:
        hint = did_you_mean(config.task, TASKS) or f"; there is {', '.join(TASKS)}"
        raise InputError(f"--task {config.task}: no such task{hint}")
    recipes = [read_recipe(name) for name in recipe_names()]
    chosen = sorted((r for r in recipes if config.task in ("", r.task)), key=lambda r: (TASKS.index(r.task), r.ablates))
    rows = [("recipe", "task", "model", "expected (quoted)", "published hardware")]
    rows += [(r.name, r.task, r.settings["model"], r.expected_in_short(), r.facts.get("hardware", "")) for r in chosen]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        sys.stdout.write(f"{line.rstrip()}\n")


def show(config: ShowConfig) -> None:
    """Writes all that is known of a recipe to standard output."""
    recipe = read_recipe(config.name)
    published = plan(recipe, recipe.facts["gpus"])
    about: dict[str, Any] = {
        "task": recipe.task,
        "source": recipe.facts["source"],
        "data": recipe.facts.get("data", ""),
        "hardware": recipe.facts.get("hardware", "not published"),
        "time": recipe.facts.get("time", "not published"),
    }
    if "note" in recipe.facts:
        about["note"] = recipe.facts["note"]
    if "fine_tuned_with" in recipe.facts:
        about["fine-tuned with"] = f"run_class_finetuning.py {recipe.facts['fine_tuned_with']}"
    if recipe.trains:
        about |= {"shared out": str(published), "memory": _memory_line(recipe, published)}
    if recipe.task not in LAUNCHERS:
        about["settings in"] = f"semantic_segmentation/configs/beit/upernet/{recipe.facts['config']}.yaml"
    sections = [recipe.name, _rows(about)]
    if recipe.own:
        sections += ["settings:", _rows(recipe.own)]
    sections += [f"{UNMEASURED}:", _rows(_flat(recipe.facts["quoted"]))]
    sections += ["command (`beit recipes command` works out those for other GPUs):", command(recipe, published)]
    sys.stdout.write("\n".join(sections) + "\n")


def print_command(config: CommandConfig) -> None:
    """Writes a run's command line to standard output; what there is to say about it goes to the log."""
    if not (math.isfinite(config.gpu_memory) and config.gpu_memory >= 0):
        raise InputError(f"--gpu_memory {config.gpu_memory:g}: must be the GPU's memory in GB, or 0")
    recipe = read_recipe(config.name)
    gpus = recipe.facts["gpus"] if config.gpus is None else config.gpus
    how = plan(recipe, gpus, config.nnodes, config.gpu_memory, config.precision)
    for remark in remarks(recipe, how, config.gpu_memory):
        logger.info(remark)
    sys.stdout.write(f"{command(recipe, how)}\n")


def write_document(config: DocumentConfig) -> None:
    """Writes ``docs/reproducing.md`` from the recipes."""
    path = Path(config.output)
    if not path.parent.is_dir():
        raise InputError(f"--output {path}: there is no folder {path.parent}")
    with atomic_write(path) as file:
        file.write(document().encode())
    logger.info("wrote %s", path)


def remarks(recipe: Recipe, how: Plan, gigabytes: float) -> list[str]:
    """Returns what one should know before pasting a command."""
    told = [str(how)] if recipe.trains else ["a test: any number of GPUs gives the same result"]
    if gigabytes and recipe.trains:
        told.append(f"{_memory_line(recipe, how)} of {gigabytes:g} GB")
    if how.checkpointing:
        told.append("--grad_checkpointing: not even one image fits without it, by the estimate; a step takes longer")
    at_once = how.gpus * how.images
    if recipe.task == SEGMENTATION and at_once != recipe.images_at_once:
        told.append(
            f"not quite the published run: the heads' batch norm sees {at_once} images at once, not "
            f"{recipe.images_at_once}, and update_freq does not make up for that (docs/reproducing.md)"
        )
    if how.nodes > 1:
        told.append("run it on every machine; MASTER_ADDR is the first machine's address")
        if recipe.task not in LAUNCHERS:
            told.append("NODE_RANK is 0 on the first machine, 1 on the next, and so on")
    return told


def _memory_line(recipe: Recipe, how: Plan) -> str:
    peak = memory.needed(workload(recipe), how.images, how.precision, how.checkpointing) / 1e9
    return f"about {peak:.0f} GB a GPU (estimate, on the safe side)"


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}: ") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _rows(values: Any) -> str:
    width = max(map(len, values), default=0)
    return "".join(f"  {key:<{width}}  {value}\n" for key, value in values.items())
