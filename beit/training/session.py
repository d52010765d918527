"""What every training job needs around its loop: a device, its fellow processes, a run folder, and a way to resume."""

import contextlib
import json
import logging
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from beit.errors import InputError
from beit.storage import load_checkpoint, position_of
from beit.training import distributed
from beit.training.checkpoint import RunFolder, newest_checkpoint
from beit.training.console import configure_console
from beit.training.environment import ENVIRONMENT, describe_environment
from beit.training.loop import Trainer
from beit.training.placement import PATIENCE, find_placement, may_follow_another

logger = logging.getLogger(__name__)

# Seconds that a run waits for the lock of its folder where a launcher started it again: a file server keeps the lock of
# a machine that is gone for as long as it hopes to hear from it, with NFS 4 for 90 seconds.
PREDECESSOR_PATIENCE = 120.0


@dataclass(frozen=True)
class Session:
    """A run's device, its place among ``world_size`` processes, its folder and its settings as YAML.

    ``folder`` is None on all but the main process, and in a run that writes nothing.
    """

    device: torch.device
    rank: int
    world_size: int
    folder: RunFolder | None
    settings: str = ""

    def resume(self, trainer: Trainer, *, path: str, auto: bool, start_epoch: int) -> None:
        """Continues a trainer from ``path``, else from the folder's newest checkpoint, else starts at an epoch.

        With ``auto`` the folder's newest checkpoint wins over a ``path`` it is ahead of, so a stopped run goes on where
        it was. Only then is what the run would overwrite set aside, and its settings and environment written,
        unless nothing is left to train.

        Raises:
            InputError: The file cannot be read or is of another model.
        """
        own = distributed.on_main(lambda: self._newest(path) if auto else "")
        source = own or path
        if source:
            trainer.resume(load_checkpoint(Path(source)), source)
        else:
            steps = trainer.settings.period.steps
            if not 0 <= start_epoch * steps < trainer.settings.total_steps:
                epochs = trainer.settings.total_steps // steps
                raise InputError(f"--start_epoch {start_epoch}: must be between 0 and --epochs {epochs}")
            trainer.first_step = start_epoch * steps
        if self.folder is not None:
            if trainer.is_done:
                return  # what is there describes the run that has trained
            if not own:
                next_end = trainer.first_step + trainer.settings.period.steps
                self.folder.set_aside(trainer.checkpoint_number(next_end))
            environment = json.dumps(describe_environment(self.device, self.world_size), indent=2).encode() + b"\n"
            records = {"config.yaml": self.settings.encode(), ENVIRONMENT: environment, **trainer.records}
            for name, content in records.items():
                self.folder.record(name, content)

    def _newest(self, path: str) -> str:
        """Returns the folder's newest checkpoint, or nothing if ``path`` has got as far."""
        newest = newest_checkpoint(self.folder.path) if self.folder else None
        if newest is None:
            return ""
        if path and position_of(load_checkpoint(newest, mmap=True)) <= position_of(load_checkpoint(path, mmap=True)):
            return ""
        if path:
            logger.info("%s has got further than %s (--no_auto_resume goes back to that)", newest, path)
        return str(newest)


@contextlib.contextmanager
def open_session(
    *,
    device: str,
    output_dir: str | None,
    settings: str,
    seed: int,
    keep_checkpoints: int = 0,
    deterministic: bool = False,
    local_rank: int = -1,
    dist_url: str = "env://",
    use_open_mpi: bool = False,
    patience: float = PATIENCE,
) -> Iterator[Session]:
    """Opens a run: finds its place among the processes, its device and its folder, and seeds the generators.

    Arguments are those of :class:`beit.tasks.settings.RunOptions`, and ``settings`` all of a run as YAML. Without
    ``output_dir`` nothing is written, with a warning unless it is None, for a job that has nothing to write.

    Raises:
        InputError: The folder cannot be used, or the launcher's environment is incomplete.
    """
    placement = find_placement(local_rank=local_rank, init_method=dist_url, use_open_mpi=use_open_mpi)
    configure_console(main_process=placement.rank == 0)
    compute = distributed.select_device(device, placement.local_rank, placement.bound)
    if deterministic:
        make_deterministic()
    seed_everything(seed)
    distributed.connect(placement, compute, patience)
    folder = None
    try:
        folder = _open_folder(output_dir, keep_checkpoints)
        yield Session(compute, placement.rank, placement.world_size, folder, settings)
    finally:
        if folder is not None:
            folder.close()
        distributed.disconnect()


def _open_folder(output_dir: str | None, keep: int) -> RunFolder | None:
    if output_dir is None:
        return None
    if not output_dir:
        logger.warning("no --output_dir: this run writes no checkpoints and no log.txt")
        return None
    opened: list[RunFolder] = []
    patience = PREDECESSOR_PATIENCE if may_follow_another() else 0.0
    distributed.on_main(lambda: opened.append(RunFolder(output_dir, keep, patience)))
    return opened[0] if opened else None


def seed_everything(seed: int) -> None:
    """Seeds Python's, NumPy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (libraries draw from the global generator)
    torch.manual_seed(seed)


def make_deterministic() -> None:
    """Uses deterministic kernels, at some cost in speed; torch warns once of each operation that has none on a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    # The backward passes of these are deterministic only where all must be, without a way out by a warning.
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
