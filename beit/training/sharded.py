"""The training loop where each process holds and writes only its part of the training state.

A checkpoint is a folder ``checkpoint-<epoch>/`` of pieces and, written last, ``checkpoint-<epoch>.pth`` with the model.
"""

import itertools
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from beit.storage import Checkpoint
from beit.training import distributed
from beit.training.checkpoint import LAST
from beit.training.loop import Trainer


@dataclass(kw_only=True)
class ShardedTrainer(Trainer):
    """A :class:`Trainer` whose checkpoints are folders of pieces. What a piece is, a subclass says."""

    names_folder: ClassVar[str]  # the key of the plain file that names the folder

    def __post_init__(self) -> None:
        super().__post_init__()
        distributed.connect_alone(self._device)
        self._root = distributed.on_main(lambda: str(self.folder.path) if self.folder and self.settings.save else "")

    @abstractmethod
    def _write_pieces(self, folder: Path, state: Checkpoint) -> None:
        """Writes this process's piece; all processes call it, the main one with the checkpoint's state."""

    def _save(self, name: str, step: int, period_open: bool = False) -> None:
        if self._root:
            stem = Path(name).stem
            if name == LAST:  # the file that names it decides which one counts
                stem = f"{stem}-{step}"
            folder = Path(self._root, distributed.on_main(lambda: _unused_name(Path(self._root), stem)))
            state = self._state(step, period_open) if self._makes_checkpoints else {}
            self._write_pieces(folder, state)
            distributed.barrier()
            self._write(name, {**state, self.names_folder: folder.name})
        self._throughput.restart_window()


def _unused_name(root: Path, name: str) -> str:
    """Returns the name, or with a number if it is taken: what is there may be all that a present checkpoint has."""
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(name for name in names if not (root / name).exists())
