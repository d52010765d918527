"""The library's log lines on the console; imports no torch."""

import logging
import sys

from tqdm import tqdm


class _AboveProgressBar(logging.StreamHandler):
    """Writes log lines to standard error without tearing a progress bar apart."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)
        sys.stderr.flush()


def configure_console(main_process: bool) -> None:
    """Sends the library's log lines to standard error; processes other than the first report only errors."""
    console = _AboveProgressBar()
    console.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    library = logging.getLogger("beit")
    library.handlers = [console]
    library.setLevel(logging.INFO if main_process else logging.ERROR)
