"""Published runs: what a recipe says, and the command that runs it with the published batch on other GPUs."""

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from beit.commands import memory
from beit.config import read_command_line, read_facts, read_yaml, recipe_names
from beit.errors import InputError, did_you_mean
from beit.tasks.settings import FinetuningConfig, LinearProbeConfig, PretrainingConfig, mixes

RUN = "/path/to/run"
SEGMENTATION, SEGMENTATION_TEST = "segmentation", "segmentation test"
TOOLS = "semantic_segmentation/tools"
QUOTED_SIZES = ("parameters",)  # what is quoted beside results
# What facts of a recipe must be.
COUNTS = ("gpus", "input_size", "batch_size", "update_freq")
PLACES = ("data_path", "start", "config", "model")
TEXTS = ("task", "source", "data", "hardware", "time", "note", "fine_tuned_with", *PLACES)
TABLES = ("quoted", "updates")


@dataclass(frozen=True)
class Launcher:
    """How the runs of a task are started.

    Args:
        script: The launcher.
        config: The job's settings.
        start: The flag for what a run starts from.
        batch: The flag for the images of a GPU and batch.
    """

    script: str
    config: type
    start: str
    batch: str = "batch_size"


_FINETUNING = Launcher("run_class_finetuning.py", FinetuningConfig, "finetune")
LAUNCHERS = {
    "pre-training": Launcher("run_beit_pretraining.py", PretrainingConfig, "discrete_vae_weight_path"),
    "intermediate fine-tuning": _FINETUNING,
    "fine-tuning": _FINETUNING,
    "linear probe": Launcher("run_linear_eval.py", LinearProbeConfig, "pretrained_weights", "batch_size_per_gpu"),
}
TASKS = (*LAUNCHERS, SEGMENTATION, SEGMENTATION_TEST)


@dataclass(frozen=True)
class Recipe:
    """A published run.

    Args:
        name: Name of the recipe, or path of its file.
        facts: What the file says about the run: task, source, hardware, quoted results and so on.
        own: The settings that the file and the ones it builds on give.
        settings: All settings of the run; for segmentation only those that are among the facts.
    """

    name: str
    facts: Mapping[str, Any]
    own: Mapping[str, Any]
    settings: Mapping[str, Any]

    @property
    def task(self) -> str:
        """The kind of run, a key of :data:`TASKS`."""
        return self.facts["task"]

    @property
    def ablates(self) -> bool:
        """Whether the run is a pre-training of the paper's ablations."""
        return self.name.startswith("pretrain_ablation_")

    @property
    def trains(self) -> bool:
        """Whether the run learns something, so that its batch matters."""
        return self.task != SEGMENTATION_TEST

    @property
    def images(self) -> int:
        """Images of a GPU and batch, as published."""
        flag = LAUNCHERS[self.task].batch if self.task in LAUNCHERS else "batch_size"
        return self.settings[flag]

    @property
    def batch(self) -> int:
        """Images of an optimizer step over all GPUs: the published batch."""
        return self.facts["gpus"] * self.images * self.settings["update_freq"]

    @property
    def step(self) -> int:
        """What the images of a GPU must be a multiple of: mixup pairs them up."""
        return 2 if self.task in LAUNCHERS and LAUNCHERS[self.task].config is FinetuningConfig and self._mixes else 1

    @property
    def images_at_once(self) -> int:
        """Images of a forward pass over all GPUs, as published: what synchronised batch norm sees."""
        return self.facts["gpus"] * self.images

    def least_images(self, gpus: int) -> int:
        """Returns how few images a GPU can train on at once: one image alone leaves UPerNet's batch norm nothing."""
        return 2 if self.task == SEGMENTATION and gpus == 1 else self.step

    @property
    def _mixes(self) -> bool:
        return mixes(FinetuningConfig(**self.settings))

    def can_run_on(self, gpus: int) -> bool:
        """Whether the published batch splits over so many GPUs."""
        return gpus >= 1 and self.batch % gpus == 0 and (self.batch // gpus) % self.step == 0

    def expected(self) -> str:
        """Returns all quoted results in a line: ``acc1 83.7, acc5 96.6``."""
        return _in_words({key: value for key, value in self.facts["quoted"].items() if key not in QUOTED_SIZES})

    def expected_in_short(self) -> str:
        """Returns the run's own quoted results in a line; where it has none, the first that came of it."""
        quoted = {key: value for key, value in self.facts["quoted"].items() if key not in QUOTED_SIZES}
        own = {key: value for key, value in quoted.items() if not isinstance(value, Mapping)}
        return _in_words(own or dict(list(quoted.items())[:1]))


@dataclass(frozen=True)
class Plan:
    """How a run is shared out: ``gpus`` x ``images`` x ``update_freq`` is the published batch.

    Args:
        gpus: GPUs in all.
        nodes: Machines, each with as many GPUs as the others.
        images: Images of a GPU and batch.
        update_freq: Batches whose gradients are added up.
        checkpointing: Recompute activations in the backward pass.
        precision: ``amp`` or ``fp32``.
    """

    gpus: int
    nodes: int
    images: int
    update_freq: int
    checkpointing: bool = False
    precision: str = memory.AMP

    def __str__(self) -> str:
        batch = self.gpus * self.images * self.update_freq
        parts = (_count(self.gpus, "GPU"), _count(self.images, "image"), _count(self.update_freq, "batch", "batches"))
        return f"{' x '.join(parts)} = {batch} images an update"


def read_recipe(name: str) -> Recipe:
    """Reads a recipe of the package by its name, or one of the user's by its path.

    Raises:
        InputError: There is none, or the file does not say which run it is.
    """
    if name not in recipe_names() and not name.endswith((".yaml", ".yml")):
        hint = did_you_mean(name, recipe_names())
        raise InputError(f"no recipe {name!r}{hint}; `beit recipes list` shows all, and a path ends in .yaml")
    facts = read_facts(name)
    _check_facts(name, facts, ("task", "source", "gpus", "data_path", "quoted"))
    if facts["task"] not in TASKS:
        raise InputError(f"{name}: unknown task {facts['task']!r}{did_you_mean(facts['task'], TASKS)}")
    if facts["task"] not in LAUNCHERS:
        settings = ("model", "input_size", "batch_size", "update_freq")
        updates = ("updates",) if facts["task"] == SEGMENTATION else ()
        _check_facts(name, facts, (*settings, "config", "start", *updates))
        return Recipe(name, facts, {}, {key: facts[key] for key in settings})
    config = LAUNCHERS[facts["task"]].config
    own = read_yaml(config, name)
    return Recipe(name, facts, own, vars(read_command_line(config, ["--config", name], name, "")))


def _check_facts(name: str, facts: Mapping[str, Any], needed: Iterable[str]) -> None:
    missing = [key for key in needed if key not in facts]
    if missing:
        raise InputError(f"{name}: recipe has no {', '.join(missing)}; build on a recipe of the package with base:")
    for key, value in facts.items():
        if key in COUNTS and not _is_count(value):
            raise InputError(f"{name}: recipe: {key} is {value!r}; it must be a whole number from 1 on")
        if key in TEXTS and not isinstance(value, str):
            raise InputError(f"{name}: recipe: {key} is {value!r}; it must be text (in quotes, where YAML reads more)")
        if key in TABLES and not isinstance(value, Mapping):
            raise InputError(f"{name}: recipe: {key} is {value!r}; it must hold 'key: value' lines")
    for key, value in facts.get("updates", {}).items():
        if not _is_count(value):
            raise InputError(f"{name}: recipe: updates: {key} is {value!r}; it must be a whole number from 1 on")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def plan(recipe: Recipe, gpus: int, nodes: int = 1, gigabytes: float = 0, precision: str = memory.AMP) -> Plan:
    """Works out how a run is shared out over other GPUs without changing its batch.

    Without ``gigabytes``, a GPU takes at most as many images as in the published run.

    Args:
        recipe: The run.
        gpus: GPUs in all.
        nodes: Machines.
        gigabytes: Memory of a GPU, in 1e9 bytes; 0 where it is not known.
        precision: ``amp`` or ``fp32``.

    Raises:
        InputError: The batch cannot be split over so many GPUs, or not even one image fits.
    """
    _check_gpus(recipe, gpus, nodes)
    if not recipe.trains:
        return Plan(gpus, nodes, recipe.images, 1, precision=precision)
    share, least = recipe.batch // gpus, recipe.least_images(gpus)
    limit, checkpointing = min(share, recipe.images), False
    if gigabytes:
        limit, checkpointing = _limit(recipe, least, gigabytes, precision)
    sizes = [size for size in range(least, share + 1, recipe.step) if share % size == 0]
    images = max((size for size in sizes if size <= limit), default=sizes[0])
    return Plan(gpus, nodes, images, share // images, checkpointing, precision)


def _check_gpus(recipe: Recipe, gpus: int, nodes: int) -> None:
    if gpus < 1 or nodes < 1:
        raise InputError(f"--gpus {gpus} --nnodes {nodes}: must be at least 1")
    if gpus % nodes:
        raise InputError(f"--gpus {gpus} --nnodes {nodes}: --gpus counts all GPUs, as many on each machine")
    if recipe.trains and not recipe.can_run_on(gpus):
        possible = [count for count in range(1, recipe.batch + 1) if recipe.can_run_on(count)]
        near = [*[n for n in possible if n < gpus][-1:], *[n for n in possible if n > gpus][:1]]
        pairs = " (in pairs, for mixup)" if recipe.step > 1 else ""
        raise InputError(
            f"--gpus {gpus}: {recipe.batch} images an update{pairs} cannot be shared out evenly; "
            f"{' or '.join(map(str, near))} GPUs can"
        )


def _limit(recipe: Recipe, least: int, gigabytes: float, precision: str) -> tuple[int, bool]:
    """Returns how many images fit on a GPU, and whether that takes activation checkpointing."""
    work = workload(recipe)
    fit = memory.images_that_fit(work, gigabytes, precision)
    if fit >= least:
        return fit, False
    fit = memory.images_that_fit(work, gigabytes, precision, checkpointing=True) if work.backward else 0
    if fit < least:
        card = memory.needed(work, least, precision, checkpointing=work.backward) / 1e9 / memory.USABLE
        also = ", even with --grad_checkpointing" if work.backward else ""
        raise InputError(
            f"--gpu_memory {gigabytes:g}: by the estimate {_count(least, 'image')} of {recipe.name} "
            f"cannot fit{also}; it takes about {card:.0f} GB"
        )
    return fit, True


def workload(recipe: Recipe) -> memory.Workload:
    """Returns what a run asks of a GPU's memory."""
    values = recipe.settings
    if recipe.task not in LAUNCHERS:
        return memory.segmentation_workload(values["model"], values["input_size"])
    config = LAUNCHERS[recipe.task].config
    if config is PretrainingConfig:
        every_patch = values.get("predict") == "all"
        patches = None if every_patch else values["num_mask_patches"]
        pixels = values.get("target") == "pixels"
        return memory.pretraining_workload(values["model"], values["input_size"], patches, pixels)
    if config is FinetuningConfig:
        return memory.finetuning_workload(values["model"], values["input_size"], values["nb_classes"])
    return memory.probe_workload(values["model"], values["num_labels"])


def command(recipe: Recipe, how: Plan) -> str:
    """Returns the command line of a run, over several lines, to be pasted into a shell."""
    if not recipe.trains:
        lines = _test_lines(recipe, how)
    elif recipe.task == SEGMENTATION:
        lines = _segmentation_lines(recipe, how)
    else:
        lines = _lines(recipe, how)
    return " \\\n    ".join(lines)


def _lines(recipe: Recipe, how: Plan) -> list[str]:
    job = LAUNCHERS[recipe.task]
    more = " --grad_checkpointing" * how.checkpointing + " --amp_dtype fp32" * (how.precision == memory.FP32)
    start = recipe.facts.get("start")
    return [
        *_torchrun(how, f"{job.script} --config {shlex.quote(recipe.name)}"),
        f"--{job.batch} {how.images} --update_freq {how.update_freq}{more}",
        f"--data_path {_quoted(recipe, 'data_path')}" + (f" --{job.start} {_quoted(recipe, 'start')}" if start else ""),
        f"--output_dir {RUN}",
    ]


def _torchrun(how: Plan, script: str) -> list[str]:
    if how.gpus == 1:
        return [f"python {script}"]
    processes = f"--nproc_per_node={how.gpus // how.nodes}"
    if how.nodes == 1:
        return [f"torchrun {processes} {script}"]
    return [f"torchrun --nnodes={how.nodes} {processes} --rdzv_backend=c10d --rdzv_endpoint=$MASTER_ADDR:29500", script]


def _segmentation_lines(recipe: Recipe, how: Plan) -> list[str]:
    updates = {key: count * how.update_freq for key, count in recipe.facts["updates"].items()}
    options = [f"{key}={count}" for key, count in updates.items()]
    more = " grad_checkpointing=True" * how.checkpointing + " amp_dtype=fp32" * (how.precision == memory.FP32)
    return [
        *_segmentation_tool("train", recipe, how),
        f"--work-dir {RUN} --seed 0 --deterministic",
        f"--options data_root={_quoted(recipe, 'data_path')} pretrained={_quoted(recipe, 'start')}",
        f"samples_per_gpu={how.images} update_freq={how.update_freq} {' '.join(options[:2])}",
        " ".join(options[2:]) + more,
    ]


def _test_lines(recipe: Recipe, how: Plan) -> list[str]:
    more = " amp_dtype=fp32" * (how.precision == memory.FP32)
    lines = _segmentation_tool("test", recipe, how, _quoted(recipe, "start"))
    return [*lines, f"--eval mIoU --options data_root={_quoted(recipe, 'data_path')}{more}"]


def _quoted(recipe: Recipe, fact: str) -> str:
    """Returns a fact as one word of a shell."""
    return shlex.quote(recipe.facts[fact])


def _segmentation_tool(tool: str, recipe: Recipe, how: Plan, *words: str) -> list[str]:
    config = _quoted(recipe, "config")
    if how.gpus == 1:
        return [f"python {TOOLS}/{tool}.py {config}", *words]
    script = f"bash {TOOLS}/dist_{tool}.sh {config}"
    together = [f"NNODES={how.nodes} NODE_RANK=$NODE_RANK MASTER_ADDR=$MASTER_ADDR"] if how.nodes > 1 else []
    processes = str(how.gpus // how.nodes)
    return [*together, script, " ".join([*words, processes])] if words else [*together, f"{script} {processes}"]


def _in_words(quoted: Mapping[str, Any]) -> str:
    plain = [f"{key} {value}" for key, value in quoted.items() if not isinstance(value, Mapping)]
    nested = [f"{key}: {_in_words(value)}" for key, value in quoted.items() if isinstance(value, Mapping)]
    return "; ".join([", ".join(plain)] * bool(plain) + nested)


def _count(number: int, one: str, several: str | None = None) -> str:
    return f"{number} {one if number == 1 else several or one + 's'}"
