"""Renaming the parameters of a transformer: tables of module paths, read in either direction."""

import re
from collections.abc import Mapping

_NUMBERED = re.compile(r"\.(\d+)\.")


class NameTable:
    """Official names on one side, another library's on the other.

    A path in the tables stands for a parameter or for a module whose parameters follow it (``norm1`` also renames
    ``norm1.weight``).

    Args:
        outside: Official paths outside the blocks and what the other library calls them.
        inside: The same for paths below a block.
        blocks: What the other library calls ``blocks``.
    """

    def __init__(self, outside: Mapping[str, str], inside: Mapping[str, str], blocks: str) -> None:
        self._to_theirs = {"outside": dict(outside), "inside": dict(inside)}
        self._to_official = {side: {v: k for k, v in table.items()} for side, table in self._to_theirs.items()}
        self._blocks = blocks

    def theirs(self, official: str) -> str | None:
        """Returns the other library's name of an official one, or None if the table does not know it."""
        return _rename(official, "blocks", self._blocks, self._to_theirs)

    def official(self, theirs: str) -> str | None:
        """Returns the official name of another library's one, or None if the table does not know it."""
        return _rename(theirs, self._blocks, "blocks", self._to_official)


def _rename(name: str, source: str, target: str, tables: Mapping[str, Mapping[str, str]]) -> str | None:
    if not name.startswith(f"{source}."):
        return _look_up(name, tables["outside"])
    match = _NUMBERED.match(name, len(source))
    if match is None:
        return None
    inner = _look_up(name[match.end() :], tables["inside"])
    return None if inner is None else f"{target}.{match[1]}.{inner}"


def _look_up(path: str, table: Mapping[str, str]) -> str | None:
    if path in table:
        return table[path]
    module, _, leaf = path.rpartition(".")
    return f"{table[module]}.{leaf}" if module in table else None
