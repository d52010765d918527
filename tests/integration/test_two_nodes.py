"""Two network namespaces as two machines with a cable between them: one is lost without a word, and comes back."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import NEEDS_NAMESPACES
from tests.integration.agents import BATCH, COMPARABLE, MOST_SECONDS, agents_of, assert_same_curve, undisturbed_run

pytestmark = pytest.mark.slow

FIRST, SECOND = "10.213.77.1", "10.213.77.2"


def ip(*words: str, check: bool = True) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *words], check=check, capture_output=True, text=True)


@pytest.fixture
def machines() -> Iterator[tuple[str, str]]:
    """Two namespaces with an interface each, of their own name, that a cable joins."""
    if not shutil.which("ip"):
        pytest.skip(f"{NEEDS_NAMESPACES}, and the command ip")
    names = (f"beit{os.getpid()}a", f"beit{os.getpid()}b")
    try:
        join = ("link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1], "netns", names[1])
        enter = [("netns", "exec", name, "true") for name in names]
        for words in [*(("netns", "add", name) for name in names), *enter, join]:
            done = ip(*words, check=False)
            if done.returncode:
                pytest.skip(f"{NEEDS_NAMESPACES}: {done.stderr.strip()}")
        for name, address in zip(names, (FIRST, SECOND), strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", name)
            ip("-n", name, "link", "set", name, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            ip("netns", "delete", name, check=False)


def wait_for(path: Path) -> bool:
    last = time.monotonic() + MOST_SECONDS
    while not path.exists() and time.monotonic() < last:
        time.sleep(0.1)
    return path.exists()


def test_a_machine_that_vanishes_is_given_up_and_taken_back(tmp_path, pretraining_flags, machines, free_port):
    # Breaks if a process waits for ever for one that cannot say that it is gone, or a run cannot grow again.
    first, second = machines
    flags = (*pretraining_flags, *BATCH, *COMPARABLE)
    own = (*flags, "--output_dir", tmp_path / "run", "--dist_timeout", "0.25")
    waiting = tmp_path / "waiting"

    def on(name: str, address: str) -> dict:
        return {"options": (f"--local-addr={address}",), "GLOO_SOCKET_IFNAME": name}

    with agents_of(f"{FIRST}:{free_port}", own, tmp_path) as agents:
        inside_first, inside_second = ("ip", "netns", "exec", first), ("ip", "netns", "exec", second)
        survivor = agents.start("survivor", *inside_first, **on(first, FIRST), WAITS_AT="12", WAITING=str(waiting))
        lost = agents.start("lost", *inside_second, **on(second, SECOND), DIES_AT="7", UNPLUG=second)
        assert lost.wait(MOST_SECONDS) == -9
        reference = undisturbed_run(tmp_path / "undisturbed", flags)
        assert wait_for(waiting), agents.log("survivor")
        ip("-n", second, "link", "set", second, "up")
        back = agents.start("back", *inside_second, **on(second, SECOND))
        assert survivor.wait(MOST_SECONDS) == 0, agents.log("survivor")
        assert back.wait(MOST_SECONDS) == 0, agents.log("back")
    said = "".join(map(agents.log, ("survivor", "lost", "back")))
    assert said.count("4 images x 2 processes x 1 batch") == 2
    assert said.count("4 images x 1 process x 2 batches") == 1
    assert "stopped at epoch 2, step 3" in said  # 13 steps are done, 5 are an epoch
    assert_same_curve(tmp_path / "run", reference)
