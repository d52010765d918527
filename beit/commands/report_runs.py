"""Of a report: what a run was: commands, settings, environment, every number of its last epoch."""

import shlex
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from beit.commands.run_record import RunRecord, is_number
from beit.config import to_flags
from beit.training.environment import describe_environment
from beit.visualization.diagram import short
from beit.visualization.markup import Content, Markup, element
from beit.visualization.page import fold, table

AGAIN = "reproduced"  # where the commands of the page write
NOT_OF_THE_RUN = ("local_rank", "dist_url", "world_size")  # but of the machines it had
LONGEST_VALUE = 400  # letters
NAMES = {
    "beit": "beit", "torch": "PyTorch", "torchvision": "torchvision", "timm": "timm", "numpy": "NumPy", "cuda": "CUDA",
    "python": "Python", "system": "System", "device": "Device", "processes": "Processes",
    "threads": "Threads a process",
}  # fmt: skip


def article(run: RunRecord, number: int) -> Markup:
    """Returns all that is known of a run, folded."""
    notes = [*run.notes, *_log_note(run)]
    return element(
        "article",
        element("h3", run.name, id=f"run-{number}"),
        element("div", run.kind.name, " in ", element("code", str(run.path)), class_="kind"),
        [element("p", note, class_="note") for note in notes],
        _commands(run),
        _settings(run),
        _environment(run),
        fold("Last line of log.txt", _numbers(run.entries[-1]), remark=f"{run.unit} {run.done:,}, every number"),
        class_="run",
        aria_labelledby=f"run-{number}",
    )


def _log_note(run: RunRecord) -> list[str]:
    if not run.skipped_lines:
        return []
    lines = "One line" if run.skipped_lines == 1 else f"{run.skipped_lines} lines"
    return [f"{lines} of log.txt could not be read and was left out." if run.skipped_lines == 1 else
            f"{lines} of log.txt could not be read and were left out."]  # fmt: skip


# Commands


def _commands(run: RunRecord) -> Markup | None:
    parts: list[Content] = []
    started = run.environment.get("command")
    if isinstance(started, list) and started:
        parts += [element("p", "As it was started:"), _shell(shlex.join(map(str, started)))]
    if again := command(run):
        parts += [element("p", "The same run, by the flags that differ from their defaults:"), _shell(again)]
    return fold("Commands", *parts, remark="to run it again") if parts else None


def _shell(text: str) -> Markup:
    return element("pre", element("code", text), tabindex="0")


def command(run: RunRecord) -> str:
    """Returns the command that does a run again, for a shell; nothing where its settings are not known."""
    folder = f"{AGAIN}/{run.name}"
    processes = run.environment.get("processes")
    many = isinstance(processes, int) and processes > 1
    start = f"torchrun --nproc_per_node={processes} " if many else "python "
    if run.kind.config is None:
        settings = run.path / "config.yaml"
        if not (run.kind.script and run.settings):
            return ""
        return f"{start}{run.kind.script} {shlex.quote(str(settings))} --work_dir {shlex.quote(folder)}"
    config = run.configuration()
    if config is None:
        return ""
    defaults = vars(type(config)())
    usual = {name: defaults[name] for name in NOT_OF_THE_RUN if name in defaults}
    flags = to_flags(replace(config, **usual, output_dir=folder))
    lines = [start + run.kind.script]
    for word in flags:
        lines += [word] if word.startswith("--") else []
        if not word.startswith("--"):
            lines[-1] += f" {shlex.quote(word)}"
        elif "=" in word:
            lines[-1] = shlex.quote(word)
    return " \\\n    ".join(lines)


# Settings


def _settings(run: RunRecord) -> Markup | None:
    """Returns the settings, those that differ from the defaults first."""
    if not run.settings:
        return None
    defaults = run.defaults()
    changed = [key for key in run.settings if key in (run.changed or ())]
    rest = {key: value for key, value in run.settings.items() if key not in changed}
    head = ("Setting", "Value", "Default") if defaults else ("Setting", "Value")
    rows = [_setting(run, key, defaults) for key in changed]
    differing = table(head, rows, "settings", f"Settings of {run.name} that differ from the defaults") if rows else None
    title = "With their defaults" if run.changed is not None else "Which of them differ from the defaults is not known"
    told = f"{len(changed)} of {len(run.settings)} differ from the defaults"
    remark = told if run.changed is not None else str(len(run.settings))
    return fold("Settings", differing, element("h4", title) if rest else None, _list(rest), remark=remark)


def _setting(run: RunRecord, key: str, defaults: Mapping[str, Any]) -> list[Content]:
    cells: list[Content] = [key, element("code", _text(run.settings[key]))]
    if defaults:
        cells.append(element("code", _text(defaults[key])) if key in defaults else None)
    return cells


def _text(value: Any) -> str:
    if value is None or value == "":
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        text = ", ".join(f"{key}={item}" for key, item in value.items())
    else:
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]} …"


# Environment and numbers


def _environment(run: RunRecord) -> Markup:
    stored = {key: value for key, value in run.environment.items() if key != "command"}
    if stored:
        return fold("Environment", _list(stored), remark="as the run stored it")
    here = describe_environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"), 1)
    here = {key: value for key, value in here.items() if key not in ("command", "processes", "threads")}
    text = "The run folder does not say what the run ran on. This is the machine that wrote this page, now:"
    return fold("Environment", element("p", text, class_="note"), _list(here), remark="not stored by the run")


def _list(values: Mapping[str, Any]) -> Markup:
    rows = [
        element("div", element("dt", NAMES.get(key, key)), element("dd", _text(value))) for key, value in values.items()
    ]
    return element("dl", *rows, class_="numbers")


def _numbers(entry: Mapping[str, Any]) -> Markup:
    rows = [element("div", element("dt", key), element("dd", _number(value))) for key, value in entry.items()]
    return element("dl", *rows, class_="numbers")


def _number(value: Any) -> Content:
    if not is_number(value):
        return _text(value)
    return element("data", short(value, 6), value=repr(value), title=repr(value))
