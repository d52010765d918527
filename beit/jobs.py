"""The commands that train, as functions: ``beit.pretrain(data_path="images/", output_dir="output/", ...)``."""

from collections.abc import Callable
from inspect import Signature
from typing import TYPE_CHECKING

from beit.commands import COMMANDS
from beit.commands.dispatch import Command
from beit.config import keywords_of, read_keywords
from beit.registry import locate
from beit.training.console import configure_console
from beit.training.placement import leads

if TYPE_CHECKING:
    from beit.tasks.base import Result

DOCUMENTATION = """{help}.

The settings are those of the command line, by any of their names there. Ctrl-C, or a notebook's stop button, saves
where the run is and raises KeyboardInterrupt; the same call then continues it.

Args:
{lines}

Returns:
    The lines of the log, the folder, and the last checkpoint.

Raises:
    InputError: A setting cannot be used, alone or with the others.
"""


def as_function(command: Command, name: str) -> Callable[..., "Result"]:
    """Returns a command that trains as a function of its settings, which its signature and documentation list."""
    config_class = locate(command.settings)
    parameters, lines = keywords_of(config_class)

    def job(**settings: object) -> "Result":
        configure_console(leads())
        config = read_keywords(config_class, settings)
        main = locate(command.main)
        from beit.training.loop import Stopped

        try:
            return main(config)
        except Stopped as stop:  # ends a script, or a notebook's cell, as Ctrl-C does anywhere else
            raise KeyboardInterrupt(str(stop).replace("the same command", "the same call")) from None

    job.__name__ = job.__qualname__ = name
    job.__doc__ = DOCUMENTATION.format(help=f"{command.help[0].upper()}{command.help[1:]}", lines=lines)
    job.__signature__ = Signature(parameters, return_annotation="Result")  # type: ignore[attr-defined]
    return job


pretrain = as_function(COMMANDS["pretrain"], "pretrain")
pretrain_v2 = as_function(COMMANDS["pretrain-v2"], "pretrain_v2")
finetune = as_function(COMMANDS["finetune"], "finetune")
linear_probe = as_function(COMMANDS["probe"], "linear_probe")
train_dvae = as_function(COMMANDS["dvae"], "train_dvae")
train_vqkd = as_function(COMMANDS["vqkd"], "train_vqkd")
