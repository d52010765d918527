"""Runs run_linear_eval.py and kills it when an optimizer step begins, as a power cut would.

python killed_probe.py 7 -- FLAGS…
"""

import os
import signal
import sys

from beit.launch import launch
from beit.tasks import linear_probe


def kill_at_step(step: int) -> None:
    original = linear_probe.SideBySide.__call__

    def call(self, model, batch, global_step):
        if global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, model, batch, global_step)

    linear_probe.SideBySide.__call__ = call


if __name__ == "__main__":
    step, _, *flags = sys.argv[1:]
    kill_at_step(int(step))
    sys.exit(launch(linear_probe.LinearProbeConfig, linear_probe.main, "", flags))
