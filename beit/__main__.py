"""The console command ``beit``: the training jobs, and what is done with their results."""

import sys
from collections.abc import Sequence

from beit import __version__
from beit.commands import COMMANDS
from beit.commands.dispatch import dispatch


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``beit COMMAND ...`` and returns the exit status: 0, or 2 for a mistake in the input."""
    if list(sys.argv[1:] if argv is None else argv) == ["--version"]:
        sys.stdout.write(f"beit {__version__}\n")
        return 0
    return dispatch("beit", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
