"""From a command line to an exit status: the one place that turns what went wrong into a line for the user."""

import errno
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar

import torch

from beit.config import read_command_line
from beit.errors import InputError
from beit.training import distributed
from beit.training.logging import configure_console
from beit.training.loop import NonFiniteLossError, Stopped

logger = logging.getLogger(__name__)

ConfigT = TypeVar("ConfigT")

OK, FAILED, BAD_INPUT, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143
OUT_OF_MEMORY = (
    "out of memory on the {device}: lower --batch_size (for segmentation --samples_per_gpu) and raise --update_freq to "
    "keep the effective batch; "
    "--grad_checkpointing saves memory too, in jobs that have it"
)

LOST = (
    "another process ended or cannot be reached, and its own message says why; the same command goes on from the last "
    "checkpoint ({error})"
)


def launch(
    config_class: type[ConfigT],
    main: Callable[[ConfigT], None],
    description: str | None,
    argv: Sequence[str] | None = None,
    prog: str | None = None,
    owns_process: bool | None = None,
) -> int:
    """Reads a job's flags, runs it and returns the exit status of the process.

    Args:
        config_class: The job's configuration.
        main: The job.
        description: Text of ``--help``.
        argv: The arguments; the process's own by default.
        prog: The command's name in messages.
        owns_process: Whether the process was started for this job alone, so that it may be ended where it could not
            end by itself (:func:`end_at_once`); by default where it reads its own arguments.

    Returns:
        0 when done, 2 for a mistake in the input, 1 for a run that could not go on (out of memory, a loss that is
        not finite), 143 after SIGTERM, 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if argv is None else argv
    open_mpi = asks_for_open_mpi(arguments)
    name = prog or sys.argv[0].rpartition("/")[2]

    def run() -> None:
        configure_console(main_process=distributed.find_placement(use_open_mpi=open_mpi).rank == 0)
        main(read_command_line(config_class, arguments, name, description or ""))

    status = run_and_report(run, open_mpi)
    if (argv is None if owns_process is None else owns_process) and distributed.threads_left():
        end_at_once(status)
    return status


def end_at_once(status: int) -> None:
    """Ends the process without ending the interpreter first, which threads of gloo that are left would abort.

    PyTorch's caches of sharded operations keep the process group after a run with ``--shard fsdp`` on CPUs.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def asks_for_open_mpi(arguments: Sequence[str]) -> bool:
    """Whether a command line says that ``mpirun`` started the process: ``--dist_on_itp``, or ``--launcher mpi``."""
    return bool({"--dist_on_itp", "--dist-on-itp", "--launcher=mpi"} & set(arguments)) or (
        ("--launcher", "mpi") in pairwise(arguments)
    )


def run_and_report(run: Callable[[], None], open_mpi: bool = False) -> int:
    """Runs a command; a mistake of the user's, or a shortage, becomes one line on standard error."""
    try:
        run()
    except InputError as error:
        return _report(str(error), BAD_INPUT, open_mpi)
    except NonFiniteLossError as error:
        return _report(str(error), FAILED, open_mpi)
    except Stopped as stopped:
        logger.info("%s; the same command goes on from there", stopped)
        return TERMINATED
    except KeyboardInterrupt:
        return _report("interrupted", INTERRUPTED, open_mpi)
    except torch.OutOfMemoryError:
        return _report(OUT_OF_MEMORY.format(device="GPU"), FAILED, open_mpi)
    except MemoryError:
        return _report(OUT_OF_MEMORY.format(device="CPU"), FAILED, open_mpi)
    except RuntimeError as error:
        if distributed.is_loss_of_another(error):
            return _report(LOST.format(error=" ".join(str(error).split())), FAILED, open_mpi)
        if "can't allocate memory" not in str(error) and "not enough memory" not in str(error):
            raise
        return _report(OUT_OF_MEMORY.format(device="CPU"), FAILED, open_mpi)
    except BrokenPipeError:
        return FAILED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = error.filename or error.strerror
        return _report(
            f"no space left on the disk ({where}): free some and run the same command again", FAILED, open_mpi
        )
    return OK


def _report(message: str, status: int, open_mpi: bool) -> int:
    if not _leads(open_mpi):
        # Mistakes strike all processes alike. The first one's exit makes the launcher end the others, so that a
        # mistake is reported once; what only this process has met is still reported.
        time.sleep(5)
    sys.stderr.write(f"error: {message}\n")
    sys.stderr.flush()
    return status


def _leads(open_mpi: bool) -> bool:
    try:
        return distributed.find_placement(use_open_mpi=open_mpi).rank == 0
    except InputError:  # the launcher's variables are what is wrong
        return True
