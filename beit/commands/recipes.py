"""``beit recipes``: the published runs, their settings and results, and the commands that reproduce them."""

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from beit.commands.settings import RECIPE_TASKS, ListConfig, ShowConfig
from beit.config import Values, read_facts, read_yaml, recipe_names
from beit.errors import InputError, counted, did_you_mean
from beit.tasks.settings import FinetuningConfig, LinearProbeConfig, PretrainingConfig, PretrainingV2Config, VqkdConfig

RUN = "/path/to/run"
TOOLS = "semantic_segmentation/tools"
SEGMENTATION, SEGMENTATION_TEST = "segmentation", "segmentation test"
FACTS: dict[str, type] = {
    **dict.fromkeys(("task", "source", "data", "hardware", "time", "note", "fine_tuned_with"), str),
    **dict.fromkeys(("data_path", "start", "config", "model"), str),
    **dict.fromkeys(("gpus", "batch_size", "total_batch_size", "max_steps"), int),
    "quoted": dict,
}
"""What a recipe may state about its run, with the types."""
_REQUIRED = ("task", "source", "gpus", "data_path", "quoted")
_OF_SEGMENTATION = ("config", "start", "model", "batch_size", "total_batch_size", "max_steps")
_IN_WORDS = {str: "text (in quotes where YAML reads it otherwise)", int: "a whole number from 1", dict: "a mapping"}


class Job(NamedTuple):
    """How runs of a task are launched: script, class of the settings, and the flag for what a run starts from."""

    script: str
    settings: type
    start: str


_FINETUNING = Job("run_class_finetuning.py", FinetuningConfig, "init_from")
JOBS = {
    "pre-training": Job("run_beit_pretraining.py", PretrainingConfig, "discrete_vae_weight_path"),
    "tokenizer training": Job("run_vqkd_training.py", VqkdConfig, "teacher"),
    "BEiT v2 pre-training": Job("run_beitv2_pretraining.py", PretrainingV2Config, "discrete_vae_weight_path"),
    "intermediate fine-tuning": _FINETUNING,
    "fine-tuning": _FINETUNING,
    "linear probe": Job("run_linear_eval.py", LinearProbeConfig, "checkpoint"),
}
"""Task -> job; segmentation has configs of its own."""


@dataclass(frozen=True)
class Recipe:
    """A published run."""

    name: str  # of the recipe, or the path of its file
    task: str  # one of RECIPE_TASKS
    gpus: int  # of the published run
    quoted: Mapping[str, object]  # results, and the number of parameters
    facts: Mapping[str, object]  # all that the file states: source, hardware and so on
    own: Mapping[str, object]  # the settings in the file and in those it builds on
    settings: Values  # all of them; for segmentation only those among the facts

    @property
    def batch(self) -> int:
        """Images per optimizer step, over all GPUs."""
        return self.settings["total_batch_size"]

    @property
    def trains(self) -> bool:
        """Whether it is a training run, to which the batch matters."""
        return self.task != SEGMENTATION_TEST

    def fact(self, name: str, default: str = "") -> str:
        """Returns a fact as text."""
        return str(self.facts.get(name, default))

    def expected(self, short: bool = False) -> str:
        """Returns the quoted results in one line, such as ``acc1 83.7, acc5 96.6``.

        With ``short`` only the run's own; if there are none, the first result of a later run.
        """
        quoted = {key: value for key, value in self.quoted.items() if key != "parameters"}
        own = {key: value for key, value in quoted.items() if not isinstance(value, Mapping)}
        return _in_words((own or dict(list(quoted.items())[:1])) if short else quoted)


def read_recipe(name: str) -> Recipe:
    """Reads a recipe by name or path; raises InputError if there is none, or the file lacks facts."""
    if name not in recipe_names() and not name.endswith((".yaml", ".yml")):
        hint = did_you_mean(name, recipe_names())
        raise InputError(f"no recipe {name!r}{hint}; `beit recipes list` lists them, and a path ends in .yaml")
    facts = read_facts(name)
    _check_facts(name, facts)
    about = name, facts["task"], facts["gpus"], facts["quoted"], facts
    if facts["task"] not in JOBS:
        return Recipe(*about, {}, {key: facts[key] for key in ("model", "batch_size", "total_batch_size")})
    settings = JOBS[facts["task"]].settings
    own = read_yaml(settings, name)
    return Recipe(*about, own, vars(settings(**own)))


def _check_facts(name: str, facts: Mapping[str, object]) -> None:
    task = facts.get("task")
    required = _REQUIRED if task in JOBS or task not in RECIPE_TASKS else (*_REQUIRED, *_OF_SEGMENTATION)
    if missing := [key for key in required if key not in facts]:
        raise InputError(f"{name}: recipe lacks {', '.join(missing)}; build on a recipe of the package with base:")
    for key, kind in FACTS.items():
        value = facts.get(key)
        if key in facts and (type(value) is not kind or (isinstance(value, int) and value < 1)):
            raise InputError(f"{name}: recipe: {key} is {value!r}; it must be {_IN_WORDS[kind]}")
    if task not in RECIPE_TASKS:
        raise InputError(f"{name}: unknown task {task!r}{did_you_mean(str(task), RECIPE_TASKS)}")


def command(recipe: Recipe, gpus: int) -> str:
    """Returns the shell command of a run on a machine's GPUs; raises InputError if they do not divide its batch."""
    if recipe.trains and recipe.batch % gpus:
        below = next(count for count in range(gpus, 0, -1) if recipe.batch % count == 0)
        raise InputError(f"--gpus {gpus}: {recipe.batch} images per step cannot be split evenly; {below} GPUs would do")
    data, start = (shlex.quote(recipe.fact(name)) for name in ("data_path", "start"))
    if recipe.task in JOBS:
        job, python = JOBS[recipe.task], "python" if gpus == 1 else f"torchrun --nproc_per_node={gpus}"
        lines = [f"{python} {job.script} --config {shlex.quote(recipe.name)}", f"--data_path {data}"]
        lines[1] += f" --{job.start} {start}" if recipe.fact("start") else ""
        return " \\\n    ".join([*lines, f"--output_dir {RUN}"])
    tool = "train" if recipe.trains else "test"
    words = [f"python {TOOLS}/{tool}.py" if gpus == 1 else f"bash {TOOLS}/dist_{tool}.sh"]
    words += [shlex.quote(recipe.fact("config")), *([] if recipe.trains else [start]), *([str(gpus)] * (gpus > 1))]
    if not recipe.trains:
        return f"{' '.join(words)} \\\n    --eval mIoU --options data_path={data}"
    # A single image at once leaves the batch norm after UPerNet's pooling to 1 x 1 nothing to normalise.
    more = " batch_size=2" if gpus == 1 and recipe.settings["batch_size"] == 1 else ""
    options = f"--options data_path={data} init_from={start}{more}"
    return " \\\n    ".join([" ".join(words), f"--output_dir {RUN} --seed 0 --deterministic", options])


def print_list(config: ListConfig) -> None:
    """Prints a table of the recipes."""
    recipes = [recipe for recipe in map(read_recipe, recipe_names()) if config.task in ("", recipe.task)]
    recipes.sort(key=lambda recipe: (RECIPE_TASKS.index(recipe.task), "ablation" in recipe.name))
    rows = [("recipe", "task", "model", "expected (quoted)", "published hardware")]
    rows += [(r.name, r.task, str(r.settings["model"]), r.expected(short=True), r.fact("hardware")) for r in recipes]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        sys.stdout.write("  ".join(map(str.ljust, row, widths)).rstrip() + "\n")


def show(config: ShowConfig) -> None:
    """Prints everything about a recipe, with its command for ``config.gpus`` GPUs."""
    recipe = read_recipe(config.name)
    gpus = config.gpus or recipe.gpus
    about = {key: recipe.fact(key, "not published") for key in ("task", "source", "data", "hardware", "time")}
    about["note"] = recipe.fact("note")
    if command_line := recipe.fact("fine_tuned_with"):
        about["fine-tuned with"] = f"run_class_finetuning.py {command_line}"
    if recipe.task not in JOBS:
        about["settings in"] = f"semantic_segmentation/configs/beit/upernet/{recipe.fact('config')}.yaml"
    elsewhere = "" if gpus == recipe.gpus else f", published with {recipe.gpus}"
    text = [recipe.name, _rows({name: fact for name, fact in about.items() if fact})]
    text += [f"settings:\n{_rows(recipe.own)}"] if recipe.own else []
    text += [f"quoted from the source, not measured with this library:\n{_rows(flat(recipe.quoted))}"]
    text += [f"command for {counted(gpus, 'GPU')}{elsewhere} (--gpus N for another number):"]
    text += [command(recipe, gpus), *_remarks(recipe, gpus)]
    sys.stdout.write("\n".join(text) + "\n")


def _remarks(recipe: Recipe, gpus: int) -> list[str]:
    if not recipe.trains:
        return []
    most, published = recipe.settings["batch_size"], recipe.gpus
    remarks = [f"\n{recipe.batch} images per step on any number of GPUs, at most {most} at once per GPU (batch_size)."]
    together, before = (count * min(most, recipe.batch // count) for count in (gpus, published))
    if recipe.task == SEGMENTATION and together != before:
        together = max(together, 2)
        remarks.append(f"The heads' batch norm sees {together} images at once, not {before} as published.")
    return remarks


def flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Returns a nested mapping as one whose keys are paths such as ``best: acc1``; lists are left out."""
    found: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}: ")
        elif not isinstance(value, list):
            found[f"{prefix}{key}"] = value
    return found


def _in_words(quoted: Mapping[str, object]) -> str:
    plain = ", ".join(f"{key} {value}" for key, value in quoted.items() if not isinstance(value, Mapping))
    nested = [f"{key}: {_in_words(value)}" for key, value in quoted.items() if isinstance(value, Mapping)]
    return "; ".join([*([plain] if plain else []), *nested])


def _rows(values: Mapping[str, object]) -> str:
    width = max(map(len, values), default=0)
    return "".join(f"  {key:<{width}}  {value}\n" for key, value in values.items())
