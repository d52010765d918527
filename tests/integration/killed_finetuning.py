"""Runs run_class_finetuning.py and kills it at a chosen moment, as a power cut would.

python killed_finetuning.py step 7 -- FLAGS…      SIGKILL when optimizer step 7 begins
python killed_finetuning.py rename 2 -- FLAGS…    SIGKILL between the second checkpoint's temporary file and its rename
"""

import os
import signal
import sys

from beit.launch import launch
from beit.tasks import finetuning as classification
from tests.integration.killed_run import kill_at_rename


def kill_at_step(step: int) -> None:
    original = classification.Classification.__call__

    def call(self, model, batch, global_step):
        if global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, model, batch, global_step)

    classification.Classification.__call__ = call


if __name__ == "__main__":
    kind, when, _, *flags = sys.argv[1:]
    (kill_at_rename if kind == "rename" else kill_at_step)(int(when))
    sys.exit(launch(classification.FinetuningConfig, classification.main, "", flags))
