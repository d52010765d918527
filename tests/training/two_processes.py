"""One of two processes that train together; run by test_agreement.py under torchrun.

two_processes.py nan FOLDER      rank 1's loss is NaN at step 7
two_processes.py term FOLDER     rank 1 alone gets SIGTERM at step 7; checkpoints take a second to write
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

from beit.training import distributed
from beit.training.checkpoint import RunFolder
from beit.training.loop import NonFiniteLossError, Stopped, Trainer
from beit.training.optim import create_optimizer, parameter_groups
from beit.training.precision import Precision
from beit.training.session import open_session
from beit.training.state import LoopSettings, Period


class Batches:
    batch_size, batches_per_epoch = 4, 30

    def epoch(self, epoch, first_batch=0):
        for number in range(first_batch, self.batches_per_epoch):
            torch.manual_seed(1000 * epoch + 2 * number + distributed.rank())
            yield {"x": torch.randn(4, 3)}


def write_slowly() -> None:
    save = RunFolder.save

    def slow(self, *arguments):
        time.sleep(1)
        save(self, *arguments)

    RunFolder.save = slow


def main(kind: str, folder: Path) -> None:
    write_slowly()
    with open_session(device="cpu", output_dir=str(folder / "run"), settings="", seed=0) as session:
        model = nn.Linear(3, 3)

        def step(model, batch, global_step):
            loss = model(batch["x"]).square().mean()
            if session.rank == 1 and global_step == 7:
                if kind == "term":
                    os.kill(os.getpid(), signal.SIGTERM)
                else:
                    loss = loss * float("nan")
            return loss, {}

        optimizer = create_optimizer("sgd", parameter_groups(model, 0.0), lr=0.1)
        precision = Precision(torch.float32, session.device)
        settings = LoopSettings(
            total_steps=60, period=Period("epoch", 30), save_every=30, evaluate_every=30, log_every=5
        )
        trainer = Trainer(
            model=model,
            step=step,
            loader=Batches(),
            optimizer=optimizer,
            precision=precision,
            settings=settings,
            lr=lambda _: 0.1,
            folder=session.folder,
        )
        try:
            trainer.fit()
            outcome = "finished"
        except (NonFiniteLossError, Stopped) as error:
            outcome = f"{type(error).__name__}: {error}; {len(list((folder / 'run').glob('*.pth')))} checkpoints"
    outcome += f"; {len(threads_of_gloo())} threads of gloo left"
    (folder / f"rank{session.rank}.txt").write_text(outcome)


def threads_of_gloo() -> list[str]:
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return [name for name in names if "gloo" in name]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
