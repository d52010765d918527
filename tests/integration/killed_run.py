"""Runs run_beit_pretraining.py and kills it at a chosen moment, as a power cut would.

python killed_run.py step 7 -- FLAGS…      SIGKILL when optimizer step 7 begins
python killed_run.py term 7 -- FLAGS…      SIGTERM there
python killed_run.py rename 2 -- FLAGS…    SIGKILL between the second checkpoint's temporary file and its rename
python killed_run.py pieces 2 -- FLAGS…    SIGKILL when the second checkpoint in pieces has all of them, and no index
"""

import os
import signal
import sys

import torch.distributed.checkpoint

from beit.launch import launch
from beit.tasks import pretraining as masked_image_modeling
from beit.training.logging import EpochLog


def kill_at_step(step: int, number: int) -> None:
    original = masked_image_modeling.MaskedPrediction.__call__

    def call(self, model, batch, global_step):
        if global_step == step:
            os.kill(os.getpid(), number)
        return original(self, model, batch, global_step)

    masked_image_modeling.MaskedPrediction.__call__ = call


def kill_at_rename(count: int) -> None:
    original, seen = os.replace, []

    def replace(source, target, **options):
        if str(target).endswith(".pth"):
            seen.append(target)
            if len(seen) == count:
                assert os.path.getsize(source) > 0
                os.kill(os.getpid(), signal.SIGKILL)
        return original(source, target, **options)

    os.replace = replace


def kill_at_call(owner: object, name: str, count: int, before: bool) -> None:
    """Kills at the ``count``-th call of a function, before or after it does its work."""
    original, seen = getattr(owner, name), []

    def call(*arguments, **options):
        seen.append(name)
        if before and len(seen) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **options)
        if len(seen) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, call)


if __name__ == "__main__":
    kind, when, _, *flags = sys.argv[1:]
    if kind == "rename":
        kill_at_rename(int(when))
    elif kind == "pieces":
        kill_at_call(torch.distributed.checkpoint.FileSystemWriter, "finish", int(when), before=True)
    elif kind == "log":
        kill_at_call(EpochLog, "write", int(when), before=False)
    elif kind == "evaluation":
        kill_at_call(masked_image_modeling, "evaluate", int(when), before=True)
    else:
        kill_at_step(int(when), signal.SIGKILL if kind == "step" else signal.SIGTERM)
    sys.exit(launch(masked_image_modeling.PretrainingConfig, masked_image_modeling.main, "", flags))
