"""``python -m semantic_segmentation COMMAND``: training, testing, and what is done with the result."""

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from beit.errors import InputError, did_you_mean


class Command(NamedTuple):
    """A subcommand: the modules of its configuration and of its ``main``, and one line on what it does."""

    config_module: str
    config: str
    module: str
    help: str


COMMANDS = {
    "train": Command(
        "semantic_segmentation.config", "TrainConfig", "semantic_segmentation.task", "train a segmentor: CONFIG"
    ),
    "test": Command(
        "semantic_segmentation.config", "TestConfig", "semantic_segmentation.testing", "score one: CONFIG CHECKPOINT"
    ),
    "predict": Command(
        "semantic_segmentation.config", "PredictConfig", "semantic_segmentation.predict", "segment images: IMAGE ..."
    ),
    "demo": Command(
        "examples.demo_segmentation", "DemoConfig", "examples.demo_segmentation", "watch a segmentor learn, in minutes"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status: 0, or 2 for a mistake in the input."""
    name, *arguments = sys.argv[1:] if argv is None else argv or [""]
    if name in ("", "-h", "--help", "help"):
        sys.stdout.write(overview())
        return 0
    from beit.tasks.launch import launch, run_and_report

    if name not in COMMANDS:
        return run_and_report(lambda: refuse(name))
    command = COMMANDS[name]
    config = getattr(importlib.import_module(command.config_module), command.config)
    run = importlib.import_module(command.module).main
    prog = f"semantic_segmentation {name}"
    return launch(config, run, f"{command.help}\n", arguments, prog, owns_process=argv is None)


def refuse(name: str) -> None:
    """Says that there is no such command.

    Raises:
        InputError: Always.
    """
    raise InputError(f"unknown command {name!r}{did_you_mean(name, COMMANDS)}: choose {', '.join(COMMANDS)}")


def overview() -> str:
    """Returns the list of commands."""
    width = max(map(len, COMMANDS))
    lines = (f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items())
    usage = "usage: python -m semantic_segmentation COMMAND ...   (COMMAND --help says more)"
    return "\n".join([usage, "", *lines, ""])


if __name__ == "__main__":
    sys.exit(main())
