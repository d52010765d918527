"""Python with the heavy third-party packages imported: it forks a process for each command that tests/shell.py sends.

Importing torch, torchvision and timm costs seconds, several times what a tiny command does. A fork starts with them; it
imports the library itself, and whatever else the command needs, as a fresh interpreter does.

Commands come as JSON lines on standard input; answered are the process id and, once it has ended, its status.
"""

import atexit
import gc
import json
import os
import runpy
import sys
import threading
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
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = [first, *rest], str(Path(first).resolve().parent)
        runpy.run_path(first, run_name="__main__")


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
    command = serve()
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
