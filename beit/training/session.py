"""What every training job needs around its loop: a device, its fellow processes, a run folder, and a way to resume."""

import contextlib
import logging
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from beit.storage import atomic_write, load_checkpoint
from beit.training import distributed
from beit.training.checkpoint import RunFolder
from beit.training.logging import configure_console
from beit.training.loop import Trainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """The surroundings of a run.

    Args:
        device: Where this process computes.
        rank: Number of this process.
        world_size: Number of processes.
        folder: The run folder, on the main process only; None if the run writes nothing.
    """

    device: torch.device
    rank: int
    world_size: int
    folder: RunFolder | None

    def resume(self, trainer: Trainer, *, path: str, auto: bool, start_epoch: int) -> None:
        """Continues a trainer from ``path``, else from the folder's newest checkpoint, else starts at an epoch.

        Raises:
            InputError: The file cannot be read or is of another model.
        """
        trainer.first_epoch = start_epoch
        source = path or distributed.on_main(lambda: str((auto and self.folder and self.folder.newest()) or ""))
        if source:
            trainer.resume(load_checkpoint(Path(source)), source)


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
) -> Iterator[Session]:
    """Opens a run: finds its place among the processes, its device and its folder, and seeds the generators.

    Args:
        device: ``cuda``, ``cpu`` or ``mps``.
        output_dir: The run folder; empty to write nothing, None for a job that has nothing to write.
        settings: The run's settings, written there as ``config.yaml``.
        seed: Seed of the initialisation, the same on all processes.
        keep_checkpoints: Epoch checkpoints to keep; 0 keeps all.
        deterministic: Whether only deterministic kernels may run.
        local_rank: What old launchers pass as ``--local_rank``.
        dist_url: Where the processes meet.
        use_open_mpi: Whether ``mpirun`` started the processes.

    Raises:
        InputError: The folder cannot be used, or the launcher's environment is incomplete.
    """
    placement = distributed.find_placement(local_rank=local_rank, init_method=dist_url, use_open_mpi=use_open_mpi)
    configure_console(main_process=placement.rank == 0)
    compute = distributed.select_device(device, placement.local_rank)
    if deterministic:
        make_deterministic()
    seed_everything(seed)
    distributed.connect(placement, compute)
    folder = None
    try:
        folder = _open_folder(output_dir, keep_checkpoints, settings)
        yield Session(compute, placement.rank, placement.world_size, folder)
    finally:
        if folder is not None:
            folder.close()
        distributed.disconnect()


def _open_folder(output_dir: str | None, keep: int, settings: str) -> RunFolder | None:
    if output_dir is None:
        return None
    if not output_dir:
        logger.warning("no --output_dir: this run writes no checkpoints and no log.txt")
        return None
    opened: list[RunFolder] = []

    def open_it() -> None:
        folder = RunFolder(output_dir, keep)
        with atomic_write(folder.path / "config.yaml") as file:
            file.write(settings.encode())
        opened.append(folder)

    distributed.on_main(open_it)
    return opened[0] if opened else None


def seed_everything(seed: int) -> None:
    """Seeds Python's, NumPy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (libraries draw from the global generator)
    torch.manual_seed(seed)


def make_deterministic() -> None:
    """Allows only kernels that give the same bits each time, at some cost in speed."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
