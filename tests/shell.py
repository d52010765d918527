"""Runs the project's commands as a user does, but for the imports of torch, which tests/warm_python.py has made."""

import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FIXED = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # read by what is imported already


def run(
    *command: str, check: bool = True, timeout: float = 240, cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess:
    """Runs ``python COMMAND…``, by default in the project's folder, one thread a process; returns what it wrote."""
    assert not environment.keys() & FIXED.keys()
    arguments = [str(word) for word in command]
    with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as err:
        status = _fork(
            {
                "arguments": arguments,
                "environment": {**os.environ, **FIXED, **environment},
                "cwd": str(cwd),
                "stdout": out.name,
                "stderr": err.name,
            },
            timeout,
        )
        done = subprocess.CompletedProcess(arguments, status, _text(out.name), _text(err.name))
    assert not check or status == 0, done.stdout + done.stderr
    return done


@functools.cache
def _python() -> subprocess.Popen:
    """The process that forks, which ends with this one."""
    command = [sys.executable, str(Path(__file__).with_name("warm_python.py"))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **FIXED}, bufsize=0, **pipes)


def _fork(command: dict, timeout: float) -> int:
    server = _python()
    server.stdin.write(json.dumps(command).encode() + b"\n")
    process = int(server.stdout.readline())
    in_time, _, _ = select.select([server.stdout], [], [], timeout)
    if not in_time:
        os.kill(process, signal.SIGKILL)
    status = int(server.stdout.readline())
    if not in_time:
        raise subprocess.TimeoutExpired(command["arguments"], timeout, stderr=_text(command["stderr"]))
    return status


def _text(path: str) -> str:
    return Path(path).read_text(encoding="utf-8", errors="replace")
