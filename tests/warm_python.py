"""Python with the heavy third-party packages imported: it forks a process for each command that tests/shell.py sends.

Importing torch, torchvision and timm costs seconds, several times what a tiny command does. A fork starts with them; it
imports the library itself, and whatever else the command needs, as a fresh interpreter does. So do torchrun's workers.

Commands come as JSON lines on standard input; answered are the process id and, once it has ended, its status.
"""

import atexit
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

PRELOADED = (
    *("numpy", "torch", "torchvision.transforms.v2", "timm", "yaml", "PIL.Image", "safetensors.torch"),
    *("torch.utils.tensorboard", "torch.distributed.run", "torch.distributed.checkpoint"),
)


def serve() -> dict:
    """Forks at each command; returns it in the new process, never in this one."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for line in sys.stdin:
        command = json.loads(line)
        process = os.fork()
        if not process:
            answers.close()
            return command
        answers.write(f"{process}\n")
        _, status = os.waitpid(process, 0)
        answers.write(f"{os.waitstatus_to_exitcode(status)}\n")
    os._exit(0)


def become(command: dict) -> None:
    """Takes on the streams, environment and arguments of ``python ARGUMENTS…`` and runs it."""
    import numpy as np

    for stream, path in ((1, command["stdout"]), (2, command["stderr"])):
        if path is not None:
            os.dup2(os.open(path, os.O_WRONLY), stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(command["cwd"])
    os.environ.clear()
    os.environ.update(command["environment"])
    # Else every fork draws the same numbers where a command forgets to seed. `random` reseeds itself.
    np.random.seed()  # noqa: NPY002
    first, *rest = command["arguments"]
    if first == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), sys.modules["__main__"].__dict__)
    elif first == "-m":
        sys.argv, sys.path[0] = ["-m", *rest[1:]], os.getcwd()
        if rest[0].startswith("torch.distributed."):
            handler = sys.modules["torch.distributed.elastic.multiprocessing.subprocess_handler"].SubprocessHandler
            handler._popen = lambda files, args, env: Worker(args, env, files._stdout, files._stderr)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = [first, *rest], str(Path(first).resolve().parent)
        runpy.run_path(first, run_name="__main__")


class Worker:
    """A worker of torchrun, forked from it; with what torchrun uses of ``subprocess.Popen``."""

    returncode: int | None = None

    def __init__(self, args: tuple[str, ...], env: dict[str, str], *files) -> None:
        self.pid = os.fork()
        if self.pid:
            return
        os.setsid()
        for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
            if callable(signal.getsignal(number)):  # of torchrun
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        atexit._clear()
        sys.stdout.reconfigure(line_buffering=True)
        paths = zip(("stdout", "stderr"), (file and file.name for file in files), strict=True)
        live({"arguments": args[2:], "environment": env, "cwd": os.getcwd(), **dict(paths)})  # args: python -u …

    def poll(self) -> int | None:
        if self.returncode is None and (found := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.returncode = os.waitstatus_to_exitcode(found[1])
        return self.returncode

    def wait(self, timeout: float) -> int:
        last = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > last:
                raise subprocess.TimeoutExpired("a worker", timeout)
            time.sleep(0.01)
        return self.returncode


def live(command: dict) -> None:
    """Becomes what a command asks for, and ends with it."""
    try:
        become(command)
    except SystemExit as left:
        if left.code is not None and not isinstance(left.code, int):
            raise
        end(left.code or 0)
    except Exception:
        sys.excepthook(*sys.exc_info())
        end(1)
    end(0)


def end(status: int) -> None:
    """Ends the process as the interpreter does, but for freeing its memory, which costs more than a tiny command."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    for name in PRELOADED:
        __import__(name)
    assert threading.active_count() == 1  # a fork would lose the others
    gc.freeze()  # a fork that walked over all of this to collect garbage would copy it
    live(serve())
