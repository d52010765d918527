"""Runs run_beit_pretraining.py as a worker of an elastic launcher, with what the environment says to happen to it.

DIES_AT=7          SIGKILL to the worker and its agent when optimizer step 7 begins, as when their machine is lost
UNPLUG=veth1       the interface that goes down before that, so that nobody is told
WAITS_AT=12        a worker that trains alone waits at that step until another agent has come
WAITING=FILE       written when it begins to wait
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from beit.launch import launch
from beit.tasks import pretraining as masked_image_modeling
from beit.training import distributed

LONGEST_WAIT = 120  # seconds

asked_to_stop = []


def die() -> None:
    if "UNPLUG" in os.environ:
        subprocess.run(["ip", "link", "set", os.environ["UNPLUG"], "down"], check=True)
    for process in (os.getppid(), os.getpid()):
        os.kill(process, signal.SIGKILL)


def wait_to_be_stopped() -> None:
    """Waits for the SIGTERM with which an agent takes its workers together anew; the loop heeds it as ever."""
    heed = signal.getsignal(signal.SIGTERM)

    def note(*arguments):
        asked_to_stop.append(True)
        heed(*arguments)

    signal.signal(signal.SIGTERM, note)
    Path(os.environ["WAITING"]).touch()
    last = time.monotonic() + LONGEST_WAIT
    while not asked_to_stop and time.monotonic() < last:
        time.sleep(0.05)
    signal.signal(signal.SIGTERM, heed)


def main() -> int:
    original = masked_image_modeling.MaskedPrediction.__call__

    def call(self, model, batch, global_step):
        if os.environ.get("DIES_AT") == str(global_step):
            die()
        alone = distributed.world_size() == 1
        if alone and os.environ.get("WAITS_AT") == str(global_step) and not asked_to_stop:
            wait_to_be_stopped()
        return original(self, model, batch, global_step)

    masked_image_modeling.MaskedPrediction.__call__ = call
    return launch(masked_image_modeling.PretrainingConfig, masked_image_modeling.main, "")


if __name__ == "__main__":
    sys.exit(main())
