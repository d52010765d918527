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


def dispatch(
    prog: str,
    commands: Mapping[str, Command],
    argv: Sequence[str] | None = None,
    removed: Mapping[str, str] | None = None,
) -> int:
    """Runs the command, of one or two words, that the arguments start with, or lists commands.

    ``argv`` are those of the process by default; ``removed`` maps former commands to what to use instead.

    Returns the exit status: 0, 2 for a mistake in the input, or as :func:`beit.launch.launch` has it.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    name = _leading_name(words, commands)
    if not name and (listed := _asked_for(words, commands)):
        width = max(map(len, listed))
        lines = (f"  {name:<{width}}  {command.help}\n" for name, command in listed.items())
        sys.stdout.write(f"usage: {prog} COMMAND ...   ({prog} COMMAND --help for its options)\n\n{''.join(lines)}")
        return 0
    from beit.launch import launch, run_and_report

    if not name:
        return run_and_report(lambda: _refuse(prog, words, commands, removed or {}))
    command = commands[name]
    rest = words[len(name.split()) :]
    return launch(locate(command.settings), command.main, f"{command.help}\n", rest, f"{prog} {name}", argv is None)


def _leading_name(words: Sequence[str], names: Mapping[str, object]) -> str:
    """Returns the name, of two words or one, that the arguments start with; empty if there is none."""
    return next((name for count in (2, 1) if (name := " ".join(words[:count])) in names), "")


def _asked_for(words: Sequence[str], commands: Mapping[str, Command]) -> dict[str, Command]:
    """Returns the commands to list for ``--help``, ``visualize --help`` or no arguments at all."""
    prefix = [word for word in words if word not in ("-h", "--help", "help")]
    if len(prefix) > 1 or (words and prefix == list(words)):
        return {}
    return {name: command for name, command in commands.items() if name.split()[: len(prefix)] == prefix}


def _refuse(prog: str, words: Sequence[str], commands: Mapping[str, Command], removed: Mapping[str, str]) -> None:
    if former := _leading_name(words, removed):
        raise InputError(f"{prog} {former} is gone: use {removed[former]}")
    if siblings := [name for name in commands if name.split()[0] == words[0]]:
        given = " ".join(words[:2])
        problem = f"no such command{did_you_mean(given, siblings)}" if len(words) > 1 else "incomplete command"
        raise InputError(f"{prog} {given}: {problem}; choose {', '.join(siblings)}")
    hint = did_you_mean(words[0], [word for name in commands for word in (name, name.split()[0])])
    raise InputError(f"unknown command {words[0]!r}{hint}: choose {', '.join(commands)}")
