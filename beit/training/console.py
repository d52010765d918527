"""The library's log lines on the console; imports no torch."""

import logging
import os
import sys
from typing import TextIO

from tqdm import tqdm

from beit.errors import printable


class _AboveProgressBar(logging.StreamHandler):
    """Writes log lines to the console without tearing a progress bar apart."""

    def emit(self, record: logging.LogRecord) -> None:
        lines = self.format(record).split("\n")
        tqdm.write("\n".join(map(printable, lines)), file=console())  # a file's name could act on the terminal
        console().flush()


def in_notebook() -> bool:
    """Whether output goes to a notebook's cell."""
    return type(sys.stdout).__module__.startswith("ipykernel.")


def console() -> TextIO:
    """Returns where a run tells of itself: standard error; in a notebook, which paints that red, standard output."""
    return sys.stdout if in_notebook() else sys.stderr


def shows_bars() -> bool:
    """Whether the console can redraw a line; a terminal without a size (some containers) has no room for a bar."""
    return in_notebook() or (sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0)


def configure_console(main_process: bool, *, always: bool = False) -> None:
    """Sends the library's log lines to the :func:`console`; processes other than the first report only errors.

    A program that has set up logging keeps it: unless ``always``, nothing is added beside its handlers, and a level
    that it has given the library's logger stays.
    """
    library, handler = logging.getLogger("beit"), _AboveProgressBar()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    if always or not (library.handlers or logging.getLogger().handlers):
        library.handlers = [it for it in library.handlers if not isinstance(it, _AboveProgressBar)] + [handler]
    if library.level == logging.NOTSET or any(isinstance(it, _AboveProgressBar) for it in library.handlers):
        library.setLevel(logging.INFO if main_process else logging.ERROR)
