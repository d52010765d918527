"""Runs a command of a table by its name; its code is imported once its flags have been read."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from beit.errors import InputError, did_you_mean
from beit.registry import locate


@dataclass(frozen=True)
class Command:
    """A command: its settings ("module:class", in a module without torch), its function, and its help in one line."""

    settings: str
    main: str
    help: str


def dispatch(prog: str, commands: Mapping[str, Command], argv: Sequence[str] | None = None) -> int:
    """Runs the command, of one or two words, that the arguments start with, or lists commands.

    ``argv`` are those of the process by default.

    Returns the exit status: 0, 2 for a mistake in the input, or as :func:`beit.launch.launch` has it.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    name = next((name for count in (2, 1) if (name := " ".join(words[:count])) in commands), "")
    if not name and (listed := _asked_for(words, commands)):
        width = max(map(len, listed))
        lines = (f"  {name:<{width}}  {command.help}\n" for name, command in listed.items())
        sys.stdout.write(f"usage: {prog} COMMAND ...   ({prog} COMMAND --help for its options)\n\n{''.join(lines)}")
        return 0
    from beit.launch import launch, run_and_report

    if not name:
        return run_and_report(lambda: _refuse(words, commands))
    command = commands[name]
    rest = words[len(name.split()) :]
    return launch(locate(command.settings), command.main, f"{command.help}\n", rest, f"{prog} {name}", argv is None)


def _asked_for(words: Sequence[str], commands: Mapping[str, Command]) -> dict[str, Command]:
    """Returns the commands to list for ``--help``, ``visualize --help`` or no arguments at all."""
    prefix = [word for word in words if word not in ("-h", "--help", "help")]
    if len(prefix) > 1 or (words and prefix == list(words)):
        return {}
    return {name: command for name, command in commands.items() if name.split()[: len(prefix)] == prefix}


def _refuse(words: Sequence[str], commands: Mapping[str, Command]) -> None:
    siblings = [name for name in commands if name.split()[0] == words[0]]
    given = " ".join(words[:2]) if siblings else words[0]
    hint = did_you_mean(given, siblings or [*commands, *(name.split()[0] for name in commands)])
    problem = "incomplete command" if given in {name.split()[0] for name in siblings} else "unknown command"
    hint = hint if problem.startswith("unknown") else ""
    raise InputError(f"{problem} {given!r}{hint}: choose {', '.join(siblings or commands)}")
