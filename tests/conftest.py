import logging
import os
import socket
from pathlib import Path

import pytest

# One thread a process, in the processes that tests start too: for tiny models, threads that wait for each other and for
# the cores of other workers cost several times what they compute. Read when numpy and torch are imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

GOLDEN = Path(__file__).parent / "golden"

# What a machine may lack. Under BEIT_STRICT_SKIPS=1, as .ci/run sets it, a skip for any other reason is a failure.
NEEDS_CUDA = "needs a CUDA device"
NEEDS_BROWSER = "needs a browser"
NEEDS_NAMESPACES = "needs the right to make network namespaces"
LAWFUL_SKIPS = (NEEDS_CUDA, NEEDS_BROWSER, NEEDS_NAMESPACES)


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of numbers stored from the reference implementations."""
    return GOLDEN


@pytest.fixture(autouse=True)
def quiet_console():
    """Takes away the console handler that a command run inside a test leaves behind."""
    library = logging.getLogger("beit")
    handlers, level = list(library.handlers), library.level
    yield
    library.handlers = handlers
    library.setLevel(level)


@pytest.fixture
def free_port() -> str:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=NEEDS_CUDA))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item, call):
    return refuse_unlawful_skip((yield))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report(collector):  # a whole module that skips itself
    return refuse_unlawful_skip((yield))


def refuse_unlawful_skip(report):
    if os.environ.get("BEIT_STRICT_SKIPS") != "1" or not report.skipped or hasattr(report, "wasxfail"):
        return report
    _, _, reason = report.longrepr  # (file, line, "Skipped: ...")
    if not reason.removeprefix("Skipped: ").startswith(LAWFUL_SKIPS):
        report.outcome = "failed"
        report.longrepr = f"{reason}\nOnly these reasons may skip a test here: {'; '.join(LAWFUL_SKIPS)}."
    return report
