"""From a command line to an exit status: the one place that turns an error into a line for the user.

Imports no torch: flags are read, and mistakes in them reported, before anything heavy is loaded.
"""

import errno
import io
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from beit.config import read_command_line
from beit.errors import InputError, printable
from beit.registry import locate
from beit.training.console import configure_console
from beit.training.placement import leads

logger = logging.getLogger(__name__)

ConfigT = TypeVar("ConfigT")

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
OUT_OF_MEMORY = (
    "out of memory on the {device}: lower --batch_size and raise --update_freq to keep the effective batch; "
    "--grad_checkpointing saves memory too, in jobs that have it"
)
LOST = (
    "another process ended or cannot be reached, see its own message; the same command resumes from the last "
    "checkpoint ({error})"
)


def launch(
    config_class: type[ConfigT],
    main: Callable[[ConfigT], object] | str,
    description: str | None,
    argv: Sequence[str] | None = None,
    prog: str | None = None,
    owns_process: bool | None = None,
) -> int:
    """Reads a job's flags, runs it and returns the exit status of the process.

    Args:
        config_class: The job's configuration.
        main: The job; as ``"module:function"`` it is imported once the flags have been read.
        description: Text of ``--help``.
        argv: The arguments; the process's own by default.
        prog: The command's name in messages.
        owns_process: Whether :func:`end_at_once` may end the process; by default if it reads its own arguments.

    Returns:
        0 when done, 2 for a mistake in the input, 1 for a run that could not continue (out of memory, a loss that is
        not finite), 130 after Ctrl-C, 143 after SIGTERM and likewise 128 + its number after another signal.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that the console's encoding lacks
    name = prog or sys.argv[0].rpartition("/")[2]

    def run() -> None:
        configure_console(leads(), always=True)
        config = read_command_line(config_class, arguments, name, description or "")
        locate(main)(config)

    status = run_and_report(run)
    distributed = sys.modules.get("beit.training.distributed")  # not imported, no threads of gloo
    if (argv is None if owns_process is None else owns_process) and distributed and distributed.threads_left():
        end_at_once(status)
    return status


def end_at_once(status: int) -> None:
    """Ends the process without the interpreter's shutdown, which gloo threads left by ``--shard fsdp`` would abort."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run_and_report(run: Callable[[], None]) -> int:
    """Runs a command and returns its exit status; an expected error becomes one line on standard error."""
    try:
        run()
        return OK
    except BrokenPipeError:
        return FAILED
    except InputError as error:
        message, status = str(error), BAD_INPUT
    except KeyboardInterrupt:
        message, status = "interrupted", INTERRUPTED
    except MemoryError:
        message, status = OUT_OF_MEMORY.format(device="CPU"), FAILED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = error.filename or error.strerror
        message, status = f"no space left on the disk ({where}): free some and run the same command again", FAILED
    except Exception as error:
        if "torch" not in sys.modules:
            raise
        message, status = _end_of_training(error)
    if not message:
        return status
    if not leads():
        # Mistakes strike all processes alike. The first one's exit makes the launcher end the others, so that a
        # mistake is reported once; what only this process has met is still reported.
        time.sleep(5)
    sys.stderr.write(f"error: {printable(message)}\n")
    sys.stderr.flush()
    return status


def _end_of_training(error: Exception) -> tuple[str, int]:
    """Returns message and status for an error that training may end with; raises any other."""
    import torch

    from beit.training import distributed
    from beit.training.loop import NonFiniteLossError, Stopped

    if isinstance(error, Stopped):
        logger.info("%s", error)
        return "", 128 + error.signal
    message = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        message = OUT_OF_MEMORY.format(device="GPU")
    elif isinstance(error, RuntimeError) and distributed.is_loss_of_another(error):
        message = LOST.format(error=" ".join(message.split()))
    elif isinstance(error, RuntimeError) and ("can't allocate memory" in message or "not enough memory" in message):
        message = OUT_OF_MEMORY.format(device="CPU")
    elif not isinstance(error, NonFiniteLossError):
        raise error
    return message, FAILED
