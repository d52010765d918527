"""The exception for mistakes in what the user gave, and suggestions for misspelt names."""

import os
from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """A mistake in the user's input, in one line: what is wrong, where, and what to do.

    Launchers print it without a traceback and exit with status 2; library users can catch a ``ValueError``. Control
    characters, which names in files may have, are escaped.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))

    def _render_traceback_(self) -> list[str]:
        """Returns what a notebook shows in place of a traceback."""
        return [f"{type(self).__name__}: {self}"]


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Returns `` (did you mean 'a' or 'b'?)`` for the closest of ``choices``, or an empty string if none is close."""
    matches = get_close_matches(word, list(dict.fromkeys(choices)), n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(repr(match) for match in matches)}?)" if matches else ""


def did_you_mean_file(path: str | os.PathLike[str]) -> str:
    """Returns the same for the names beside a missing file, or that its folder is missing too."""
    folder, name = os.path.split(os.path.abspath(path))
    try:
        return did_you_mean(name, os.listdir(folder))
    except (OSError, ValueError):
        return f" ({folder} does not exist either)"


def printable(text: str) -> str:
    """Returns a text in one line, its control characters written out."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def counted(number: int, noun: str) -> str:
    """Returns ``1 tensor``, ``2 tensors`` or ``3 classes``."""
    return f"{number:,} {noun}{'' if number == 1 else 'es' if noun.endswith('s') else 's'}"


def listed(names: Iterable[object], most: int = 3) -> str:
    """Returns the first names separated by commas, and how many more there are."""
    words = [str(name) for name in names]
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")
