"""Runs semantic_segmentation/tools/train.py and kills it when an optimizer step begins, as a power cut would.

python killed_segmentation.py step 7 -- FLAGS…    SIGKILL
python killed_segmentation.py term 7 -- FLAGS…    SIGTERM
"""

import os
import signal
import sys

from beit.launch import launch
from semantic_segmentation import task
from semantic_segmentation.config import TrainConfig


def kill_at_step(step: int, number: int) -> None:
    original = task.PixelClassification.__call__

    def call(self, model, batch, global_step):
        if global_step == step:
            os.kill(os.getpid(), number)
        return original(self, model, batch, global_step)

    task.PixelClassification.__call__ = call


if __name__ == "__main__":
    kind, when, _, *flags = sys.argv[1:]
    kill_at_step(int(when), {"step": signal.SIGKILL, "term": signal.SIGTERM}[kind])
    sys.exit(launch(TrainConfig, task.main, "", flags))
