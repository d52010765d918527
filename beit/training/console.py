"""The library's log lines on the console; imports no torch."""

import logging
import sys

from tqdm import tqdm

from beit.errors import printable


class _AboveProgressBar(logging.StreamHandler):
    """Writes log lines to standard error without tearing a progress bar apart."""

    def emit(self, record: logging.LogRecord) -> None:
        lines = self.format(record).split("\n")
        tqdm.write("\n".join(map(printable, lines)), file=sys.stderr)  # a file's name could act on the terminal
        sys.stderr.flush()


def configure_console(main_process: bool, *, always: bool = False) -> None:
    """Sends the library's log lines to standard error; processes other than the first report only errors.

    A program that has set up logging keeps it: unless ``always``, nothing is added beside its handlers, and a level
    that it has given the library's logger stays.
    """
    library, console = logging.getLogger("beit"), _AboveProgressBar()
    console.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    if always or not (library.handlers or logging.getLogger().handlers):
        library.handlers = [it for it in library.handlers if not isinstance(it, _AboveProgressBar)] + [console]
    if library.level == logging.NOTSET or any(isinstance(it, _AboveProgressBar) for it in library.handlers):
        library.setLevel(logging.INFO if main_process else logging.ERROR)
